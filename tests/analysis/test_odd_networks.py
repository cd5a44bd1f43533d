"""Networks whose Python does odd things around its blocks: they come out right, or are refused for the true reason."""

from __future__ import annotations

import abc
import copy
import pickle
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from regulate import NoBlocksError, UnsupportedModelError, is_regulated, plan, regulate, unregulate
from regulate.rewrite.lookup import regulated_blocks

from ..helpers import stir

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))


class Plain(nn.Module):
    """The block that the others change."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.act = nn.ReLU()

    def middle(self, y):
        return y

    def forward(self, x):
        return self.act(x + self.bn2(self.conv2(self.middle(self.act(self.bn1(self.conv1(x)))))))


class Listed(nn.Module):
    """Blocks in a list, which the network's own forward goes through."""

    def __init__(self, kind=Plain, blocks: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(kind() for _ in range(blocks))

    def chosen(self):
        return self.blocks

    def forward(self, x):
        x = self.stem(x)
        for block in self.chosen():
            x = block(x)
        return x


def of(kind, blocks: int = 2) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Sequential(*(kind() for _ in range(blocks))))


def outputs(model, training: bool = False, seed: int = 0, x=X):
    torch.manual_seed(seed)
    random.seed(seed)
    model.train(training)
    with torch.no_grad():
        return model(x)


def assert_same(model, regulated, seeds=range(4)):
    for training in (False, True):
        for seed in seeds:
            a, b = (outputs(copy.deepcopy(m), training, seed) for m in (model, regulated))
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5), (training, seed)


class Dropping(Listed):
    def chosen(self):
        return [b for b in self.blocks if not (self.training and random.random() < 0.5)]


class Shuffling(Listed):
    def chosen(self):
        return random.sample(list(self.blocks), 3) if self.training else self.blocks


class FromSecond(Listed):
    start = 0

    def chosen(self):
        return self.blocks[self.start :]


class Recovering(Listed):
    fails = -1

    def forward(self, x):
        x = self.stem(x)
        for at, block in enumerate(self.blocks):
            try:
                x = block(x if at != self.fails else x[:, :1])
            except RuntimeError:
                continue
        return x


@pytest.mark.parametrize("kind", [Dropping, Shuffling])
def test_which_blocks_run_is_up_to_the_container(kind):
    model = kind()
    regulated = regulate(model, fusion="residual")
    assert len(list(regulated_blocks(regulated))) == 3
    assert_same(model, regulated, range(8))
    # Memory is passed on from the block before, whichever that was: gradients reach the cell.
    stir(regulated).train()
    random.seed(3)
    regulated(X).sum().backward()
    assert regulated.blocks[0].regulator.cell.gates.weight.grad.any()


@pytest.mark.parametrize(("kind", "attribute", "value"), [(FromSecond, "start", 1), (Recovering, "fails", 1)])
def test_blocks_that_are_left_out_later(kind, attribute, value):
    model = kind()
    regulated = regulate(model, fusion="residual")
    for either in (model, regulated):
        setattr(either, attribute, value)
    assert_same(model, regulated)


def test_checkpointed_blocks_behind_one_that_is_left_out_have_the_same_gradients():
    class Checkpointed(FromSecond):
        checkpointed = False

        def forward(self, x):
            x = self.stem(x)
            for block in self.chosen():
                x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
            return x

    model = stir(regulate(Checkpointed(), fusion="residual")).train()
    model.start = 1
    plainly = copy.deepcopy(model)
    model.checkpointed = True
    for either in (model, plainly):
        either(X).square().sum().backward()
    assert model.blocks[0].regulator.cell.gates.weight.grad.any()
    for (name, a), (_, b) in zip(model.named_parameters(), plainly.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-3), name


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class Indexed(nn.Sequential):
    def forward(self, x):
        y = x
        for layer in self[:-1]:
            y = layer(y)
        return x + self[-1](y) / len(self)


@pytest.mark.parametrize("kind", [Residual, Indexed])
def test_a_block_that_is_a_sequential_does_not_run_its_regulator(kind):
    def block():
        return kind(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))

    model = of(block)
    regulated = regulate(model, fusion="residual")
    assert len(list(regulated_blocks(regulated))) == 2
    assert_same(model, regulated)
    first = regulated[1][0]
    assert len(first) == 4
    assert [type(layer) for layer in first] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, type(first[3])]
    assert first[-1] is first[3]
    assert "1.0.regulator.mix.weight" in regulated.state_dict()
    assert_same(model, pickle.loads(pickle.dumps(regulated)))
    assert type(unregulate(regulated)[1][0]) is kind


class OverChildren(Plain):
    def forward(self, x):
        y = x
        for child in self.children():
            y = child(y)
        return x + y


class Penalised(Plain):
    def forward(self, x):
        return super().forward(x) + sum(p.mean() for p in self.parameters())


