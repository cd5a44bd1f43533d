"""Private symbols of other libraries: each stands in one file, and each may be missing tomorrow."""

from __future__ import annotations

import importlib
import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.torch_version import TorchVersion
from torch.utils.checkpoint import checkpoint

import regulate
from regulate import BlockCallError, ConvLSTMCell, UnsupportedModelError, disabled, kernels, plan
from regulate._compat import autograd, compiler, lookup, modules, operators
from regulate.kernels import choose
from regulate.models.by_name import load_model

from ..helpers import small, small_block, stir
from ..processes import python

pytestmark = pytest.mark.slow

IMAGES = torch.randn(2, 3, 16, 16)
MAPS = torch.randn(2, 8, 16, 16)

# Who has what by which name, and the question that is answered with yes without it.
SYMBOLS = [
    (torch, "jit", "is_tracing", None),
    (torch, "compiler", "_is_exporting_flag", None),
    (torch, "_C", "_current_graph_task_id", None),
    (torch, "_C", "_current_autograd_node", None),
    (torch, "autograd", "_get_sequence_nr", None),
    (torch._C, "_autograd", "_top_saved_tensors_default_hooks", None),
    (torch.autograd.Variable, "_execution_engine", "queue_callback", None),
    (torch, "_C", "_len_torch_dispatch_stack", "operators_are_watched"),
    (torch, "_C", "_are_functorch_transforms_active", "function_transforms_are_active"),
    (torch.autograd, "forward_ad", "_current_level", "forward_mode_is_active"),
    (torch.utils, "flop_counter", "flop_registry", None),
    (torch.utils, "flop_counter", "register_flop_formula", None),
    (torch.utils, "_pytree", "tree_leaves", None),
    (torch.utils, "_pytree", "tree_map", None),
    (torch.utils, "_python_dispatch", "TorchDispatchMode", None),
    (nn.modules, "batchnorm", "_BatchNorm", None),
    (nn.modules, "batchnorm", "_NormBase", None),
    (nn.modules, "conv", "_ConvNd", None),
    *((nn.modules, "module", name, None) for name in modules._HOOKS_EVERYWHERE),
]
each_symbol = pytest.mark.parametrize(("owner", "part", "name", "question"), SYMBOLS, ids=[one[2] for one in SYMBOLS])
# What compiled code asks.
COMPILED = [
    one for one in SYMBOLS if one[2] in ("is_tracing", "_is_exporting_flag", "tree_leaves", "_global_forward_hooks")
]

# What other files take from it when they are read.
COMPAT = (lookup, autograd, compiler, modules, operators)
VALUES = {"BatchNorm", "NormWithStatistics", "Convolution", "DispatchMode", "SEES_OPERATORS"}


class Without:
    """Something without one of its attributes. torch needs them itself: only this package is not to see it."""

    def __init__(self, whole, name):
        self._whole, self._name = whole, name

    def __getattr__(self, name):
        if name == self._name:
            raise AttributeError(name)
        return getattr(self._whole, name)


@pytest.fixture
def lacking():
    """Reads the file, and those that take classes from it, anew without a symbol; for one test."""
    readers = [module for name, module in sys.modules.items() if name.startswith("regulate.") and _reads(module)]
    kept = [(module, dict(vars(module))) for module in (*COMPAT, *readers)]

    def read(owner, part, name):
        whole = getattr(owner, part)
        assert hasattr(whole, name), "torch has it no more, and the careful way is the only one"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, part, Without(whole, name))
            for module, _ in kept:
                importlib.reload(module)

    yield read
    for module, names in kept:
        vars(module).clear()
        vars(module).update(names)


def _reads(module):
    return module not in COMPAT and bool(VALUES & vars(module).keys())


def network():
    torch.manual_seed(0)
    return small(small_block(), small_block(), small_block()).eval()


def by_block(model, x):
    x = model[0](x)
    for block in model[1]:
        x = checkpoint(block, x, use_reentrant=False)
    return x


def gradients(model, run, switched_off=False):
    model.zero_grad()
    if switched_off:
        with disabled(model):
            loss = run(IMAGES).square().mean()
    else:
        loss = run(IMAGES).square().mean()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def expected():
    """Gradients of a training step, and with regulators switched off."""
    model = stir(regulate.regulate(network())).train()
    return gradients(model, model), gradients(model, model, switched_off=True)


def alike(found, expected):
    return found.keys() == expected.keys() and all(
        torch.allclose(found[key], expected[key], rtol=0, atol=1e-3 * expected[key].abs().max().item())
        for key in expected
    )


@each_symbol
def test_a_network_runs_without_a_symbol(owner, part, name, question, lacking, expected):
    assert question is None or getattr(autograd, question)() is False
    lacking(owner, part, name)
    assert question is None or getattr(autograd, question)() is True
    plain = network()
    model = regulate.regulate(plain)
    with torch.no_grad():
        assert torch.equal(model(IMAGES), plain(IMAGES))
    stir(model).train()
    whole = gradients(model, model)
    # Where nobody sees the operators, fusions have no activation: another network, with the same start.
    assert alike(whole, expected[0]) is operators.SEES_OPERATORS
    assert alike(gradients(model, lambda x: by_block(model, x)), whole)
    with pytest.raises(BlockCallError):
        model[1][1](MAPS)


