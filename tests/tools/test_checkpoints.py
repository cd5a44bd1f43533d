"""The checkpoints of training scripts as `--weights`: timm's, those of compiled models, and hostile ones."""

from __future__ import annotations

import argparse
import os

import pytest
import torch
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn

from regulate import CheckpointError, RegulatorConfig, regulate
from regulate.models.cifar import cifar_resnet
from regulate.tools.open_model import open_model

GRU = RegulatorConfig("gru")


@pytest.fixture
def model():
    return regulate(cifar_resnet(14), config=GRU)


def opened(path):
    return open_model("cifar/14", weights=str(path), config=GRU).state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_of_timms_training_script_with_its_arguments(model, tmp_path):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    arguments = argparse.Namespace(model="regulated_resnet18", model_kwargs={"cell": "gru"}, lr=0.1)
    CheckpointSaver(model, optimizer, arguments, checkpoint_dir=str(tmp_path)).save_checkpoint(0, metric=1.0)
    assert same(opened(tmp_path / "last.pth.tar"), model.state_dict())


def test_the_average_comes_before_the_weights(model, tmp_path):
    average = ModelEmaV3(model)
    nn.init.zeros_(model.fc.bias)
    CheckpointSaver(
        model, torch.optim.SGD(model.parameters()), model_ema=average, checkpoint_dir=str(tmp_path)
    ).save_checkpoint(0)
    assert same(opened(tmp_path / "last.pth.tar"), average.module.state_dict())
    assert not same(opened(tmp_path / "last.pth.tar"), model.state_dict())


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_of_a_compiled_model(prefix, model, tmp_path):
    torch.save({f"{prefix}{key}": value for key, value in model.state_dict().items()}, tmp_path / "a.pth")
    assert same(opened(tmp_path / "a.pth"), model.state_dict())


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("around", [lambda hostile: hostile, lambda hostile: argparse.Namespace(model=hostile)])
def test_code_in_a_file_is_refused_and_not_run(around, model, tmp_path):
    torch.save({"state_dict": model.state_dict(), "args": around(Hostile(str(tmp_path / "ran")))}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="holds no weights that can be read"):
        opened(tmp_path / "a.pth")
    assert not (tmp_path / "ran").exists()


def test_a_namespace_is_no_longer_let_through_afterwards(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "a.pth")
    opened(tmp_path / "a.pth")
    assert argparse.Namespace not in torch.serialization.get_safe_globals()