class Counted(Plain):
    def forward(self, x):
        return super().forward(x) / sum(isinstance(m, nn.Conv2d) for m in self.modules())


class OnlyInTraining(Plain):
    def forward(self, x):
        y = super().forward(x)
        return y + sum(p.mean() for p in self.parameters()) if self.training else y


class Keyed(Listed):
    def forward(self, x):
        return super().forward(x) * len(self.state_dict())


@pytest.mark.parametrize("make", [
    lambda: of(OverChildren), lambda: of(Penalised), lambda: of(Counted), lambda: of(OnlyInTraining), Keyed,
])  # fmt: skip
def test_code_that_would_take_a_regulator_for_a_part_of_its_own_is_refused(make):
    with pytest.raises(NoBlocksError, match="goes over submodules, parameters or the state dict"):
        regulate(make())


def test_a_block_that_runs_its_points_twice_in_training_is_refused():
    class Twice(Plain):
        def middle(self, y):
            return self.conv2(y) * 0 + y if self.training else y

    with pytest.raises(NoBlocksError, match=r"in train mode it calls 1\.0\.conv2 2 times"):
        regulate(of(Twice))


class NormOfActivated(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x):
        return super().forward(self.act(x))


class NegativeDropout(nn.Dropout):
    def forward(self, x):
        return -super().forward(x)


class NegativeGate(nn.Sigmoid):
    def forward(self, x):
        return super().forward(x) - 1


@pytest.mark.parametrize(
    "part", [NormOfActivated(8), NegativeDropout(), NegativeGate()], ids=lambda p: type(p).__name__
)
def test_no_activation_behind_a_subclass_of_something_known(part):
    class Odd(Plain):
        def __init__(self):
            super().__init__()
            self.part = copy.deepcopy(part)

        def middle(self, y):
            return y * self.part(y) if isinstance(part, nn.Sigmoid) else self.part(y)

    model = of(Odd)
    assert {block.activation for block in plan(model).blocks} == {"none"}
    assert torch.allclose(outputs(regulate(model)), outputs(model), rtol=1e-4, atol=1e-5)


def test_no_activation_behind_a_patched_class(monkeypatch):
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: -F.relu(x))
    model = of(Plain)
    assert {block.activation for block in plan(model).blocks} == {"none"}
    assert torch.allclose(outputs(regulate(model)), outputs(model), rtol=1e-4, atol=1e-5)


def test_a_class_that_gets_another_forward_later():
    class Patched(Plain):
        pass

    model = of(Patched)
    regulated = regulate(model, fusion="residual")
    Patched.forward = lambda self, x: Plain.forward(self, x) * 2
    assert_same(model, regulated)


KNOWN: dict[str, type] = {}


class Register(type):
    def __new__(cls, name, bases, members):
        KNOWN[name] = made = super().__new__(cls, name, bases, members)
        return made


class Registered(Plain, metaclass=Register):
    pass


class Abstract(Plain, abc.ABC):
    @abc.abstractmethod
    def middle(self, y): ...


class Concrete(Abstract):
    def middle(self, y):
        return y * 2


@pytest.mark.parametrize("kind", [Registered, Concrete])
def test_metaclasses(kind):
    model = of(kind)
    assert_same(model, regulate(model, fusion="residual"))
    assert KNOWN["Registered"] is Registered
    assert isinstance(regulate(model)[1][0], kind)
    assert not isinstance(Plain(), Abstract)


class Reduced(Plain):
    def __reduce__(self):
        return type(self), (), self.__dict__


class WithArguments(Plain):
    def __getnewargs_ex__(self):
        return (), {}


@pytest.mark.parametrize("kind", [Reduced, WithArguments])
def test_pickles_of_ones_own(kind):
    model = of(kind)
    state = torch.get_rng_state()
    regulated = regulate(model, fusion="residual")
    assert torch.equal(torch.get_rng_state(), state)
    restored = pickle.loads(pickle.dumps(regulated))
    assert len(list(regulated_blocks(restored))) == 2
    assert_same(model, restored)


class Itself(Listed):
    def __deepcopy__(self, memo):
        return self


class Anew(Listed):
    def __deepcopy__(self, memo):
        return type(self)()


def closure():
    model = Listed()
    run = model.forward
    model.forward = lambda x: run(x) * 2
    return model


@pytest.mark.parametrize(("make", "message"), [
    (Itself, "left the model .Itself. as it is"),
    (Anew, "anew with other tensors"),
    (closure, "refers to the original"),
])  # fmt: skip
def test_a_model_that_is_not_copied(make, message):
    model = make()
    handle = model.blocks[0].act.register_forward_hook(lambda module, args, out: out * 2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    with pytest.raises(UnsupportedModelError, match=message):
        regulate(model)
    assert handle.id in model.blocks[0].act._forward_hooks
    assert model.training
    assert not is_regulated(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


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
