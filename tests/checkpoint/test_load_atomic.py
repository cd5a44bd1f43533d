"""A failed `load(..., inplace=True)` leaves the model as it was: keys, values, classes, hooks, attributes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from regulate import CheckpointError, is_regulated, load, regulate, save
from regulate.models.cifar import cifar_resnet
from regulate.utils.rollback import all_or_nothing

from ..helpers import stir

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
        (interrupted, KeyboardInterrupt, None),
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


def test_a_network_that_was_made_in_inference_mode_is_loaded_in_place(saved):
    with torch.inference_mode():
        model = network()
    with torch.no_grad():
        assert torch.equal(load(model, saved, inplace=True)(X), load(network(), saved)(X))


@pytest.mark.parametrize("part", ["conv1", "layer3.1", "fc"])
def test_what_was_made_in_inference_mode_comes_back_as_well(part, saved):
    """Values of the others had been written when the first of these failed, and its own failed again."""
    model = network()
    with torch.inference_mode():
        for module in model.get_submodule(part).modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(parameter.detach().clone())
    failing_hook(model)
    values = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="own"):
        load(model, saved, inplace=True)
    assert not is_regulated(model)
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())


def test_memory_that_cannot_be_written_is_not_written_where_nothing_changed(saved):
    """As of a file that is mapped for reading: to write there ends the process."""
    model = network()
    model.register_buffer("read", torch.ones(3))
    versions = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.copy_.default and args[0].shape == (3,):
                versions.append(func)
            return func(*args, **(kwargs or {}))

    with pytest.raises(KeyError), Seen(), all_or_nothing(model):
        raise KeyError
    assert not versions


def tied(seed):
    model = network(seed)
    model.layer1[1].conv1.weight = model.layer1[0].conv1.weight
    return model


def test_tied_weights_take_one_value_or_none(saved, tmp_path):
    model = tied(0)
    before = copy.deepcopy(model.state_dict())
    for inplace in (False, True):
        with pytest.raises(CheckpointError, match=r"layer1\.0\.conv1\.weight shares memory with another tensor here"):
            load(model, saved, inplace=inplace)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    save(stir(regulate(tied(3))), tmp_path / "a")
    again = load(model, tmp_path / "a", inplace=True)
    assert again.layer1[1].conv1.weight is again.layer1[0].conv1.weight
    assert torch.equal(again.conv1.weight, tied(3).conv1.weight)
