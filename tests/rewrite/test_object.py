"""The object stays itself: hooks, blocks, copies, pickles, checkpointing, threads."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
from timm import create_model
from torch import nn

from regulate import RegulatorConfig, is_regulated, regulate, regulator_parameters, unregulate
from regulate.nn.identity_init import is_settled

from ..helpers import network, stir, stirred

pytestmark = pytest.mark.slow

X = torch.randn(2, 3, 64, 64)


def test_blocks_can_be_indexed_counted_and_iterated():
    model = network("resnet18")
    regulated = regulate(model)
    assert type(regulated) is type(model)
    assert len(regulated.layer4) == 2
    assert isinstance(regulated.layer4[-1], type(model.layer4[-1]))
    assert list(regulated.layer1) == list(regulated.layer1.children()) == list(regulated.layer1[:])
    assert [type(b).__name__ for b in regulated.layer1] == [type(b).__name__ for b in model.layer1]


def test_inplace_keeps_every_object():
    model = network("resnet18")
    objects = {name: module for name, module in model.named_modules()}
    tensors = {name: p for name, p in model.named_parameters()}
    assert regulate(model, inplace=True) is model
    assert all(model.get_submodule(name) is module for name, module in objects.items())
    assert all(model.get_parameter(name) is p for name, p in tensors.items())


def test_a_copy_leaves_the_input_alone():
    model = network("resnet18")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    regulated = regulate(model)
    assert not is_regulated(model)
    assert is_regulated(regulated)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    with torch.no_grad():
        regulated.conv1.weight.zero_()
    assert model.conv1.weight.any()


def watch(model, paths):
    """Forward hooks that keep (input, output), as Grad-CAM sets them."""
    seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {path: [] for path in paths}
    for path in paths:

        def keep(module, args, out, path=path):
            seen[path].append((args[0].clone(), out.clone()))

        model.get_submodule(path).register_forward_hook(keep)
    return seen


@pytest.mark.parametrize("name", ["torchvision/resnet50", "resnet50", "seresnext26d_32x4d", "legacy_seresnet18"])
def test_hooks_on_stage_block_and_inner_layer_see_what_they_saw(name):
    model = network(name)
    paths = ["layer1", "layer4.1", "layer4.0", "layer2.0.conv1", "layer3.0.conv2", "layer2.0.downsample"]
    regulated = regulate(model)
    before, after = watch(model, paths), watch(regulated, paths)
    with torch.no_grad():
        model(X), regulated(X)
    for path in paths:
        assert len(before[path]) == len(after[path]) == 1, path
        for a, b in zip(before[path][0], after[path][0], strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-4), path


def test_hooks_set_before_go_on_and_may_change_the_output():
    model = network("resnet18")
    calls = []
    model.layer2.register_forward_hook(lambda m, args, out: calls.append("stage"))
    model.layer2[1].register_forward_hook(lambda m, args, out: out * 0)
    model.layer2[0].conv1.register_forward_pre_hook(lambda m, args: calls.append("conv"))
    regulated = regulate(model)
    x = torch.randn(2, 64, 16, 16)
    assert not regulated.layer2(x).any()
    assert calls == ["conv", "stage"]


def test_backward_hooks_on_a_block_see_its_output_gradient():
    model = stirred(network("resnet18"))
    seen = []
    model.layer4[-1].register_full_backward_hook(lambda m, grad_in, grad_out: seen.append(grad_out[0]))
    out = model(X)
    out.sum().backward()
    assert len(seen) == 1
    assert seen[0].shape == (2, 512, 2, 2)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "copy"])
def test_copies_compute_the_same(how):
    model = stirred(network("resnet50"))
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "copy":
        other = copy.copy(model)
        other.layer1 = copy.copy(model.layer1)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    with torch.no_grad():
        assert torch.equal(model(X), other(X))
    assert is_regulated(other)
    assert type(other.layer1[0]) is type(model.layer1[0])
    if how != "copy":
        with torch.no_grad():
            other.layer1[0].conv1.weight.zero_()
            other.layer1[0].regulator.mix.weight.zero_()
        assert model.layer1[0].conv1.weight.any()
        assert model.layer1[0].regulator.mix.weight.any()


def test_a_copy_of_a_copy_and_a_pickle_of_a_pickle():
    model = stirred(network("resnet18"))
    other = pickle.loads(pickle.dumps(copy.deepcopy(pickle.loads(pickle.dumps(model)))))
    with torch.no_grad():
        assert torch.equal(model(X), other(X))


def gradients(model, x):
    model.zero_grad()
    model(x).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", ["resnet18", "seresnet50"])
def test_timms_gradient_checkpointing_gives_equal_gradients_and_is_on(name):
    model = stirred(network(name))
    expected = gradients(model, X)
    runs = []
    model.layer1[0].regulator.cell.register_forward_hook(lambda *_: runs.append(1))
    plain = gradients(model, X)
    assert len(runs) == len(model.layer1)
    runs.clear()
    model.set_grad_checkpointing(True)
    checkpointed = gradients(model, X)
    assert len(runs) == 2 * len(model.layer1), "the blocks were not run again in the backward pass"
    for name in expected:
        assert torch.equal(expected[name], plain[name])
        assert torch.allclose(expected[name], checkpointed[name], rtol=1e-5, atol=1e-7), name


def test_nothing_is_remembered_between_calls():
    model = stirred(network("resnet18"))
    with torch.no_grad():
        first = model(X)
        model(torch.randn(1, 3, 97, 131))
        assert torch.equal(first, model(X))


def test_threads_do_not_mix():
    model = stirred(network("resnet18"))
    inputs = [torch.randn(1, 3, 64, 64) for _ in range(6)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    found: dict[int, torch.Tensor] = {}

    def work(index):
        with torch.no_grad():
            for _ in range(5):
                found[index] = model(inputs[index])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(expected[i], found[i]) for i in range(len(inputs)))


@pytest.mark.parametrize("way", ["direct", "pickled"])
@pytest.mark.use("save, load, switch", "unregulate: keys, attributes, hooks, types")
def test_unregulate_gives_the_original_back(way):
    model = network("resnet50")
    model.layer1.register_forward_hook(lambda *_: None)
    keys, types = list(model.state_dict()), [type(m) for m in model.modules()]
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    regulated = stir(regulate(model))
    if way == "pickled":
        regulated = copy.deepcopy(regulated)
        regulated.layer1._forward_hooks.clear()
        regulated = pickle.loads(pickle.dumps(regulated))
    tensors = {name: p for name, p in regulated.named_parameters() if ".regulator." not in name}
    back = unregulate(regulated)
    assert back is regulated
    assert not is_regulated(back)
    assert list(back.state_dict()) == keys
    assert [type(m) for m in back.modules()] == types
    assert {name: set(vars(m)) for name, m in back.named_modules()} == attributes
    assert all(back.get_parameter(name) is p for name, p in tensors.items())
    with torch.no_grad():
        assert torch.equal(back(X), model(X))
    assert is_regulated(regulate(back))


def test_training_and_dropout_still_switch():
    model = create_model("resnet18", drop_path_rate=0.5, drop_block_rate=0.2, drop_rate=0.3)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1 and not p.any():
                p.fill_(0.5)
    regulated = regulate(model)
    x = torch.randn(1, 3, 224, 224)  # older versions of timm divide by zero where the map is smaller than the block
    regulated.train()
    assert not torch.equal(regulated(x), regulated(x))
    regulated.eval()
    assert torch.equal(regulated(x), regulated(x))


class FunctionalDropout(nn.Module):
    """A block as Wide ResNets are often written: it asks for `self.training` between its layers."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = (nn.BatchNorm2d(8) for _ in range(2))

    def forward(self, x):
        y = self.conv1(torch.relu(self.bn1(x)))
        y = nn.functional.dropout(y, 0.5, self.training)
        return x + self.conv2(torch.relu(self.bn2(y)))


