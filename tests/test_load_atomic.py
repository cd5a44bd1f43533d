"""A failed `load(..., inplace=True)` leaves the model as it was: keys, values, classes, hooks, attributes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from regulate import CheckpointError, is_regulated, load, regulate, save
from regulate.models import cifar_resnet

from .helpers import stir

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cifar_resnet(14).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "a"
    save(stir(regulate(network(7))), path)
    return path


def picture(model):
    """Everything that must come back: objects by identity, containers by what they hold, tensors by value."""
    objects = []
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            held = copy.copy(value) if isinstance(value, dict | list | set) else None
            objects.append((name, type(module), key, id(value), held))
    tensors = {key: (id(value), value.requires_grad) for key, value in model.state_dict(keep_vars=True).items()}
    return objects, list(model.state_dict()), tensors


class Failing(nn.Linear):
    """A classifier whose own code fails while it is loaded."""

    def _load_from_state_dict(self, *args, **kwargs):
        self.touched = True
        self.register_buffer("late", torch.zeros(1))
        raise RuntimeError("no such classifier")


def failing_hook(model):
    def fail(module, keys):
        module.seen = True
        raise ValueError("a hook of the user's own")

    model.layer2.register_load_state_dict_post_hook(fail)


def failing_part(model):
    model.fc.__class__ = Failing


def expanded(model):
    model.fc.bias = nn.Parameter(model.fc.bias.detach()[:1].expand(10))


def interrupted(model):
    def stop(module, keys):
        raise KeyboardInterrupt

    model.register_load_state_dict_post_hook(stop)


@pytest.mark.parametrize(
    ("prepare", "error", "says"),
    [
        (failing_hook, ValueError, "a hook of the user's own"),
        (failing_part, CheckpointError, "as it was: no such classifier"),
        (expanded, CheckpointError, "as it was: fc.bias is an expanded view here.*other values in the file"),
        (interrupted, KeyboardInterrupt, ""),
    ],
)
def test_a_failed_load_changes_nothing(prepare, error, says, saved):
    model = network()
    prepare(model)
    calls = []
    handle = model.layer1.register_forward_hook(lambda *_: calls.append(1))
    before, values, expected = picture(model), copy.deepcopy(model.state_dict()), model(X)
    with pytest.raises(error, match=says):
        load(model, saved, inplace=True)
    assert picture(model) == before
    assert not is_regulated(model)
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(X), expected)
    handle.remove()
    calls.clear()
    model(X)
    assert not calls


def test_a_network_without_memory_comes_back_as_well(saved):
    with torch.device("meta"):
        model = cifar_resnet(14)
    failing_hook(model)
    before = picture(model)
    with pytest.raises(ValueError, match="own"):
        load(model, saved, inplace=True)
    assert picture(model) == before


def test_a_view_that_follows_its_base_is_loaded(tmp_path):
    def build(seed):
        model = network(seed)
        model.scale = nn.Parameter(torch.full((1,), float(seed)))
        model.register_buffer("wide", model.scale.data.expand(4))
        return model

    save(regulate(build(3)), tmp_path / "a")
    model = load(build(4), tmp_path / "a", inplace=True)
    assert model.wide.tolist() == [3.0] * 4
    assert model.wide.data_ptr() == model.scale.data_ptr()
