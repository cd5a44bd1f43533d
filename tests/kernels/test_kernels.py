"""Every fast form of a light cell against the equations, in values and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from regulate import disabled, kernels, regulate
from regulate.kernels import op
from regulate.kernels.cpu import library, native
from regulate.models import cifar_resnet
from regulate.nn.cells import CELLS

FORMS = ("native", "aten")
SHAPES = ((3, 5, 7, 6), (2, 33, 1, 1), (40, 2, 2, 3), (2, 17, 34, 33), (0, 4, 3, 3))
LAYOUTS = (torch.contiguous_format, torch.channels_last)


@pytest.fixture(autouse=True)
def _compiled():
    assert kernels.why_no_native() is None, "these tests need a C++ compiler"


def case(name, shape, layout=torch.contiguous_format, dtype=torch.float32, zeros=False):
    """A cell with random parameters, an input, a state (None for zeros), and gradients of the results."""
    torch.manual_seed(len(name) + sum(shape))
    cell = CELLS[name](shape[1]).to(dtype)
    for parameter in cell.parameters():
        nn.init.normal_(parameter, std=0.5)
    maps = [torch.randn(shape, dtype=dtype).to(memory_format=layout).requires_grad_() for _ in range(5)]
    state = None if zeros else tuple(maps[1:3] if name == "lstm" else maps[1:2])
    return cell, maps[0], state, maps[3:] if name == "lstm" else maps[3:4]


def run(form, cell, x, state, grads, second=False):
    """New state and gradients of input, state and parameters by one form; with `second` those of gradients."""
    wanted = [x, *(state or ()), *cell.parameters()]
    with kernels.use(form):
        new = cell(x, state)
        found = torch.autograd.grad(new, wanted, grads, create_graph=second)
        if second:
            found = torch.autograd.grad(sum(g.sin().sum() for g in found), wanted, allow_unused=True)
        with torch.no_grad():
            plain = cell(x, state)
    return [*new, *found, *plain]


def alike(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        if a is None or b is None:
            assert a is b
            continue
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        scale = b.abs().max().item() if b.numel() else 0.0
        assert torch.allclose(a, b, rtol=0, atol=tolerance * (scale + 1e-3)), (a - b).abs().max() / scale


@pytest.mark.parametrize("zeros", [False, True], ids=["state", "zeros"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "last"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CELLS)
def test_values_and_gradients(name, form, layout, zeros):
    for shape in SHAPES:
        arguments = case(name, shape, layout, zeros=zeros)
        alike(run(form, *arguments), run("reference", *arguments), 1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CELLS)
def test_gradients_of_gradients(name, form):
    for zeros in (False, True):
        arguments = case(name, (2, 3, 4, 5), zeros=zeros)
        alike(run(form, *arguments, second=True), run("reference", *arguments, second=True), 1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CELLS)
def test_gradients_of_gradients_through_two_steps(name, form):
    """The second step's state depends on the parameters as well: nothing may be counted twice."""

    def penalty():
        state = cell(x, cell(x, None))
        (grad,) = torch.autograd.grad(state[0].square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), [x, *cell.parameters()])

    cell, x, *_ = case(name, (2, 3, 4, 5))
    with kernels.use(form):
        found = penalty()
    with kernels.use("reference"):
        alike(found, penalty(), 1e-4)


@pytest.mark.parametrize("name", CELLS)
def test_other_types_of_numbers_take_the_form_for_all(name):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.bfloat16, 0.05)):
        arguments = case(name, (2, 3, 6, 5), dtype=dtype)
        assert kernels.choose.choose(name, *arguments[1:3], weights(arguments[0]), op.GATES[name]) == "aten"
        alike(run("auto", *arguments), run("reference", *arguments), tolerance)


def weights(cell):
    convs = [cell.gates, *([cell.candidate] if hasattr(cell, "candidate") else [])]
    return [part for conv in convs for part in (conv.mix, conv.weight, conv.bias)]


@pytest.mark.parametrize("name", CELLS)
def test_maps_of_any_strides(name):
    cell, x, state, grads = case(name, (2, 6, 8, 5))
    x = x.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_()
    state = tuple(part[:, :, :, :] if k else part.to(memory_format=torch.channels_last) for k, part in enumerate(state))
    wanted = cell, x, tuple(part.detach().requires_grad_() for part in state), [g[..., :] for g in grads]
    alike(run("native", *wanted), run("reference", *wanted), 1e-5)


def test_nan_and_infinity_stay_what_they_are():
    for name in CELLS:
        cell, x, state, _ = case(name, (1, 2, 5, 5))
        for value in (float("nan"), float("inf"), -float("inf"), 1e30):
            bad = x.detach().clone()
            bad[0, 0, 2, 2] = value
            results = []
            for form in ("native", "reference"):
                with kernels.use(form), torch.no_grad():
                    results.append(cell(bad, state))
            for a, b in zip(*results, strict=True):
                assert torch.allclose(a, b, atol=1e-5, equal_nan=True)


