"""The C++ sees addresses: what is no plain float map of the right size does not get there, or is an error."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from regulate import ConvGRUCell, ConvLSTMCell, ConvRNNCell, kernels
from regulate.nn.layers import BatchNormReLU2d

CELLS = {"rnn": ConvRNNCell, "gru": ConvGRUCell, "lstm": ConvLSTMCell}
FORMS = ("native", "aten")
MAP = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
OTHER = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(1))


def cell_of(name, channels=3):
    torch.manual_seed(0)
    return CELLS[name](channels)


def by(form, work):
    with kernels.use(form):
        return work()


@pytest.mark.parametrize("eps", [1, True, torch.tensor(1e-3), np.float32(1e-3), 1e-3])
def test_an_epsilon_may_be_any_number(eps):
    norm = BatchNormReLU2d(3, eps=eps)
    torch.testing.assert_close(
        norm(MAP), torch.relu(nn.functional.batch_norm(MAP, None, None, None, None, True, 0.1, float(eps)))
    )


def test_what_is_wrong_with_an_epsilon_is_for_torch_to_say():
    plain = nn.BatchNorm2d(3, eps=0)
    for norm in (plain, BatchNormReLU2d(3, eps=0)):
        with pytest.raises(ValueError, match="eps must be positive"):
            norm(MAP)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(2, 3, 0, 5), (2, 3, 5, 0), (2, 3, 0, 0)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_an_image_without_pixels_is_refused_by_torch(name, form, shape, layout):
    x = torch.zeros(shape).contiguous(memory_format=layout)
    for state in (None, tuple(torch.zeros(shape) for _ in range(2 if name == "lstm" else 1))):
        with pytest.raises(RuntimeError):
            by(form, lambda state=state: cell_of(name)(x, state))


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("form", FORMS)
def test_a_batch_without_images_is_one(name, form):
    out = by(form, lambda: cell_of(name)(MAP[:0], None))
    assert out[0].shape == (0, 3, 5, 7)


def gradient(name, form, of):
    cell, x = cell_of(name), MAP.clone().requires_grad_()

    def work():
        of(cell(x, None)[0])
        return [x.grad, *(p.grad for p in cell.parameters())]

    return by(form, work)


WRAPPED = {
    "a subclass": lambda out: (out * TwoTensor(OTHER, OTHER)).sum().backward(),
    "negated when read": lambda out: out.backward(torch._neg_view(OTHER)),
    "zeros that nobody wrote": lambda out: out.backward(torch._efficientzerotensor(out.shape)),
}


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", WRAPPED)
def test_gradients_of_any_kind_count(name, form, kind):
    for found, expected in zip(
        gradient(name, form, WRAPPED[kind]), gradient(name, "reference", WRAPPED[kind]), strict=True
    ):
        torch.testing.assert_close(torch.as_tensor(getattr(found, "a", found)), getattr(expected, "a", expected))


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_norms_gradients_of_any_kind_count(kind):
    def work():
        norm, x = BatchNormReLU2d(3), MAP.clone().requires_grad_()
        WRAPPED[kind](norm(x))
        return [x.grad, norm.weight.grad, norm.bias.grad]

    for found, expected in zip(by("native", work), by("reference", work), strict=True):
        torch.testing.assert_close(getattr(found, "a", found), getattr(expected, "a", expected))


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "map_", [torch._neg_view(MAP), torch._efficientzerotensor(MAP.shape)], ids=["negated", "zeros"]
)
def test_maps_that_are_not_as_they_lie_in_memory(name, form, map_):
    cell = cell_of(name)
    with torch.no_grad():
        for x, h in ((map_, OTHER), (OTHER, map_)):
            state = (h, OTHER) if name == "lstm" else (h,)
            found, expected = (by(one, lambda x=x, state=state: cell(x, state)[0]) for one in (form, "reference"))
            torch.testing.assert_close(found, expected)
        found, expected = (by(one, lambda: BatchNormReLU2d(3)(map_)) for one in (form, "reference"))
        torch.testing.assert_close(found, expected)


SHRUNK = {
    "one row": lambda p: p.data[:1].clone(),
    "none": lambda p: torch.empty(0),
    "half": lambda p: p.data.half(),
    "double": lambda p: p.data.double(),
}


@pytest.mark.parametrize("name", ["rnn", "lstm"])
@pytest.mark.parametrize("kind", SHRUNK)
def test_weights_that_were_exchanged_before_the_backward_pass_are_an_error(name, kind):
    """As sharding libraries do, behind autograd's back."""
    cell = cell_of(name, 64)
    out = by("native", lambda: cell(torch.randn(2, 64, 5, 7), None)[0])
    for parameter in cell.parameters():
        parameter.data = SHRUNK[kind](parameter)
    with pytest.raises((RuntimeError, TypeError), match=r"until the backward pass has run|plain float32 tensors"):
        out.sum().backward()


