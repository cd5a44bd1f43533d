"""Modes, dtypes, flags and random state are as they were; the same seed gives the same weights."""

from __future__ import annotations

import pytest
import torch
from timm import create_model
from torch.nn.modules import module as module_api
from torch.utils._python_dispatch import TorchDispatchMode

from regulate import ConvGRUCell, calibrate, plan, regulate, regulator_state_dict
from regulate.models.by_name import load_model
from regulate.models.cifar import cifar_resnet

from ..helpers import network
from ..processes import python


@pytest.mark.parametrize("call", [plan, regulate, lambda m: regulate(m, inplace=True)])
def test_plan_and_regulate_leave_everything_as_found(call):
    model = create_model("resnet18").train()
    model.layer2.eval()
    model.layer1[0].bn1.eval()
    model.conv1.weight.requires_grad_(False)
    modes = {name: m.training for name, m in model.named_modules()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    rng = torch.get_rng_state()
    result = call(model)
    assert torch.equal(torch.get_rng_state(), rng)
    for one in (model, result) if isinstance(result, torch.nn.Module) else (model,):
        names = dict(one.named_modules())
        assert all(names[name].training == mode for name, mode in modes.items())
        parameters = dict(one.named_parameters())
        assert all(parameters[name].requires_grad == flag for name, flag in flags.items())
        assert all(torch.equal(one.state_dict()[key], value) for key, value in state.items())


def test_new_parts_take_the_mode_of_their_block():
    model = create_model("resnet18").train()
    model.layer2.eval()
    regulated = regulate(model)
    assert regulated.layer1[0].regulator.mix_norm.training
    assert not regulated.layer2[0].regulator.mix_norm.training


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_new_parts_take_the_dtype(dtype):
    model = network("torchvision/resnet18")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        exact = model(x)
        model = model.to(dtype)
        own = model(x.to(dtype))
        regulated = regulate(model)
        found = regulated(x.to(dtype))
    assert {p.dtype for p in regulated.parameters()} == {dtype}
    assert found.dtype == dtype

    def apart(a):
        return ((a.double() - exact.double()).norm() / exact.double().norm()).item()

    # In half types no further from float32 than the original itself, but for one more rounding.
    assert apart(found) <= 2 * apart(own) + 1e-6


def test_the_same_seed_gives_the_same_weights_and_another_does_not():
    model = load_model("resnet18")
    a, b, c = (regulator_state_dict(regulate(model, seed=seed)) for seed in (1, 1, 2))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["layer1.0.regulator.cell.gates.mix"], c["layer1.0.regulator.cell.gates.mix"])


def test_no_seed_is_the_initial_seed_whatever_was_drawn_since():
    model = load_model("resnet18")
    torch.manual_seed(5)
    a = regulator_state_dict(regulate(model))
    torch.randn(100)
    b = regulator_state_dict(regulate(model))
    assert all(torch.equal(a[key], b[key]) for key in a)
    torch.manual_seed(6)
    c = regulator_state_dict(regulate(model))
    assert not torch.equal(a["layer1.0.regulator.cell.gates.mix"], c["layer1.0.regulator.cell.gates.mix"])


def test_a_stage_has_the_same_weights_whether_or_not_others_are_regulated():
    model = load_model("resnet18")
    whole, one = (regulator_state_dict(regulate(model, seed=1, stages=stages)) for stages in (None, ["layer3"]))
    assert set(one) == {key for key in whole if key.startswith("layer3")}
    assert all(torch.equal(whole[key], value) for key, value in one.items())


@pytest.mark.parametrize("kind", ["forward_pre_hook", "forward_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_hooks_of_all_modules_do_not_see_how_a_network_is_planned(kind):
    seen = []
    handle = getattr(module_api, f"register_module_{kind}")(lambda *given: seen.append(given))
    try:
        regulated = regulate(cifar_resnet(14), ConvGRUCell)
        assert not seen
        regulated.layer1[0].regulator.mix(torch.randn(2, 32, 8, 8)).sum().backward()
        assert seen, "the hook is there as before"
    finally:
        handle.remove()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("cell", ["lstm", ConvGRUCell])
def test_in_inference_mode_the_new_parameters_can_be_trained_all_the_same(cell, inplace):
    model, x = cifar_resnet(14), torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        model = regulate(model, cell, inplace=inplace)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_calibrate_leaves_backbone_and_modes():
    model = regulate(network("torchvision/resnet18")).train()
    model.layer1.eval()
    modes = {name: m.training for name, m in model.named_modules()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    calibrate(model, [(torch.randn(2, 3, 64, 64), "label"), [torch.randn(3, 3, 64, 64)]])
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, state[key])}
    assert changed
    assert all("regulator.mix_norm" in key for key in changed)
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_stages_of_one_width_start_differently():
    state = regulator_state_dict(regulate(load_model("dla34"), seed=1))
    mixes = [value for key, value in state.items() if key.endswith("regulator.cell.gates.mix")]
    assert not torch.equal(mixes[0][:64], mixes[1][:64])


@pytest.mark.parametrize("name", ["torchvision/resnet18", "resnet18"])
def test_additions_in_place_stay_in_place(name):
    """`out += identity` costs a map less than `out + identity`, which torch.fx would make of it."""

    class Ops(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            ran[func] = ran.get(func, 0) + 1
            return func(*args, **(kwargs or {}))

    counts = []
    model = load_model(name).eval()
    for one in (model, regulate(model)):
        ran = {}
        with torch.no_grad(), Ops():
            one(torch.randn(1, 3, 64, 64))
        counts.append((ran[torch.ops.aten.add_.Tensor], ran.get(torch.ops.aten.add.Tensor, 0)))
    # In torch's operators, which are seen here, each of the 8 fusions adds what its ReLU would cut: a map of its own.
    assert counts == [(8, 0), (8, 8)]


def test_seeds_and_stages_share_no_numbers():
    """As trials with seeds 0, 1, 2 would, if a stage's seed were the sum of the trial's and its own number."""
    cells = [
        [block.regulator.cell.gates.mix.flatten() for block in (model.layer1[0], model.layer2[0])]
        for model in (regulate(cifar_resnet(14), seed=seed, init="random") for seed in range(3))
    ]
    drawn = [set(cell[:100].tolist()) for pair in cells for cell in pair]
    assert len(set.union(*drawn)) == sum(map(len, drawn))


COMPILER = """
import sys, torch
from regulate import plan
from regulate.models import cifar_resnet

assert "torch._dynamo" not in sys.modules
model = cifar_resnet(14)

class Asking(type(model)):
    def forward(self, x):
        return super().forward(x) if not torch._dynamo.is_compiling() else x

model.__class__ = Asking
plan(model)
ask = torch.compile(lambda x: x + 1 if isinstance(x, torch.Tensor) else x, fullgraph=True, backend="eager")
print(ask(torch.ones(1)))
"""


@pytest.mark.slow
def test_a_plan_leaves_the_compiler_whole():
    """Code that is traced may be the first to import it, and it keeps Python's built-in functions by identity."""
    done = python(COMPILER)
    assert done.stdout == "tensor([2.])\n", done.stderr
