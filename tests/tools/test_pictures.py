"""What `regulate inspect` reads out of a folder: which images, under which labels, normalised how."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from regulate.tools import figures
from regulate.tools.cli import main
from regulate.tools.images import pictures

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def paint(root, *names):
    """One-coloured images of grey 10, 11, ... in the order of their names."""
    for grey, name in enumerate(names, 10):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 8), (grey,) * 3).save(root / name)
    return root


def taken(images):
    return (255 * images[:, 0, 0, 0]).round().int().tolist()


def test_classes_are_the_folders_that_hold_images(tmp_path):
    root = paint(tmp_path, "b/0.png", "b/1.png", "c/0.png", ".ipynb_checkpoints/0.png", "c/.trash/0.png", "c/._0.png")
    (tmp_path / "a").mkdir()
    images, labels = pictures(root, 9, 4, PLAIN)
    assert taken(images) == [10, 11, 12]
    assert labels.tolist() == [0, 0, 1]


def test_a_hidden_folder_can_be_named(tmp_path):
    images, labels = pictures(paint(tmp_path / ".data", "a/0.png", "b/0.png"), 9, 4)
    assert len(images) == 2
    assert labels.tolist() == [0, 1]


@pytest.mark.parametrize("names", [("0.png", "1.png"), ("a/0.png", "1.png"), ("a/b/0.png", "a/b/1.png")])
def test_other_folders_have_no_labels(names, tmp_path):
    for count in (1, 2):
        assert pictures(paint(tmp_path, *names), count, 4)[1] is None


@pytest.mark.parametrize(("count", "greys"), [(2, [10, 13]), (4, [10, 11, 13, 14]), (6, [*range(10, 16)])])
def test_they_are_spread_over_all_files(count, greys, tmp_path):
    images, labels = pictures(paint(tmp_path, *(f"{name}/{i}.png" for name in "ab" for i in range(3))), count, 4, PLAIN)
    assert taken(images) == greys
    assert labels.tolist() == [int(grey > 12) for grey in greys]


def test_they_are_normalised_as_the_card_says(tmp_path):
    root = paint(tmp_path, "0.png")
    card = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 1.0, 2.0), "crop_pct": 1}
    for given, mean, std in ((card, *list(card.values())[:2]), (None, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))):
        expected = (10 / 255 - torch.tensor(mean)) / torch.tensor(std)
        for channels, value in ((3, expected), (1, (10 / 255 - sum(mean) / 3) / (sum(std) / 3) * torch.ones(1))):
            images, _ = pictures(root, 1, 4, given, channels)
            assert images.shape == (1, channels, 4, 4)
            assert torch.allclose(images, value[:, None, None])


def inspected(folder, monkeypatch, *arguments, model="cifar/14"):
    """The shape of the images that `regulate inspect` would draw."""
    drawn = []
    monkeypatch.setattr(figures, "draw", lambda model, images, *rest: drawn.append(tuple(images.shape)) or [])
    root = paint(folder, "0.png")
    return main(["inspect", model, "--images", str(root), *arguments]), drawn


def test_a_network_gets_the_channels_and_the_size_that_it_takes(tmp_path, monkeypatch):
    assert inspected(tmp_path, monkeypatch, "--size", "16") == (0, [(1, 3, 16, 16)])
    assert inspected(tmp_path, monkeypatch, "--size", "16", "--in-chans", "1") == (0, [(1, 1, 16, 16)])


@pytest.mark.parametrize(
    ("model", "channels", "says"),
    [("cifar/14", "2", "3 channels, or 1 in grey; the network takes 2"), ("torchvision/r3d_18", "3", "takes video")],
)
def test_a_network_that_takes_no_images_is_refused(model, channels, says, tmp_path, monkeypatch, capsys):
    assert inspected(tmp_path, monkeypatch, "--in-chans", channels, model=model) == (2, [])
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
