"""Networks with state, results and inputs of their own: they come out right, or are refused for the true reason."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regulate import NoBlocksError, plan, regulate
from regulate.rewrite.lookup import regulated_blocks

from .odd_networks import Listed, Plain, X, assert_same, of, outputs


def test_a_convolution_that_is_known_by_another_path():
    class Aliased(nn.Module):
        def __init__(self):
            super().__init__()
            body = of(Plain)
            self.special = body[1][0].conv2
            self.body = body

        def forward(self, x):
            return self.body(x)

    model = Aliased()
    assert plan(model).blocks[0].write == "body.1.0.conv2"
    assert_same(model, regulate(model, fusion="residual"))


CALLS, CACHE = 0, {}
MEAN = torch.tensor([0.4, 0.5, 0.4]).view(1, 3, 1, 1)


class Global(Plain):
    seen = 0

    def middle(self, y):
        global CALLS
        CALLS += 1
        type(self).seen += 1
        if "ramp" not in CACHE:
            CACHE["ramp"] = torch.linspace(0, 1, 8).view(1, 8, 1, 1)
        return y * CACHE["ramp"]


def test_what_a_plan_runs_leaves_nothing_behind():
    model, held = of(Global), (CALLS, Global.seen, dict(CACHE))
    model[1][0].rng = np.random.default_rng(0)
    before = pickle.dumps(model)
    regulated = regulate(model)
    assert (CALLS, Global.seen, CACHE) == held
    assert pickle.dumps(model) == before
    assert torch.allclose(outputs(model), outputs(regulated), rtol=1e-4, atol=1e-5)


def test_a_constant_map_of_the_codes():
    class Normalised(Listed):
        def forward(self, x):
            return super().forward(x - MEAN)

    model = Normalised()
    assert len(plan(model).blocks) == 3
    assert_same(model, regulate(model, fusion="residual"))


RAMP = torch.linspace(0.5, 1.5, 8).view(1, 8, 1, 1)


@pytest.mark.parametrize(
    "late",
    [
        lambda y: y * torch.tensor([0.5] * 8).view(1, 8, 1, 1),
        lambda y: y * torch.arange(1.0, 9.0).reshape(1, -1, 1, 1),
        lambda y: torch.minimum(y, RAMP * 6),
        lambda y: y + torch.cat((RAMP, -RAMP)).sum(0),
        lambda y: y[:, torch.argsort(-RAMP.flatten())],
    ],
    ids=["tensor", "arange", "outside the block", "several", "indices"],
)
def test_what_makes_the_codes_constants_casts_no_doubt_on_a_trace(late):
    """A trace holds such a tensor as it came out, the code makes it in each run: no operator of the map's."""

    class Scaled(Plain):
        def forward(self, x):
            return self.act(x + late(self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))))

    model = of(Scaled)
    assert [block.activation for block in plan(model).blocks] == ["relu", "relu"]
    assert_same(model, regulate(model, fusion="residual"))
    assert torch.allclose(outputs(model), outputs(regulate(model)), rtol=1e-4, atol=1e-5)


def test_a_constant_that_is_drawn_does():
    """Here from a generator that nobody looks for, so that only the operator tells."""
    held = [torch.Generator()]

    class Drawn(Plain):
        def forward(self, x):
            scale = torch.rand(1, 8, 1, 1, generator=held[0])
            return self.act(x + scale * self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))))

    model = of(Drawn)
    assert [block.activation for block in plan(model).blocks] == ["none", "none"]


LIKE = {
    "type_as": lambda y, x: x + y.type_as(x),
    "to": lambda y, x: x + y.to(x),
    "view_as": lambda y, x: x + y.view_as(x),
    "new_tensor": lambda y, x: x + y * x.new_tensor([0.1]),
    "new_ones": lambda y, x: x + y * F.dropout(x.new_ones((x.shape[0], 1, 1, 1)), 0.1, False),
    "zeros_like": lambda y, x: x + (torch.zeros_like(x) + y),
    "expand_as": lambda y, x: x + (y + torch.zeros(1).expand_as(x)),
    "keywords": lambda y, x: torch.add(input=x, other=y),
    "one keyword": lambda y, x: torch.add(x, other=y),
}