@pytest.mark.parametrize("traced_in", ["train", "eval"])
def test_a_training_flag_inside_a_block_is_not_frozen(traced_in):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(FunctionalDropout(), FunctionalDropout()))
    regulated = regulate(model.train(traced_in == "train"))
    regulated = pickle.loads(pickle.dumps(regulated))
    x = torch.randn(2, 3, 16, 16)
    regulated.train()
    assert not torch.equal(regulated(x), regulated(x))
    regulated.eval()
    assert torch.equal(regulated(x), regulated(x))


def test_a_cell_of_the_users_own():
    class Sum(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.mix = nn.Conv2d(channels, channels, 1)

        def forward(self, x, state):
            h, steps = state or (torch.zeros_like(x), torch.zeros(()))
            return h + self.mix(x), steps + 1

    model = network("resnet18")
    regulated = regulate(model, Sum)
    with torch.no_grad():
        assert torch.allclose(regulated(X), model(X), rtol=1e-4, atol=1e-4)
    counts = []
    regulated.layer3[1].regulator.register_forward_hook(lambda m, args, out: counts.append(out[1][1].item()))
    stir(regulated)(X).sum().backward()
    assert counts == [2.0]
    assert regulated.layer2[0].regulator.cell.mix.weight.grad.any()
    with pytest.raises(TypeError, match="callable"):
        RegulatorConfig(cell=Sum).to_dict()
    assert pickle.loads(pickle.dumps(RegulatorConfig(cell="gru"))) == RegulatorConfig(cell="gru")


def test_timms_init_weights_overwrites_the_start():
    model = regulate(create_model("resnet18"))
    assert is_settled(model.layer1[0].regulator)
    model.init_weights()
    assert not is_settled(model.layer1[0].regulator)


def test_an_optimizer_built_before_takes_the_new_parameters_as_a_group():
    model = network("resnet18")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regulate(model, inplace=True)
    optimizer.add_param_group({"params": list(regulator_parameters(model))})
    known = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in known} == {id(p) for p in model.parameters()}
