"""Bad input is a clear error, and a failed call changes nothing."""

from __future__ import annotations

import collections
import copy
import functools

import pytest
import torch
from timm import create_model
from torch import nn

import regulate as package
from regulate import (
    AlreadyRegulatedError,
    NoBlocksError,
    NotRegulatedError,
    RegulateError,
    RegulatorConfig,
    UnknownStageError,
    UnsupportedModelError,
    calibrate,
    freeze_backbone,
    is_regulated,
    plan,
    regulate,
    regulator_parameters,
    regulator_state_dict,
    unregulate,
)
from regulate.models.cifar import cifar_resnet

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def resnet():
    return create_model("resnet18")


@pytest.mark.parametrize("call", [plan, regulate])
@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (
            lambda m: torch.jit.trace(m, torch.randn(1, 3, 64, 64), check_trace=False),
            UnsupportedModelError,
            "torch.jit",
        ),
        (lambda m: m.state_dict(), UnsupportedModelError, "takes an nn.Module, got OrderedDict"),
        (lambda m: type(m), UnsupportedModelError, "pass the instance"),
        (lambda m: regulate(m), AlreadyRegulatedError, "call unregulate"),
        (lambda m: nn.Sequential(regulate(m)), AlreadyRegulatedError, "regulators already"),
        (lambda m: nn.Linear(3, 3), NoBlocksError, "has no convolution"),
        (lambda m: create_model("vgg11"), NoBlocksError, "an addition whose operands part at a common tensor"),
        (lambda m: create_model("densenet121"), NoBlocksError, "no residual blocks"),
        (lambda m: Untraceable(), NoBlocksError, "cannot be traced as a whole"),
        (lambda m: create_model("resnet10t"), NoBlocksError, "a stage of one block has nothing to carry"),
    ],
)
def test_models_that_cannot_be_regulated(resnet, call, make, error, says):
    with pytest.raises(error, match=says) as caught:
        call(make(resnet))
    assert isinstance(caught.value, RegulateError)
    assert "\n" not in str(caught.value)


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(self.conv1(x)) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"cell": "mgu"}, ValueError, "'rnn', 'gru', 'lstm'"),
        ({"cell": 3}, TypeError, "callable"),
        ({"cell": nn.Conv2d(3, 3, 3)}, TypeError, "builds a cell from a channel count"),
        ({"cell": lambda channels: channels}, TypeError, "must build an nn.Module"),
        ({"cell": lambda channels: nn.Identity()}, TypeError, "takes|returns|positional"),
        ({"cell": lambda channels: Bad()}, TypeError, "has the shape of its input"),
        (
            {"cell": lambda: nn.Identity()},
            TypeError,
            "built from one argument, its channel count.*<lambda> does not take",
        ),
        (
            {"cell": lambda channels, hidden: Bad()},
            TypeError,
            "<lambda> does not take them: missing a required argument: 'hidden'; the protocol: cell",
        ),
        ({"cell": lambda channels: nn.Conv2d(channels, channels, 1)}, TypeError, "Conv2d.forward does not take them"),
        ({"cell": lambda channels: Returns(lambda x: x)}, TypeError, "returned a Tensor; the protocol"),
        ({"cell": lambda channels: Returns(lambda x: (x, 3))}, TypeError, r"returned \(Tensor, int\); the protocol"),
        ({"cell": lambda channels: Returns(lambda x: ())}, TypeError, r"returned \(\); the protocol"),
        ({"cell": lambda channels: Returns(lambda x: (x.add_(1),))}, TypeError, "Returns writes to its input in place"),
        ({"cell": lambda channels: Overwriting()}, TypeError, "writes to the state that it was given in place"),
        (
            {"cell": lambda channels: Returns(lambda x: (x.double(),))},
            TypeError,
            "dtype of its input, torch.float32",
        ),
        ({"cell": lambda channels: Named()}, TypeError, "'tuple' object has no attribute 'c'; the protocol"),
        ({"cell": lambda channels: nn.Sequential(nn.LazyConv2d(channels, 1))}, TypeError, "holds a lazy module"),
        ({"cell": functools.cache(package.ConvRNNCell)}, TypeError, "build it anew each time"),
        (
            {"cell": lambda channels: Forgetful()},
            TypeError,
            "with what it returned before as its state: .* unpack.*protocol",
        ),
        ({"kernel": "heavy"}, ValueError, "'light', 'dense'"),
        ({"fusion": "sum"}, ValueError, "'paper', 'residual'"),
        ({"init": "zero"}, ValueError, "'identity'"),
        ({"norm": "layer"}, ValueError, "'auto', 'batch'"),
        ({"stages": ["layer9"]}, UnknownStageError, r"'layer1' \(0\), 'layer2' \(1\)"),
        ({"stages": [4]}, UnknownStageError, "counted from 0"),
        ({"stages": [-1]}, UnknownStageError, "no stage -1"),
        ({"stages": "layer1"}, TypeError, r"stages=\['layer1'\]"),
        ({"stages": []}, ValueError, "at least one stage"),
        ({"stages": [1.5]}, TypeError, "names or 0-based"),
        ({"seed": "one"}, TypeError, "seed must be an int"),
        ({"config": RegulatorConfig(), "cell": "gru"}, TypeError, "one or the other"),
    ],
)
def test_wrong_options_leave_the_model_as_it_was(options, error, says):
    model = cifar_resnet(20) if "stages" not in options else create_model("resnet18")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    attributes = {name: dict(vars(m)) for name, m in model.named_modules()}
    with pytest.raises(error, match=says):
        regulate(model, inplace=True, **options)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    for name, module in model.named_modules():
        assert vars(module).keys() == attributes[name].keys()
    assert not is_regulated(model)