def test_a_norms_weights_that_were_exchanged_are_an_error():
    norm = BatchNormReLU2d(512)
    out = by("native", lambda: norm(torch.randn(2, 512, 5, 7)))
    norm.weight.data = norm.bias.data = torch.ones(1)
    with pytest.raises(RuntimeError, match="exchanged for others before its backward pass"):
        out.sum().backward()


@pytest.mark.parametrize("name", CELLS)
def test_saved_tensors_of_another_type_are_an_error(name):
    cell, x = cell_of(name), torch.randn(2, 3, 50, 70, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.half(), lambda t: t):
        out = by("native", lambda: cell(x, None)[0])
    with pytest.raises(TypeError, match="plain float32 tensors"):
        out.sum().backward()


def operator(cell="lstm", dtype=torch.float32, h=(2, 3, 5, 7), rows=12, x=MAP):
    weights = (torch.zeros(rows, 2, 1, 1), torch.zeros(rows, 1, 3, 3), torch.zeros(rows))
    maps = (x, None if h is None else torch.zeros(h), None)
    given = [None if t is None else t.to(dtype) for t in (*maps, *weights)]
    return torch.ops.regulate.light_step(cell, *given, dtype)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"dtype": torch.float16}, TypeError),
        ({"dtype": torch.float64}, TypeError),
        ({"h": (1, 1, 1, 1)}, RuntimeError),
        ({"rows": 3}, RuntimeError),
        ({"cell": "gru"}, RuntimeError),
    ],
)
def test_the_operator_by_itself_checks_what_it_is_given(options, error):
    assert operator()[0].shape == MAP.shape
    with pytest.raises(error, match=r"plain float32 tensors|has maps of that shape"):
        operator(**options)


@pytest.mark.parametrize("shape", [(2, 3, 0, 5), (2, 3, 5, 0)])
def test_the_operator_by_itself_takes_images_without_pixels(shape):
    assert operator(x=torch.zeros(shape), h=None)[0].shape == shape


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", [-1, 0x7FC00000, 0x7F800001])
def test_every_nan_stays_one(form, bits):
    nan = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    lstm, gru = cell_of("lstm"), cell_of("gru")
    with torch.no_grad():
        lstm.gates.bias[3:6] = nan  # of the forget gate
        assert by(form, lambda: lstm(MAP, (OTHER, OTHER)))[0].isnan().all()
        x = MAP.clone()
        x[0, 0, 2, 2] = nan
        found, expected = (by(one, lambda: gru(x, (OTHER,))[0].isnan()) for one in (form, "reference"))
        assert torch.equal(found, expected) and expected.any()


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("form", FORMS)
def test_batches_of_gradients_are_gradients(name, form):
    cell, x, directions = cell_of(name), MAP.clone().requires_grad_(), torch.stack([OTHER, -2 * OTHER, MAP])

    def work():
        out = cell(x, None)[0]
        return torch.autograd.grad(out, x, directions, is_grads_batched=True)[0]

    torch.testing.assert_close(by(form, work), by("reference", work))
