"""What the card of a network says of its data comes back from a folder, each of it."""

from __future__ import annotations

import pytest
from timm import create_model

from regulate import from_pretrained, regulate, save_pretrained

pytestmark = pytest.mark.slow

DATA = {
    "input_size": (3, 96, 64),
    "interpolation": "bilinear",
    "crop_pct": 0.5,
    "crop_mode": "border",
    "mean": (0.1, 0.2, 0.3),
    "std": (0.4, 0.5, 0.6),
    "num_classes": 7,
    "label_names": [f"class {number}" for number in range(7)],
}


@pytest.fixture(scope="module")
def cards(tmp_path_factory):
    """Of the network as timm builds it by default, as it was saved, and as it came back."""
    folder = tmp_path_factory.mktemp("card")
    model = regulate(create_model("resnet18", num_classes=7, pretrained_cfg_overlay=DATA))
    save_pretrained(model, folder)
    return [one.pretrained_cfg for one in (create_model("resnet18"), model, from_pretrained(folder))]


@pytest.mark.parametrize("name", DATA)
def test_the_data_of_a_card_come_back(name, cards):
    usual, saved, again = (card.get(name) for card in cards)
    assert saved == DATA[name] != usual
    assert (tuple(again) if isinstance(saved, tuple) else again) == saved


def test_a_card_that_stays_is_told_of_where_it_lacks_the_metrics(tmp_path):
    model = regulate(create_model("resnet18"))
    save_pretrained(model, tmp_path, metrics={"top-1": 1.0})
    card = (tmp_path / "README.md").read_text()
    with pytest.warns(UserWarning, match=r"README\.md is there and stays as it is, without these metrics"):
        save_pretrained(model, tmp_path, metrics={"top-1": 99.0})
    save_pretrained(model, tmp_path)
    assert (tmp_path / "README.md").read_text() == card and "1.0" in card
