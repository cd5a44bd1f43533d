"""Private symbols of other libraries: each stands in one file, and each may be missing tomorrow."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import regulate
from regulate import ConvLSTMCell, _compat, kernels
from regulate.kernels import choose

from .helpers import network

IMAGES = torch.randn(2, 3, 64, 64)
KERNELS = Path(regulate.__file__).parent / "kernels"

# Who has what by which name, and the question that is answered with yes without it.
SYMBOLS = [
    (torch, "jit", "is_tracing", None),
    (torch, "_C", "_current_graph_task_id", None),
    (torch, "_C", "_current_autograd_node", None),
    (torch, "autograd", "_get_sequence_nr", None),
    (torch._C, "_autograd", "_top_saved_tensors_default_hooks", None),
    (torch.autograd.Variable, "_execution_engine", "queue_callback", None),
    (torch, "_C", "_len_torch_dispatch_stack", _compat.operators_are_watched.__name__),
    (torch, "_C", "_are_functorch_transforms_active", _compat.function_transforms_are_active.__name__),
    (torch.autograd, "forward_ad", "_current_level", _compat.forward_mode_is_active.__name__),
    *((nn.modules, "module", name, _compat.has_hooks.__name__) for name in _compat._HOOKS_EVERYWHERE),
]


class Without:
    """Something without one of its attributes. torch needs them itself: only this package is not to see it."""

    def __init__(self, whole, name):
        self._whole, self._name = whole, name

    def __getattr__(self, name):
        if name == self._name:
            raise AttributeError(name)
        return getattr(self._whole, name)


@pytest.fixture
def lacking(monkeypatch):
    """Reads the file anew, without a symbol; for one test."""

    def read(owner, part, name):
        whole = getattr(owner, part)
        assert hasattr(whole, name), "torch has it no more, and the careful way is the only one"
        with monkeypatch.context() as patch:
            patch.setattr(owner, part, Without(whole, name))
            importlib.reload(_compat)

    yield read
    importlib.reload(_compat)


def run():
    """Outputs of a regulated network in eval mode, and gradients of a training step."""
    torch.manual_seed(0)
    model = regulate.regulate(network("resnet18")).eval()
    with torch.no_grad():
        y = model(IMAGES)
    model.train()(IMAGES).square().mean().backward()
    return [y, *(p.grad for p in regulate.regulator_parameters(model))]


@pytest.fixture(scope="module")
def expected():
    return run()


def alike(found, expected):
    pairs = zip(found, expected, strict=True)
    return all(torch.allclose(a, b, rtol=0, atol=1e-3 * b.abs().max().item()) for a, b in pairs)


@pytest.mark.parametrize(("owner", "part", "name", "question"), SYMBOLS, ids=[name for *_, name, _ in SYMBOLS])
def test_a_network_runs_without_a_symbol(owner, part, name, question, lacking, expected):
    asked = [nn.Identity()] if question == "has_hooks" else []
    assert question is None or getattr(_compat, question)(*asked) is False
    lacking(owner, part, name)
    assert question is None or getattr(_compat, question)(*asked) is True
    assert alike(run(), expected)


def test_a_module_that_keeps_its_hooks_elsewhere():
    assert all(
        _compat.has_hooks(SimpleNamespace(**dict.fromkeys(set(_compat._HOOKS) - {name}))) for name in _compat._HOOKS
    )


def test_a_compiler_that_does_not_know_the_mark(monkeypatch):
    assert kernels.why_no_native() is None
    for function in (choose._native, choose._triton):
        monkeypatch.delattr(function, "_dynamo_marked_constant")
    cell, x = ConvLSTMCell(4), torch.randn(2, 4, 6, 5)
    torch._dynamo.reset()
    assert torch.allclose(torch.compile(cell, backend="eager")(x)[0], cell(x)[0], atol=1e-6)


def test_the_kernels_use_no_other_private_symbol():
    found = set()
    for path in KERNELS.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                found.add(f"{path.name}: {ast.unparse(node)}")
            if isinstance(node, ast.ImportFrom) and not node.level:
                found |= {f"{path.name}: {name.name}" for name in node.names if name.name.startswith("_")}
    assert {one for one in found if ": self._" not in one} == set()
