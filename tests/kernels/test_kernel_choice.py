"""Which form of a step runs: where a fast one must not, and how it is chosen."""

from __future__ import annotations

import asyncio
import contextvars
import threading

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.utils import parametrize, prune

from regulate import ConvGRUCell, ConvLSTMCell, kernels, regulate
from regulate._compat import compiler
from regulate.kernels import aten, op
from regulate.kernels.cpu import native
from regulate.nn.layers import BatchNormReLU2d

from ..helpers import Watch, network
from ..processes import python

X = torch.randn(2, 4, 6, 5)


@pytest.fixture
def fast(monkeypatch):
    """The fast forms that ran, in turn."""
    ran = []

    def watched(name, run):
        def inner(*args, **kwargs):
            ran.append(name)
            return run(*args, **kwargs)

        return inner

    monkeypatch.setattr(native, "forward", watched("native", native.forward))
    monkeypatch.setattr(aten, "step", watched("aten", aten.step))
    return ran


def test_the_choice(fast):
    cell = ConvLSTMCell(4)
    cell(X)
    with kernels.use("aten"):
        cell(X)
        with kernels.use("reference"):
            cell(X)
    with kernels.use("native"):
        cell.double()(X.double())  # which the native form cannot, and the readable one takes over
    cell(X.double())
    assert fast == ["native", "aten", "aten"]
    assert kernels.setting() == "auto"


def test_an_unknown_form_is_an_error():
    with (
        pytest.raises(ValueError, match="one of auto, native, triton, aten, reference; got 'fast'"),
        kernels.use("fast"),
    ):
        pass


def test_tasks_that_take_turns_each_have_their_own(fast):
    cell, order = ConvLSTMCell(4), []

    async def run(form, steps):
        with kernels.use(form):
            for _ in range(steps):
                await asyncio.sleep(0)
                cell(X)
                order.append(kernels.setting())

    async def both():
        # The first to begin is the first to end.
        await asyncio.gather(run("aten", 2), run("reference", 4), run("native", 3))
        assert kernels.setting() == "auto"

    asyncio.run(both())
    assert order == ["aten", "reference", "native"] * 2 + ["reference", "native", "reference"]
    assert fast == ["aten", "native", "aten", "native", "native"]
    assert kernels.setting() == "auto"


def test_generators_that_take_turns_leave_nothing_behind():
    def run(form):
        with kernels.use(form):
            yield

    first, second, third = run("aten"), run("reference"), run("aten")
    for one in (first, second, third):
        next(one)
    first.close()
    assert kernels.setting() == "aten"  # the third one's
    third.close()
    assert kernels.setting() == "reference"
    second.close()
    assert kernels.setting() == "auto"


def test_a_block_that_ends_elsewhere_is_no_error():
    """A generator that is dropped may be closed in another task's context."""
    one = kernels.use("aten")
    contextvars.copy_context().run(one.__enter__)
    assert kernels.setting() == "auto"
    with kernels.use("reference"):
        one.__exit__(None, None, None)
        assert kernels.setting() == "reference"


def test_another_thread_is_not_concerned():
    inside, seen, done = threading.Event(), threading.Event(), threading.Event()
    found = []

    def other():
        inside.wait(10)
        found.append(kernels.setting())
        with kernels.use("reference"):
            seen.set()
            done.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    with kernels.use("aten"):
        inside.set()
        seen.wait(10)
        found.append(kernels.setting())
    found.append(kernels.setting())
    done.set()
    thread.join()
    assert found == ["auto", "aten", "auto"]


def test_compiled_code_follows_it_from_outside_and_inside():
    calls = []

    def backend(graph, inputs):
        calls.append("light_step" in graph.code)
        return graph

    def inside(x):
        with kernels.use("reference"):
            h, _ = cell(x)
        return h + cell(x)[0]

    cell = ConvLSTMCell(4)
    expected = cell(X)[0]
    outside = torch.compile(cell, backend=backend, fullgraph=True)
    outside(X)
    with kernels.use("reference"):
        assert torch.allclose(outside(X)[0], expected, atol=1e-6)
    outside(X)
    assert calls == ([True, False] if compiler.COMPILER_READS_CONTEXT else [True])
    calls.clear()
    assert torch.allclose(torch.compile(inside, backend=backend, fullgraph=True)(X), 2 * expected, atol=1e-6)
    assert calls == [True]  # one of the two steps
    assert kernels.setting() == "auto"