class Returns(nn.Module):
    def __init__(self, made):
        super().__init__()
        self.made = made

    def forward(self, x, state):
        return self.made(x)


class Overwriting(nn.Module):
    """Would change what gradient checkpointing runs a block with again."""

    def forward(self, x, state):
        h, c = state or (x, torch.zeros_like(x))
        return x + h, c.add_(x)


class Named(nn.Module):
    """Counts on the type of what it returned."""

    State = collections.namedtuple("State", "h c")

    def forward(self, x, state):
        return self.State(x + 1, x if state is None else state.c)


class Forgetful(nn.Module):
    """Takes a pair as its state and returns one tensor."""

    def forward(self, x, state):
        h, c = state or (x, x)
        return (h + c,)


def test_the_check_of_a_cell_leaves_its_norms_alone():
    class Normed(package.ConvRNNCell):
        def __init__(self, channels):
            super().__init__(channels)
            self.norm = nn.BatchNorm2d(channels)

        def forward(self, x, state=None):
            return super().forward(self.norm(x) + 1, state)

    cell = regulate(cifar_resnet(14), Normed).layer1[0].regulator.cell
    assert cell.norm.training
    assert not cell.norm.num_batches_tracked


class Bad(nn.Module):
    def forward(self, x, state):
        return (x[..., 1:],)


def test_a_cell_may_be_built_in_another_dtype():
    assert regulate(cifar_resnet(14), lambda channels: package.ConvLSTMCell(channels).half())


def test_a_failure_in_the_last_stage_changes_nothing(monkeypatch):
    """The one thing that runs user code late is a cell that fails for one width only."""

    def fussy(channels):
        if channels == 64:
            raise RuntimeError("not this wide")
        return package.ConvRNNCell(channels)

    model = cifar_resnet(20)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="not this wide"):
        regulate(model, fussy, inplace=True)
    assert list(model.state_dict()) == list(before)
    assert [type(m) for m in model.modules()] == [type(m) for m in cifar_resnet(20).modules()]


@pytest.mark.parametrize(
    "call", [unregulate, regulator_parameters, regulator_state_dict, freeze_backbone, lambda m: calibrate(m, [])]
)
def test_functions_for_regulated_models_say_so(call, resnet):
    with pytest.raises(NotRegulatedError, match=r"call regulate\(model\) first"):
        call(resnet)


def test_a_model_on_the_meta_device_works():
    with torch.device("meta"):
        model = create_model("resnet18")
    regulated = regulate(model)
    assert {p.device.type for p in regulated.parameters()} == {"meta"}
    real = regulate(create_model("resnet18"))
    regulated.load_state_dict(real.state_dict(), assign=True)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(regulated.eval()(x), real.eval()(x))


class Twice(nn.Module):
    """Two residual additions in one forward."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))

    def forward(self, x):
        x = x + self.convs[1](torch.relu(self.convs[0](x)))
        return x + self.convs[3](torch.relu(self.convs[2](x)))


def test_blocks_that_are_left_alone_have_a_reason():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = cifar_resnet(8).layer1[0]
            self.stem = nn.Conv2d(3, 16, 3, padding=1)

        def forward(self, x):
            x = self.stem(x)
            return self.block(self.block(x))

    with pytest.raises(NoBlocksError, match="called more than once"):
        regulate(Shared())

    with pytest.raises(NoBlocksError, match="not a module of its own"):
        regulate(Twice())


@pytest.mark.filterwarnings("error")
def test_a_warning_where_regulators_outweigh_the_network():
    with pytest.raises(UserWarning, match="regulators add"):
        regulate(create_model("efficientnet_b0"))
    regulate(create_model("resnet18"))


def test_two_additions_in_one_module_are_left_alone():
    with pytest.raises(NoBlocksError, match="2 residual additions stand in this one module"):
        regulate(nn.Sequential(nn.Conv2d(3, 3, 1), Twice()))