@pytest.mark.parametrize("add", LIKE.values(), ids=LIKE)
def test_what_takes_a_maps_shape_or_type_alone_is_no_way_of_its_numbers(add):
    class Added(Plain):
        def forward(self, x):
            return self.act(add(self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))), x))

    model = of(Added)
    assert len(plan(model).blocks) == 2
    assert_same(model, regulate(model, fusion="residual"))


class Maps(nn.Module):
    def forward(self, x):
        return torch.vmap(torch.abs)(x)


def test_the_advice_for_code_that_torch_fx_cannot_follow_works():
    class Written(Plain):
        def middle(self, y):
            return torch.vmap(torch.abs)(y)

    class Calls(Plain):
        def __init__(self):
            super().__init__()
            self.maps = Maps()

        def middle(self, y):
            return self.maps(y)

    with pytest.raises(NoBlocksError, match="holds no convolution: put what it cannot follow into one"):
        plan(of(Written))
    assert len(plan(of(Calls)).blocks) == 2


def test_grad_mode_is_put_back():
    class Sets(Listed):
        def forward(self, x):
            torch.set_grad_enabled(False)
            return super().forward(x)

    regulate(Sets())
    assert torch.is_grad_enabled()


def test_a_mask_does_not_hide_the_blocks():
    class Masked(Plain):
        def forward(self, x, mask):
            return x + self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))) * mask

    class Network(Listed):
        def forward(self, x, mask):
            x = self.stem(x)
            for block in self.blocks:
                x = block(x, mask)
            return x

    model, inputs = Network(Masked).eval(), (X, torch.ones(2, 1, 16, 16))
    regulated = regulate(model, example_inputs=inputs)
    assert len(list(regulated_blocks(regulated))) == 3
    assert torch.allclose(model(*inputs), regulated(*inputs), rtol=1e-4, atol=1e-5)


def test_blocks_of_two_dtypes_share_no_cell():
    class Cast(Plain):
        def forward(self, x):
            return super().forward(x.to(self.conv1.weight.dtype)).float()

    model = of(Cast, 4)
    model[1][2:].double()
    regulated = regulate(model, fusion="residual")
    assert [len(stage.blocks) for stage in plan(model).stages] == [2, 2]
    assert_same(model, regulated)


class ComplexBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Conv2d(8, 8, 3, padding=1, dtype=torch.complex64) for _ in range(2))

    def forward(self, x):
        return x + self.b(torch.tanh(self.a(x)))


class Descriptor:
    def __get__(self, block, cls=None):
        return self if block is None else lambda x: Plain.forward(block, x)


class Described(Plain):
    forward = Descriptor()


class Generating(Listed):
    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
            yield x


class Undecided(Listed):
    def forward(self, x):
        return super().forward(x) if x.mean() > 0 else x


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = of(Plain)

    def forward(self, x):
        return self.net(x), self.net(x.flip(-1))


class Keys(Listed):
    def forward(self, **batch):
        return super().forward(batch["image"])


@pytest.mark.parametrize(("make", "options", "message"), [
    (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 1, dtype=torch.complex64), ComplexBlock(), ComplexBlock()),
        {"example_inputs": torch.zeros(1, 3, 16, 16, dtype=torch.complex64)},
        "real floating-point",
    ),
    (lambda: of(Described), {}, "another kind of forward than a function"),
    (Generating, {}, "its forward is a generator"),
    (Undecided, {}, r"blocks\.0: what calls it cannot be traced"),
    (Siamese, {}, "its part net can be regulated alone: model.net = regulate"),
    (Keys, {}, "KeyError: 'image'"),
])  # fmt: skip
def test_reasons_are_true(make, options, message):
    with pytest.raises(NoBlocksError, match=message):
        regulate(make(), **options)


def test_a_network_may_return_what_no_graph_holds():
    class Result:
        def __init__(self, maps):
            self.maps = maps

    class Returns(Listed):
        def forward(self, x):
            return Result(super().forward(x))

    model = Returns().eval()
    regulated = regulate(model)
    assert torch.allclose(regulated(X).maps, model(X).maps, rtol=1e-4, atol=1e-5)
