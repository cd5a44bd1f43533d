"""What `save` refuses to store, and calls of `save` and `load` in the wrong order."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from regulate import (
    AlreadyRegulatedError,
    CheckpointError,
    ConvGRUCell,
    NotRegulatedError,
    UnsupportedModelError,
    load,
    regulate,
    save,
)
from regulate.models.by_name import load_model

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("also", "only", "error"), [(["nosuch"], True, ValueError), (["fc"], False, ValueError), ("fc", True, TypeError)]
)
def test_what_goes_along_must_exist(also, only, error, tmp_path):
    with pytest.raises(error, match="also"):
        save(regulate(load_model("resnet18")), tmp_path / "a", also=also, regulator_only=only)
    assert not list(tmp_path.iterdir())


def test_the_wrong_call_order(tmp_path):
    model = regulate(load_model("resnet18"))
    with pytest.raises(NotRegulatedError):
        save(load_model("resnet18"), tmp_path / "a")
    save(model, tmp_path / "a")
    with pytest.raises(AlreadyRegulatedError):
        load(model, tmp_path / "a")
    with pytest.raises(UnsupportedModelError):
        load(model.state_dict(), tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="no file"):
        load(load_model("resnet18"), tmp_path / "nosuch")
    with pytest.raises(FileNotFoundError, match="no folder"):
        save(model, tmp_path / "nosuch" / "a")


def test_what_cannot_be_stored_says_so(tmp_path):
    class Cell(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.mix = nn.Conv2d(channels, channels, 1)

        def forward(self, x, state):
            return (self.mix(x),)

    Cell.__name__ = "lstm"
    with pytest.raises(CheckpointError, match="cell of your own"):
        save(regulate(load_model("resnet18"), Cell), tmp_path / "a")
    with pytest.raises(CheckpointError, match="cell of your own"):
        save(regulate(load_model("resnet18"), ConvGRUCell), tmp_path / "a")
    with torch.device("meta"):
        bare = load_model("resnet18")
    with pytest.raises(CheckpointError, match="meta device"):
        save(regulate(bare), tmp_path / "a")
    pair = nn.Sequential(regulate(load_model("resnet18")), regulate(load_model("resnet18"), "gru"))
    with pytest.raises(CheckpointError, match="different"):
        save(pair, tmp_path / "a")
    odd = regulate(load_model("resnet18"))
    odd.register_buffer("extra", torch.ones(2).as_subclass(type("Sharded", (torch.Tensor,), {})))
    with pytest.raises(CheckpointError, match="extra is a Sharded; gather"):
        save(odd, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def without_container(model):
    model.layer1 = nn.Sequential(*model.layer1)


def without_any_container(model):
    for name in ("layer1", "layer2", "layer3"):
        setattr(model, name, nn.Sequential(*getattr(model, name)))


def without_a_block(model):
    del model.layer1[1]


def with_another_block(model):
    model.layer1[1] = load_model("cifar/14").layer1[1]


def swapped(model):
    model.layer1[0], model.layer1[1] = model.layer1[1], model.layer1[0]


def wrapped(model):
    model.layer1[1] = nn.Sequential(model.layer1[1])


def inserted(model):
    model.layer1.insert(0, nn.Identity())


CHANGES = [without_container, without_any_container, without_a_block, with_another_block, swapped, wrapped, inserted]


@pytest.mark.parametrize("change", CHANGES)
def test_a_stage_that_was_taken_apart_is_not_stored(change, tmp_path):
    """The file could not say how the network is regulated again."""
    model = regulate(load_model("cifar/14"))
    change(model)
    with pytest.raises(CheckpointError, match="of stage layer1 a block, or the module that runs its blocks, was repl"):
        save(model, tmp_path / "a")
    assert not list(tmp_path.iterdir())