@each_symbol
def test_a_second_run_of_what_was_switched_off_is_the_same_or_an_error(owner, part, name, question, lacking, expected):
    lacking(owner, part, name)
    model = stir(regulate.regulate(network())).train()
    try:
        found = gradients(model, lambda x: by_block(model, x), switched_off=True)
    except (BlockCallError, torch.utils.checkpoint.CheckpointError):
        assert name in ("_current_autograd_node", "_get_sequence_nr")
    else:
        assert alike(found, expected[1])


@each_symbol
def test_a_plan_finds_the_same_without_a_symbol(owner, part, name, question, lacking):
    before = plan(load_model("resnet18")).to_dict()
    lacking(owner, part, name)
    drawn = plan(load_model("resnet18"))
    found = json.loads(re.sub('"activation": "none"', '"activation": "relu"', json.dumps(drawn.to_dict())))
    unknown = name in ("flop_registry", "TorchDispatchMode")
    assert found == (before | {"base_macs": None} if unknown else before)
    assert ("this torch does not count" in str(drawn)) is unknown


def test_operators_that_do_not_name_their_packet_are_not_counted_as_nothing():
    x = torch.empty(1, 3, 8, 8, device="meta")
    weight = torch.empty(4, 3, 3, 3, device="meta")
    args = (x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    convolution = torch.ops.aten.convolution.default
    result = convolution(*args)
    assert operators.flops(convolution, args, {}, result) == 2 * 4 * 3 * 9 * 64
    assert operators.flops(SimpleNamespace(), args, {}, result) is None


def test_the_package_works_without_torchs_flop_counter():
    done = python(
        "import sys; sys.modules['torch.utils.flop_counter'] = None\n"
        "import torch, regulate\nfrom regulate.models.cifar import cifar_resnet\n"
        "model = regulate.regulate(cifar_resnet(20))\n"
        "model(torch.randn(2, 3, 32, 32)).sum().backward()\n"
        "print(regulate.plan(cifar_resnet(20)).base_macs)"
    )
    assert done.stdout == "None\n", done.stderr


@pytest.mark.parametrize(("owner", "part", "name", "question"), COMPILED, ids=[one[2] for one in COMPILED])
def test_a_network_compiles_without_a_symbol(owner, part, name, question, lacking):
    lacking(owner, part, name)
    model = stir(regulate.regulate(network())).train()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert alike(gradients(model, compiled), gradients(model, model))


# Of what a checkpointed block sets, torch 2.9 keeps nothing for the next one when it compiles both.
TOGETHER = pytest.mark.skipif(TorchVersion(torch.__version__) < "2.14", reason="torch compiles them one by one there")


@pytest.mark.parametrize("known", [pytest.param(True, marks=TOGETHER), False], ids=["with", "without"])
def test_a_compiler_without_the_way_around_its_safety_checks(known, monkeypatch):
    if not known:
        monkeypatch.setattr(compiler, "_ALLOWING", "_allows_no_side_effect")
    # In eval mode: that a norm counts its batches twice is a question of torch's own.
    model = stir(regulate.regulate(network()))
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: by_block(model, x), backend="eager", fullgraph=known)
    assert alike(gradients(model, compiled), gradients(model, model))


def test_a_compiler_that_does_not_know_the_mark(monkeypatch):
    assert kernels.why_no_native() is None
    for function in (choose._native, choose._triton):
        monkeypatch.delattr(function, "_dynamo_marked_constant")
    cell, x = ConvLSTMCell(4), torch.randn(2, 4, 6, 5)
    torch._dynamo.reset()
    assert torch.allclose(torch.compile(cell, backend="eager")(x)[0], cell(x)[0], atol=1e-6)


def test_a_compiled_network_that_holds_the_model_by_another_name(monkeypatch):
    plain = network()
    monkeypatch.setattr(compiler, "_COMPILED", "_another")
    model = regulate.regulate(torch.compile(plain, backend="eager"))
    assert regulate.is_regulated(model)
    with torch.no_grad():
        assert torch.equal(model(IMAGES), plain(IMAGES))
        assert not torch.allclose(stir(model)(IMAGES), plain(IMAGES), rtol=1e-2)


def test_a_node_of_autograd_without_its_number(monkeypatch, expected):
    monkeypatch.setattr(autograd, "_autograd_node", lambda: SimpleNamespace())
    model = stir(regulate.regulate(network())).train()
    assert alike(gradients(model, lambda x: by_block(model, x)), expected[0])


def test_timm_without_its_writer_of_configurations(monkeypatch, tmp_path):
    import timm.models._hub as hub

    model = regulate.regulate(load_model("resnet18"))
    monkeypatch.delattr(hub, "save_config_for_hf")
    with pytest.raises(UnsupportedModelError, match="save_config_for_hf"):
        regulate.save_pretrained(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_module_that_keeps_its_hooks_elsewhere():
    assert all(
        modules.is_watched(SimpleNamespace(**dict.fromkeys(set(modules._HOOKS_ON_OUTPUT) - {name})))
        for name in modules._HOOKS_ON_OUTPUT
    )