def hooked(cell):
    cell.gates.register_forward_hook(lambda module, args, out: tuple(gate + 1 for gate in out))


def patched(cell):
    forward = cell.gates.forward
    cell.gates.forward = lambda x, h: tuple(gate + 1 for gate in forward(x, h))


def replaced(cell):
    class Other(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.mix, self.weight, self.bias = inner, inner.mix, inner.weight, inner.bias

        def forward(self, x, h):
            return tuple(gate + 1 for gate in self.inner(x, h))

    cell.gates = Other(cell.gates)


@pytest.mark.parametrize("change", [hooked, patched, replaced])
def test_what_somebody_does_to_a_gate_convolution_is_not_bypassed(change, fast):
    cell = ConvLSTMCell(4)
    (before, _), _ = cell(X), fast.clear()
    change(cell)
    after, _ = cell(X)
    assert not fast
    assert not torch.allclose(before, after, atol=1e-3)


def test_pruning_and_parametrizations_count(fast):
    cell, other = ConvLSTMCell(4), ConvLSTMCell(4)
    prune.l1_unstructured(cell.gates, "weight", 0.5)
    parametrize.register_parametrization(other.gates, "weight", Doubled())
    for one in (cell, other):
        with kernels.use("reference"):
            expected = one(X)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(one(X), expected, strict=True))


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_a_dense_kernel_and_other_numbers_of_axes_take_the_readable_form(fast):
    ConvLSTMCell(4, "dense")(X)
    ConvLSTMCell(4, dims=1)(X[..., 0])
    ConvLSTMCell(4, dims=3)(X[..., None])
    assert not fast


def test_states_of_another_shape_are_for_torch_to_judge(fast):
    cell = ConvGRUCell(4)
    cell(X, (X[:1],))
    with pytest.raises(RuntimeError):
        cell(X, (X[:, :3],))
    assert not fast


@pytest.mark.parametrize("form", ["auto", "native", "aten"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_on_the_cpu(fast, form, dtype):
    cell, x = ConvLSTMCell(4), X.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        with kernels.use("reference"):
            expected, _ = cell(x)
        with kernels.use(form):
            h, _ = cell(x)
            assert not fast
            with torch.autocast("cpu", enabled=False):
                exact, _ = cell(X)
    assert h.dtype == dtype and torch.equal(h, expected)
    assert len(fast) == 1 and not torch.equal(exact, h.float())


def test_function_transforms_and_forward_mode(fast):
    cells = [ConvLSTMCell(4) for _ in range(3)]
    parameters, buffers = stack_module_state(cells)
    many, _ = vmap(lambda p, b: functional_call(cells[0], (p, b), (X,)))(parameters, buffers)
    with forward_ad.dual_level():
        h, _ = cells[0](forward_ad.make_dual(X, torch.ones_like(X)))
        assert forward_ad.unpack_dual(h).tangent is not None
    assert not fast
    assert torch.allclose(many[1], cells[1](X)[0], atol=1e-6)


def test_traced_and_exported_programs_run_without_this_package():
    model = regulate(network("resnet18"))
    image = torch.randn(1, 3, 64, 64)
    exported = torch.export.export(model, (image,))
    assert "light_step" not in exported.graph_module.code
    assert "light_step" not in str(torch.jit.trace(model, image).inlined_graph)


def test_who_looks_at_operators_sees_them():
    """A FLOP counter or a policy of checkpointing; the short ways would pass them by."""
    part, cell, x = BatchNormReLU2d(4), ConvLSTMCell(4), X.requires_grad_()
    with Watch() as seen:
        y = part(cell(x)[0])
        y.sum().backward()
    assert "regulate.light_step.default" in seen.names
    assert "regulate.light_step_backward.default" in seen.names
    assert any("batch_norm" in name for name in seen.names)


def test_compiled_networks_call_the_operator():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compile(ConvLSTMCell(4), backend=backend, fullgraph=True)(X)
    nodes = [node for graph in graphs for node in graph.graph.nodes]
    (step,) = (node for node in nodes if node.target is op.light_step._opoverload)
    # As inductor has its maps on the CPU; else it would copy them for the operator, and its results back.
    assert step.args[1].kwargs == {"memory_format": torch.channels_last}
    assert step.meta["example_value"][0].is_contiguous(memory_format=torch.channels_last)


def test_to_import_it_does_not_import_the_compiler():
    """Which takes a second, and many never compile."""
    assert python("import sys, regulate; print('torch._dynamo' in sys.modules)").stdout == "False\n"
