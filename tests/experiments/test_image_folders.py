"""Images in folders: what seed and epoch decide, damaged images, folders that are no data set."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imsave
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import train
from experiments import batches, data, loop
from experiments.folders import Drawn, read
from experiments.messages import one_line
from experiments.options import Options
from experiments.sources import DataError

from .runs import HERE

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "val"):
        for number, name in enumerate(("a", "b")):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(8):
                pixels = np.random.default_rng(10 * number + index).random((48, 40, 3))
                imsave(tmp_path / split / name / f"{index}.png", pixels)
    return tmp_path


def images(folder, seed=0, epoch=0, workers=0):
    options = Options("imagefolder", str(folder), size=32, batch=4, seed=seed, workers=workers)
    made = batches.training(data.load("imagefolder", str(folder), size=32), options, HERE)
    made.epoch = epoch
    found = list(made)
    return torch.cat([x for x, _ in found]), torch.cat([y for _, y in found])


def test_seed_and_epoch_alone_decide_the_images(folder):
    first, labels = images(folder)
    random.seed(5)
    torch.manual_seed(5)
    again, same = images(folder)
    assert torch.equal(first, again) and torch.equal(labels, same)
    for workers in (1, 2):
        assert torch.equal(first, images(folder, workers=workers)[0]), workers
    for other in ({"seed": 1}, {"epoch": 1}):
        assert not torch.equal(first, images(folder, **other)[0])


def test_an_epoch_of_one_seed_is_none_of_another():
    options = [Options("imagefolder", size=32, batch=4, seed=seed) for seed in (0, 1)]
    order = [batches.LoadedBatches([None] * 64, 4, one, HERE).sampler for one in options]
    order[0].set_epoch(1)
    assert list(order[0]) != list(order[1])


def test_drawing_leaves_the_random_states():
    random.seed(1)
    torch.manual_seed(1)
    expected = random.random(), torch.rand(1)
    random.seed(1)
    torch.manual_seed(1)

    class Rolls(torch.utils.data.Dataset):
        def __getitem__(self, index):
            return random.random(), torch.rand(1).item()

    first, second = Drawn(Rolls(), 0), Drawn(Rolls(), 0)
    second.epoch = 1
    assert first[3] == Drawn(Rolls(), 0)[3]
    assert len({first[3], first[4], second[3], Drawn(Rolls(), 1)[3]}) == 4
    assert (random.random(), torch.rand(1)) == expected


def says(capsys, folder, *arguments):
    common = ["--dataset", "imagefolder", "--data", str(folder), "--model", "timm/resnet10t", "--size", "32"]
    code = train.main([*common, "--batch", "4", "--epochs", "1", "--quiet", "--out", str(folder / "run"), *arguments])
    error = capsys.readouterr().err
    assert code == 2
    assert len(error.splitlines()) == 1
    return error


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_damaged_image_is_named(split, workers, folder, capsys):
    path = folder / split / "b" / "3.png"
    path.write_bytes(path.read_bytes()[:300])
    said = says(capsys, folder, "--workers", workers)
    assert f"{path} cannot be read" in said and "take it out" in said


def test_an_image_that_pillow_takes_for_an_attack_is_named(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"0\.png cannot be read"):
        data.load("imagefolder", str(folder), size=32).train[0]


def test_one_class_is_no_data_set(folder, capsys):
    for split in ("train", "val"):
        for path in (folder / split / "b").iterdir():
            path.unlink()
        (folder / split / "b").rmdir()
    assert "two classes or more" in says(capsys, folder)


@pytest.mark.parametrize("name", ["valid", "validation", "test"])
def test_test_images_lie_in_folders_of_several_names(name, folder):
    (folder / "val").rename(folder / name)
    assert len(data.load("imagefolder", str(folder), size=32).test) == 16


def test_no_test_images_names_the_folders(folder, capsys):
    (folder / "val").rename(folder / "held_out")
    assert "valid, validation, test" in says(capsys, folder)


def test_a_run_goes_on_with_the_same_images_alone(folder, capsys):
    common = ["--dataset", "imagefolder", "--data", str(folder), "--model", "timm/resnet10t", "--size", "32"]
    common += ["--batch", "4", "--quiet", "--out", str(folder / "run"), "--resume"]
    assert train.main([*common, "--epochs", "1"]) == 0
    path = folder / "val" / "a" / "3.png"
    before = path.read_bytes()
    imsave(path, np.zeros((48, 40, 3)))
    assert train.main([*common, "--epochs", "2"]) == 2
    assert "a run with other data" in capsys.readouterr().err
    path.write_bytes(before)
    assert train.main([*common, "--epochs", "2"]) == 0


def test_an_empty_image_is_named_before_training(folder, capsys):
    (folder / "val" / "b" / "3.png").write_bytes(b"")
    assert "3.png is empty" in says(capsys, folder)
    assert not (folder / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize(("kind", "mode"), [(np.uint16, "png"), (np.float32, "tiff"), (np.int32, "tiff")])
def test_images_of_more_than_8_bits_are_not_clipped(kind, mode, folder):
    path = folder / "train" / "a" / f"0.{mode}"
    Image.fromarray(np.full((40, 40), 7, kind)).save(path)
    with pytest.raises(DataError, match=r"more than 8 bits"):
        read(str(path))


def test_folders_of_other_programs_are_no_classes(folder):
    for split in ("train", "val"):
        for name in (".ipynb_checkpoints", "__MACOSX"):
            (folder / split / name).mkdir()
    found = data.load("imagefolder", str(folder), size=32)
    assert found.classes == 2 and found.train.class_to_idx == {"a": 0, "b": 1}


def test_a_network_for_another_size_says_so(folder, capsys):
    assert "give another --size" in says(capsys, folder, "--model", "timm/vit_tiny_patch16_224")


def test_all_images_are_tested_in_batches_as_asked(folder):
    options = Options("imagefolder", str(folder), size=32, batch=4)
    found = [labels for _, labels in batches.testing(data.load("imagefolder", str(folder), size=32), options, HERE)]
    assert {len(labels) for labels in found} == {4}
    assert torch.cat(found).tolist() == [0] * 8 + [1] * 8


@pytest.mark.parametrize(
    ("model", "white", "interpolation"),
    [("timm/inception_resnet_v2", (1.0, 1.0, 1.0), "bicubic"), ("resnet20", (2.2489, 2.4286, 2.64), "bilinear")],
)
def test_images_look_as_timms_network_knows_them(model, white, interpolation, folder):
    imsave(folder / "val" / "a" / "0.png", np.ones((48, 40, 3)))
    loaded = loop.data_of(Options("imagefolder", str(folder), size=32, model=model))
    assert loaded.test[0][0][:, 5, 5].tolist() == pytest.approx(white, abs=1e-3)
    for split in (loaded.train, loaded.test):
        assert f"interpolation={interpolation}" in str(split.transform)
        assert str(loaded.test.transform.transforms[-1]) == str(split.transform.transforms[-1])


def test_what_a_loaders_process_said_is_one_line():
    text = "Caught DataError in DataLoader worker process 0.\nOriginal Traceback:\n  File\nmodule.DataError: a: b\nc"
    assert one_line(RuntimeError(text.removesuffix("\nc"))) == "a: b"
    assert one_line(RuntimeError("two\n lines")) == "two lines"
