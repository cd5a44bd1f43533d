"""save and load: exact round trips, whole and regulators alone."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from regulate import (
    CheckpointError,
    freeze_backbone,
    is_regulated,
    load,
    regulate,
    regulator_state_dict,
    save,
    unregulate,
)
from regulate.models.by_name import load_model
from regulate.models.cifar import CifarBlock, CifarResNet

from ..helpers import network, stir, stirred
from .states import same

pytestmark = pytest.mark.slow

X = torch.randn(2, 3, 64, 64)
NAMES = ["resnet18", "torchvision/resnet50", "legacy_xception", "dpn48b", "resnet50_gn", "resnetv2_18"]


@pytest.mark.parametrize("only", [False, True])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.use("save, load, switch", "save, load: bit-exact, whole and regulators alone")
def test_a_round_trip_is_exact(name, only, tmp_path):
    base = network(name)
    model = stirred(base, cell="gru" if only else "lstm", fusion="residual" if only else "paper")
    save(model, tmp_path / "a.safetensors", regulator_only=only)
    again = load(base if only else load_model(name).eval(), tmp_path / "a.safetensors")
    assert same(model, again)
    with torch.no_grad():
        assert torch.equal(model(X), again(X))
    assert is_regulated(again)
    assert not is_regulated(base)


def test_regulators_alone_are_exactly_the_new_tensors(tmp_path):
    model = stirred(network("resnet18"))
    save(model, tmp_path / "a", regulator_only=True)
    stored, new = load_file(tmp_path / "a"), regulator_state_dict(model)
    assert stored.keys() == new.keys()
    assert all(torch.equal(stored[key], new[key]) for key in new)


@pytest.mark.parametrize("only", [False, True])
def test_blocks_under_the_checkpoint_wrapper_of_torch(only, tmp_path):
    """Which takes its own name out of the keys of the state dict."""
    plain = network("cifar/14")
    model = stirred(plain)
    before = regulator_state_dict(model)
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, CifarBlock))
    assert regulator_state_dict(model).keys() == before.keys()
    save(model, tmp_path / "a", regulator_only=only)
    assert same(load(plain, tmp_path / "a"), model)


class TwoNames(nn.Module):
    """As U-Nets name the stages of their backbone."""

    def __init__(self):
        super().__init__()
        self.base = network("cifar/14")
        self.first = self.base.layer1

    def forward(self, x):
        return self.base(x)


@pytest.mark.parametrize("only", [False, True])
def test_stages_with_two_names(only, tmp_path):
    plain = TwoNames().eval()
    model = stirred(plain)
    save(model, tmp_path / "a", regulator_only=only)
    assert same(load(plain, tmp_path / "a"), model)
    assert regulator_state_dict(model).keys() == {key for key in model.state_dict() if ".regulator." in key}


class OwnStateDict(CifarResNet):
    def state_dict(self):
        return dict(super().state_dict())


@pytest.mark.parametrize("only", [False, True])
def test_a_state_dict_of_the_users_own_takes_no_arguments(only, tmp_path):
    plain = network("cifar/14")
    plain.__class__ = OwnStateDict
    model = stirred(plain)
    save(model, tmp_path / "a", regulator_only=only)
    assert same(load(plain, tmp_path / "a"), model)
    assert len(regulator_state_dict(model)) == 75


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_and_memory_formats(dtype, tmp_path):
    model = stirred(network("resnet18")).to(dtype).to(memory_format=torch.channels_last)
    save(model, tmp_path / "a")
    again = load(network("resnet18").to(dtype).to(memory_format=torch.channels_last), tmp_path / "a")
    assert same(model, again)
    assert again.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(CheckpointError, match="dtype"):
        load(network("resnet18"), tmp_path / "a")


def test_wrapped_models_are_saved_and_loaded_inside_their_wrapper(tmp_path):
    model = stirred(network("resnet18"))
    save(nn.DataParallel(torch.compile(model, backend="eager")), tmp_path / "a")
    assert same(load(load_model("resnet18"), tmp_path / "a"), model)
    wrapper = nn.DataParallel(load_model("resnet18"))
    assert load(wrapper, tmp_path / "a", inplace=True) is wrapper
    assert same(wrapper.module, model)


def test_tensors_that_share_memory(tmp_path):
    model = stirred(network("resnet18"))
    model.layer1[1].conv1.weight = model.layer1[0].conv1.weight
    save(model, tmp_path / "a")
    assert same(load(load_model("resnet18"), tmp_path / "a"), model)


def test_a_network_without_memory_takes_the_tensors_of_the_file(tmp_path):
    model = stirred(network("resnet18"))
    save(model, tmp_path / "a")
    with torch.device("meta"):
        bare = load_model("resnet18").eval()
    again = load(bare, tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(again(X), model(X))
    save(model, tmp_path / "b", regulator_only=True)
    with pytest.raises(CheckpointError, match="meta device"):
        load(bare, tmp_path / "b")


def test_a_new_classifier_goes_with_the_regulators(tmp_path):
    def build():
        torch.manual_seed(4)
        model = load_model("torchvision/resnet18").eval()
        model.fc = nn.Linear(512, 5)
        return model

    model = freeze_backbone(stir(regulate(build())))
    with torch.no_grad():
        model.fc.weight.add_(1)
    save(model, tmp_path / "a", regulator_only=True, also=["fc"])
    assert same(load(build(), tmp_path / "a"), model)
    other = build()
    other.fc = nn.Linear(512, 6)
    with pytest.raises(CheckpointError, match=r"fc.weight: float32 \(5, 512\) in the file, float32 \(6, 512\)"):
        load(other, tmp_path / "a")
    save(model, tmp_path / "b", regulator_only=True)
    with pytest.raises(CheckpointError, match=r"1 of 102 tensors differ, first fc.weight"):
        load(build(), tmp_path / "b")


def test_a_loaded_network_goes_on(tmp_path):
    save(stirred(network("resnet18")), tmp_path / "a")
    model = load(load_model("resnet18"), tmp_path / "a").train()
    model(X).square().mean().backward()
    assert model.layer1[0].regulator.mix.weight.grad.any()
    save(model, tmp_path / "a")
    assert not is_regulated(unregulate(model))
