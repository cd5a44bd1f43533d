"""The fast norm with ReLU and the fast 1x1 mix of the fusion, against torch's."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regulate import kernels
from regulate.nn.layers import BatchNormReLU2d, Mix2d
from regulate.nn.regulator import Fusion
from regulate.schema.values import Norm

from ..helpers import Watch

LAYOUTS = (torch.contiguous_format, torch.channels_last)
SHAPES = ((3, 5, 7, 6), (9, 33, 1, 1), (4, 17, 5, 9), (2, 20, 90, 61))


def norm(channels, **options):
    made = BatchNormReLU2d(channels, **options)
    with torch.no_grad():
        made.weight.uniform_(-1, 2)
        made.bias.normal_()
        made.running_mean.normal_() if made.track_running_stats else None
    return made


def images(shape, layout, mean=3.0):
    return (torch.randn(shape) + mean).to(memory_format=layout).requires_grad_()


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "last"])
@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"track_running_stats": False}, {"eps": 0.1}], ids=str)
def test_norm_and_relu_in_training(options, layout):
    for shape in SHAPES:
        ours = norm(shape[1], **options)
        # In double: what torch's own rounding is off counts as much as ours.
        theirs = copy.deepcopy(ours).double()
        x = images(shape, layout)
        wide = x.detach().double().requires_grad_()
        for _ in range(2):
            y, expected = ours(x), theirs(wide)
            assert torch.allclose(y.double(), expected, atol=1e-5)
            assert type(y.grad_fn).__name__ == "_NormReLUBackward"
        weight = torch.randn(shape) * (expected > 1e-4)  # where rounding cannot move it across zero
        found = torch.autograd.grad(y, [x, ours.weight, ours.bias], weight)
        right = torch.autograd.grad(expected, [wide, theirs.weight, theirs.bias], weight.double())
        for a, b in zip(found, right, strict=True):
            assert torch.allclose(a.double(), b, atol=1e-4 * (b.abs().max().item() + 1))
        for (key, a), (_, b) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
            assert torch.allclose(a.double(), b.double(), atol=1e-5), key


def test_statistics_that_are_not_tracked_for_a_while_stay():
    """As semi-supervised training switches them off for the pass of a perturbed batch."""
    ours = norm(4)
    before = [buffer.clone() for buffer in ours.buffers()]
    ours.track_running_stats = False
    assert type(ours(images((2, 4, 3, 3), LAYOUTS[0])).grad_fn).__name__ == "_NormReLUBackward"
    assert all(map(torch.equal, ours.buffers(), before))
    ours.track_running_stats = True
    ours(images((2, 4, 3, 3), LAYOUTS[0]))
    assert not any(map(torch.equal, ours.buffers(), before))


@pytest.mark.parametrize("negative", [False, True], ids=["rectified", "negative"])
@pytest.mark.parametrize("other", LAYOUTS, ids=["beside nchw", "beside last"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "last"])
def test_what_a_relu_would_cut_from_the_map_before_is_added(layout, other, negative):
    for shape in SHAPES:
        x, before, ours = images(shape, layout), images(shape, other, 0.5).detach(), norm(shape[1])
        before = (before if negative else before.relu()).requires_grad_()
        theirs = copy.deepcopy(ours).double()
        given = [t.detach().double().requires_grad_() for t in (x, before)]
        y, expected = ours(x, before), theirs(given[0]) - F.relu(-given[1])
        assert torch.allclose(y.double(), expected, atol=1e-5)
        assert (y.grad_fn.saved_tensors[-1] is not None) == negative, "nothing is kept that is not needed"
        weight = torch.randn(shape) * (theirs(given[0]) > 1e-4)
        found = torch.autograd.grad(y, [x, before], weight, allow_unused=True)
        right = torch.autograd.grad(expected, given, weight.double())
        assert (found[1] is None) != negative
        for a, b in zip(found if negative else found[:1], right, strict=False):
            assert torch.allclose(a.double(), b, atol=1e-4 * (b.abs().max().item() + 1))


@pytest.mark.parametrize("form", ["native", "reference"])
def test_zero_is_no_value_that_a_relu_would_cut(form):
    """Half of a rectified map is zero: a gradient there would be one that ReLU does not give."""
    with kernels.use(form):
        x, before = images((2, 3, 4, 4), torch.contiguous_format), torch.zeros(2, 3, 4, 4)
        before[1, 2, 3, 1] = -1
        norm(3)(x, before.requires_grad_()).sum().backward()
    assert torch.equal(before.grad, -before.detach())


def test_a_map_of_another_kind_beside_takes_torchs_operators():
    part, x = norm(3), images((2, 3, 4, 4), torch.contiguous_format)
    for before in (torch.randn(2, 3, 4, 4).double(), torch.randn(1, 3, 4, 4)):
        y = part(x, before)
        assert type(y.grad_fn).__name__ != "_NormReLUBackward"
        assert y.dtype == x.dtype
        assert torch.allclose(y - part(x), before.clamp(max=0).float().expand(2, -1, -1, -1), atol=1e-5)


def test_gradients_of_gradients_of_the_norm():
    def penalty(form):
        with kernels.use(form):
            # Twice, so that what it is applied to depends on its weights: nothing may be counted twice.
            y = part(part(x), x)
            grads = torch.autograd.grad(y.square().sum(), [x, part.weight, part.bias], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), [x, part.weight, part.bias])

    part, x = norm(5), images((3, 5, 4, 6), torch.contiguous_format, 0.0)
    for a, b in zip(penalty("native"), penalty("reference"), strict=True):
        assert torch.allclose(a, b, atol=1e-3 * b.abs().max().item())


def test_moments_keep_their_digits():
    """A mean a thousand times the deviation: E[x^2] - E[x]^2 would have nothing left."""
    for layout in LAYOUTS:
        x = (torch.randn(6, 18, 70, 70) + 1000).to(memory_format=layout)
        part = BatchNormReLU2d(18, momentum=1.0)
        part(x)
        wide = x.double()
        assert torch.allclose(part.running_mean.double(), wide.mean((0, 2, 3)), rtol=1e-7)
        assert torch.allclose(part.running_var.double(), wide.var((0, 2, 3)), rtol=1e-5)


def test_nan_comes_through():
    x = torch.randn(2, 3, 4, 4)
    x[0, 1, 2, 2] = float("nan")
    part = norm(3)
    assert part(x)[:, 1].isnan().all()
    with torch.no_grad():
        assert part.eval()(torch.full((1, 3, 2, 2), float("nan"))).isnan().all()


@pytest.mark.parametrize("how", ["other strides", "part of a larger one"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "last"])
def test_tensors_that_were_saved_may_come_back_in_another_layout(how, layout):
    """As hooks bring them back that keep them elsewhere: the library reads addresses."""

    def back(t):
        if how == "part of a larger one":
            room = t.new_zeros(*t.shape[:-1], t.shape[-1] + 3)
            room[..., :-3] = t
            return room[..., :-3]
        order = list(range(t.dim()))[::-1]
        return t.permute(order).contiguous().permute(order)

    part, x = norm(5), images((3, 5, 7, 6), layout)
    found = []
    for unpack in (lambda t: t, back):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            y = part(x)
        found.append(torch.autograd.grad(y.sin().sum(), [x, part.weight, part.bias]))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_the_mix_is_a_convolution_where_products_are_rounded_more():
    x, h, weight = torch.randn(2, 4, 5, 5), torch.randn(2, 3, 5, 5), torch.randn(4, 7, 1, 1)
    assert kernels.mixed(x, h, weight) is not None
    torch.set_float32_matmul_precision("medium")
    try:
        assert kernels.mixed(x, h, weight) is None
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_single_value_is_torchs_error():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm(3)(torch.randn(1, 3, 1, 1))


@pytest.mark.parametrize("width", [7, 33], ids=["narrow", "wide"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "last"])
def test_the_mix_is_the_convolution_of_the_concatenation(layout, width):
    for bias in (None, torch.randn(width)):
        x, h = (torch.randn(3, c, 5, 4).to(memory_format=layout).requires_grad_() for c in (width, 6))
        weight = torch.randn(width, width + 6, 1, 1, requires_grad=True)
        found, expected = kernels.mixed(x, h, weight, bias), F.conv2d(torch.cat([x, h], 1), weight, bias)
        assert found.is_contiguous(memory_format=layout)
        assert torch.allclose(found, expected, atol=1e-5)
        grads = (torch.autograd.grad(y.sin().sum(), [x, h, weight]) for y in (found, expected))
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*grads, strict=True))


def test_gradients_of_gradients_of_the_mix():
    def penalty(form):
        with kernels.use(form):
            # h is made of the weight as well: nothing may be counted twice.
            h = fusion.mix.weight.sum() * x
            grads = torch.autograd.grad(fusion.mix(x, h).sin().sum(), [x, fusion.mix.weight], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), [x, fusion.mix.weight])

    for layout in LAYOUTS:
        fusion, x = Fusion(4, 4, Norm("none"), normalise=False), images((2, 4, 3, 5), layout, 0.0)
        for a, b in zip(penalty("native"), penalty("reference"), strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


@pytest.mark.parametrize(
    ("channels", "operator"),
    [(4, "aten.bmm.default"), (32, "aten.convolution_backward.default")],
    ids=["narrow", "wide"],
)
def test_the_mix_gives_only_the_gradients_that_are_asked_for(channels, operator):
    x, h, weight = torch.randn(2, channels, 3, 5), torch.randn(2, 3, 3, 5), torch.randn(channels, channels + 3, 1, 1)
    # That of h is one product, and that of the weight has two halves.
    for asked, times in ((h, 1), (weight, 2)):
        tensors = [t.clone().requires_grad_(t is asked) for t in (x, h, weight)]
        y = kernels.mixed(*tensors)
        with Watch() as seen:
            y.sum().backward()
        assert seen.names.count(operator) == times
        assert [t.grad is not None for t in tensors] == [t is asked for t in (x, h, weight)]
        if asked is h:
            assert torch.allclose(tensors[1].grad, weight[:, channels:].sum(0).expand_as(h), atol=1e-4)


def test_the_mix_of_nothing():
    for layout in LAYOUTS:
        x = torch.zeros(0, 4, 3, 5).to(memory_format=layout)
        assert kernels.mixed(x, x, torch.ones(6, 8, 1, 1)).shape == (0, 6, 3, 5)


def test_what_the_library_cannot_read_goes_to_torch():
    """It sees addresses: another type, a stride or a size would be read as something else, or beyond the end."""
    x = torch.randn(2, 3, 4, 4)
    assert kernels.mixed(x, x, torch.randn(3, 7, 1, 1)) is None
    assert kernels.mixed(x, x, torch.randn(3, 6, 3, 3)) is None
    assert kernels.mixed(x, x, torch.randn(3, 6, 1, 1), torch.randn(3).double()) is None
    for mode in (True, False):
        strided, narrow = norm(3).train(mode), norm(3).train(mode)
        strided.weight = nn.Parameter(torch.rand(6)[::2])
        strided.running_var = torch.rand(6)[::2]
        with torch.no_grad():
            with kernels.use("reference"):
                expected = copy.deepcopy(strided)(x)
            assert torch.allclose(strided(x), expected, atol=1e-5)
        narrow.running_mean = narrow.running_mean.double()
        with torch.no_grad(), pytest.raises(RuntimeError, match="type"):
            narrow(x)


def test_a_compiled_concatenation_is_laid_out_as_its_convolution_reads_it():
    """Inductor runs convolutions in channels last on the CPU, and lays a concatenation out as it was traced."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    mix, x, h = Mix2d(8, 5, 1), torch.randn(2, 5, 4, 6), torch.randn(2, 3, 4, 6)
    with torch.no_grad():
        y = torch.compile(mix, backend=backend, fullgraph=True)(x, h)
        assert torch.allclose(y, mix(x, h), atol=1e-6)
    assert y.is_contiguous(), "the network's results keep their layout"
    (joined,) = (node for graph in graphs for node in graph.graph.nodes if node.target is torch.cat)
    assert joined.meta["example_value"].shape == (2, 4, 6, 8)