def test_the_activations_keep_their_digits():
    """1x1 maps with one tap: an RNN's step is tanh of its input, a GRU's z a sigmoid."""
    cell = CELLS["rnn"](1)
    with torch.no_grad():
        cell.gates.mix.copy_(torch.tensor([1.0, 0.0]).view(1, 2, 1, 1))
        cell.gates.weight.zero_()[0, 0, 1, 1] = 1
        x = torch.cat([torch.logspace(-20, 2, 2001), -torch.logspace(-20, 2, 2001)]).view(-1, 1, 1, 1)
        with kernels.use("native"):
            (h,) = cell(x)
    exact = x.double().tanh()
    assert ((h - exact).abs() / exact.abs()).max() < 1e-6


@pytest.mark.parametrize("name", CELLS)
def test_operator(name):
    """What torch asks of an operator: schema, fake tensors, autograd, and all that under torch.compile's tracing."""
    for layout, zeros in itertools.product(LAYOUTS, (False, True)):
        cell, x, state, _ = case(name, (2, 3, 4, 5), layout, zeros=zeros)
        h, c = (*(state or ()), None, None)[:2]
        stacked = [torch.cat(parts).detach().requires_grad_() for parts in zip(*by_conv(cell), strict=True)]
        torch.library.opcheck(op.light_step, (name, x, h, c, *stacked, torch.float32))


def by_conv(cell):
    found = weights(cell)
    return [found[i : i + 3] for i in range(0, len(found), 3)]


def test_every_parameter_has_a_gradient_after_a_step_from_nothing():
    """DDP would wait for one that is missing."""
    for name, form in itertools.product(CELLS, FORMS):
        cell, x, *_ = case(name, (2, 3, 4, 4))
        with kernels.use(form):
            sum(part.sum() for part in cell(x)).backward()
        assert all(p.grad is not None for p in cell.parameters()), (name, form)


def test_flops_of_the_operator():
    for name in CELLS:
        cell, x, state, grads = case(name, (2, 3, 8, 8))
        with FlopCounterMode(display=False) as readable, kernels.use("reference"):
            cell(x, state)
        with FlopCounterMode(display=False) as counter:
            torch.autograd.backward(cell(x, state), grads)
        forward, backward = counter.get_flop_counts()["Global"].values()
        assert forward == readable.get_total_flops() > 0
        # torch counts the gradient of a depthwise weight as that of a full one; it is as much as the forward.
        assert backward == 2 * forward


def test_flops_of_a_network_are_those_of_the_equations():
    model, x = regulate(cifar_resnet(14), cell="gru").eval(), torch.randn(1, 3, 16, 16)
    found = {}
    for form in ("reference", "auto"):
        with FlopCounterMode(display=False) as counter, kernels.use(form), torch.no_grad():
            model(x)
        found[form] = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter, disabled(model), torch.no_grad():
        model(x)
    assert found["reference"] == found["auto"] > counter.get_total_flops() > 0


def test_results_do_not_depend_on_the_rest_of_the_batch():
    """Images are computed in stacks; one image's result must not tell who was beside it."""
    for layout in LAYOUTS:
        cell, x, state, _ = case("lstm", (37, 3, 5, 4), layout)
        with torch.no_grad():
            whole = cell(x, state)
            for n in (0, 17, 36):
                alone = cell(x[n : n + 1], tuple(part[n : n + 1] for part in state))
                assert all(torch.equal(a[n], b[0]) for a, b in zip(whole, alone, strict=True))


def test_threads_only_share_the_work():
    before = torch.get_num_threads()
    try:
        for shape in ((6, 3, 9, 9), (1, 2, 5, 5)):
            arguments = case("gru", shape)
            found = []
            for threads in (1, 3):
                torch.set_num_threads(threads)
                found.append(run("native", *arguments))
            # Exactly: gradient checkpointing runs a stage again, maybe with another number of threads.
            assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    finally:
        torch.set_num_threads(before)


def test_small_numbers_are_zero_in_the_kernels_alone():
    """They flush what is below the normal range; the thread that called them must not go on doing so."""
    tiny = torch.full((1, 2, 5, 5), 1e-40)
    cell = CELLS["rnn"](2)
    with torch.no_grad():
        cell(tiny)
        kernels.norm_relu(nn.BatchNorm2d(2), tiny)
    assert (torch.tensor([1e-40]) * 1).item() > 0


def test_without_a_library_the_native_form_is_an_error_and_not_a_crash(monkeypatch):
    monkeypatch.setattr(library, "library", lambda: "nobody compiled it")
    with pytest.raises(RuntimeError, match="nobody compiled it"):
        native.forward("rnn", torch.zeros(1, 1, 2, 2), None, None, tuple(p.detach() for p in weights(CELLS["rnn"](1))))
