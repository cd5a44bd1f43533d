"""What networks are planned with: examples, sizes of their own, defaults; refusals that name the next step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from regulate import NoBlocksError, load, plan, regulate, save, unregulate
from regulate.analysis.candidates import survey
from regulate.analysis.inputs import Size
from regulate.analysis.meta_copy import skeleton
from regulate.config import RegulatorConfig
from regulate.models.cifar import cifar_resnet
from regulate.tools.cli import main

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


class Network(nn.Module):
    """A CIFAR network as its owner calls it."""

    def __init__(self):
        super().__init__()
        self.net = cifar_resnet(14)
        self.time = nn.Linear(1, 16)

    def timed(self, x, t):
        y = torch.relu(self.net.bn1(self.net.conv1(x)))
        y = y + self.time(t)[:, :, None, None]
        return self.net.fc(self.net.layer3(self.net.layer2(self.net.layer1(y))).mean((2, 3)))


class Optional(Network):
    def forward(self, x=None, labels=None, scale=1.0):
        if x is None:
            raise ValueError("no image")
        y = self.net(x) * scale
        return (y,) if labels is None else (y, nn.functional.cross_entropy(y, labels))


class Timed(Network):
    def forward(self, x, t, *, strength):
        return self.timed(x, t) * strength


class Named(Network):
    def forward(self, batch, /, **options):
        return self.net(batch["image"])


class Anything(Network):
    def forward(self, *images):
        return self.net(images[0])


class Branching(Network):
    """Its own code cannot be traced with a tensor as its time."""

    def forward(self, x, t=None):
        if t is not None and t.sum() > 0:
            x = x + 1
        return self.net(x)


def works(model, *args, regulated=None, **kwargs):
    """The same outputs at the start, gradients in every regulator, and the way back."""
    regulated = regulated or regulate(model)
    model.eval(), regulated.eval()
    expected = model(*args, **kwargs)
    out = regulated(*args, **kwargs)
    same = equal(expected, out)
    (out[0] if isinstance(out, tuple) else out).square().mean().backward()
    gradients = [p.grad for name, p in regulated.named_parameters() if name.endswith("regulator.mix.weight")]
    alive = len(gradients) == 6 and all(g is not None and g.any() for g in gradients)
    return same and alive and equal(expected, unregulate(regulated)(*args, **kwargs))


def equal(a, b):
    pairs = zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]
    return all(torch.equal(*pair) for pair in pairs)


def test_the_first_input_is_never_fixed_at_its_default():
    assert survey(skeleton(Optional()), RegulatorConfig(), [Size(32)]).failed == []
    assert works(Optional(), X)
    assert works(Optional(), X, labels=torch.tensor([1, 2]), scale=0.5)


def test_inputs_by_position():
    assert works(Anything(), X)


TIMED = [
    ((X, torch.ones(2, 1)), {"strength": 2.0}),
    {"x": X, "t": torch.ones(2, 1), "strength": torch.tensor(2.0)},
    ([X, torch.ones(2, 1)], {"strength": torch.tensor(2.0)}),
]


@pytest.mark.parametrize("example", TIMED)
def test_further_inputs_are_taken_from_examples(example):
    model = Timed()
    assert plan(model, example_inputs=example).input_size == (3, 32, 32)
    regulated = regulate(model, example_inputs=example)
    assert works(model, X, torch.ones(2, 1), strength=3.0, regulated=regulated)


@pytest.mark.parametrize("call", [plan, regulate])
def test_without_examples_the_arguments_are_named(call):
    with pytest.raises(NoBlocksError, match=r"needs t, strength beside x; give example_inputs=\(x, \.\.\.\)"):
        call(Timed())
    with pytest.raises(
        NoBlocksError, match=r"its part net can be regulated alone: model\.net = regulate\(model\.net\)"
    ):
        call(Timed())


def test_a_part_of_another_name_is_found_however_deep():
    model = nn.Module()
    model.outer = Timed()
    model.forward = None
    with pytest.raises(NoBlocksError, match=r"model\.net = regulate\(model\.net\)"):
        regulate(model.outer)


class Numbers(Network):
    """Asks for a number that only real inputs have."""

    def forward(self, x):
        return self.net(x / x.abs().max().item())


def test_the_next_step_is_one_that_helps():
    with pytest.raises(NoBlocksError, match=r"on an image of 3x32x32: .*meta.*; its part net can be") as caught:
        regulate(Numbers())
    assert "example_inputs" not in str(caught.value)
    with pytest.raises(NoBlocksError, match=r": model\[1\]\.net = regulate\(model\[1\]\.net\)"):
        regulate(nn.Sequential(nn.Conv2d(3, 3, 1), Numbers()))


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(3, 3, 3, 3) for _ in range(2))

    def forward(self, x):
        a, b = self.weights
        y = nn.functional.conv2d(torch.relu(nn.functional.conv2d(x, a, padding=1)), b, padding=1)
        return x + y


def test_convolutions_that_are_no_modules():
    with pytest.raises(NoBlocksError, match=r"Functional has no convolution that is a module \(F\.conv2d"):
        regulate(Functional())


def test_a_batch_that_is_a_dict():
    model, example = Named(), ({"image": X},)
    with pytest.raises(NoBlocksError, match="give input_size= or example_inputs="):
        plan(model)
    assert works(model, {"image": X}, regulated=regulate(model, example_inputs=example))
    assert plan(model, example_inputs=example).input_size == (3, 32, 32)


def test_parts_of_what_cannot_be_traced_are_measured_on_what_they_get():
    model = Branching()
    drawn = plan(model, example_inputs=(X, torch.ones(1)))
    assert [stage.grid for stage in drawn.stages] == [(32, 32), (16, 16), (8, 8)]
    assert works(model, X, torch.ones(1), regulated=regulate(model, example_inputs=(X, torch.ones(1))))


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ("x", TypeError, "got a str without a tensor"),
        ((7,), TypeError, "got a tuple without a tensor"),
        (torch.ones(3), TypeError, r"with a map \(N, C, H, W\) among them; got tensors of shapes \[\(3,\)\]"),
        (torch.ones(2, 5, 32, 32), NoBlocksError, "does not run on example_inputs=: "),
        ((X, X), TypeError, r"CifarResNet\.forward, which does not take them: too many positional arguments; pass"),
        ({"image": X}, TypeError, "missing a required argument: 'x'"),
    ],
)
def test_examples_that_do_not_fit(given, error, says):
    with pytest.raises(error, match=says):
        regulate(cifar_resnet(14), example_inputs=given)


def test_a_size_and_examples_are_one_too_many():
    with pytest.raises(TypeError, match="pass one of both"):
        plan(cifar_resnet(14), input_size=32, example_inputs=X)


@pytest.mark.parametrize(("size", "error"), [("32", TypeError), (32.0, TypeError), ((3, True, 3), TypeError)])
def test_sizes_of_the_wrong_type(size, error):
    with pytest.raises(error, match="input_size is H = W"):
        regulate(cifar_resnet(14), input_size=size)


@pytest.mark.parametrize("size", [0, -32, (0, 32), (), (1, 2, 3, 4, 5)])
def test_sizes_that_are_none(size):
    with pytest.raises((ValueError, TypeError), match="input_size is H = W"):
        regulate(cifar_resnet(14), input_size=size)


class Small(nn.Module):
    """Built for images of 32 pixels: its classifier takes what is left of the grid."""

    def __init__(self, **attributes):
        super().__init__()
        self.net = cifar_resnet(14)
        del self.net.input_size
        self.fc = nn.Linear(64 * 8 * 8, 10)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        net = self.net
        x = net.layer3(net.layer2(net.layer1(torch.relu(net.bn1(net.conv1(x))))))
        return self.fc(x.flatten(1))


def test_a_network_for_small_images_needs_no_more_than_its_size():
    model = Small()
    with pytest.raises(NoBlocksError, match=r"does not run on an image of 3x224x224: .*; give input_size= or example"):
        regulate(model)
    assert works(model, X, regulated=regulate(model, input_size=32))
    assert plan(model, input_size=32).input_size == plan(model, example_inputs=X).input_size == (3, 32, 32)


class Config:
    image_size = 32


@pytest.mark.parametrize(
    "attributes",
    [
        {"in_size": (32, 32)},
        {"image_size": 32},
        {"config": Config},
        {"input_size": [32, 32, 3]},
        {"pretrained_cfg": {"input_size": (3, 32, 32)}},
    ],
)
def test_a_size_of_the_networks_own_is_taken(attributes):
    assert plan(Small(**attributes)).input_size == (3, 32, 32)
    assert plan(nn.Sequential(Small(**attributes))).input_size == (3, 32, 32)


def test_a_size_of_its_own_that_does_not_run_gives_way_to_the_default():
    model = cifar_resnet(14)
    model.input_size, model.image_size, model.in_size = None, 0, (7, 7, 7, 7)
    assert plan(model).input_size == (3, 224, 224)


def test_one_number_stands_for_every_axis(capsys):
    assert plan(cifar_resnet(14), input_size=48).input_size == (3, 48, 48)
    assert main(["plan", "cifar/14", "--size", "48"]) == 0
    assert "input 3x48x48" in capsys.readouterr().out


def test_save_and_load_plan_alike(tmp_path):
    save(regulate(Timed(), example_inputs=TIMED[0]), tmp_path / "a")
    model = load(Timed(), tmp_path / "a", example_inputs=TIMED[0])
    assert model(X, torch.ones(2, 1), strength=1.0).shape == (2, 10)
    save(regulate(Small(), input_size=32), tmp_path / "b")
    assert load(Small(), tmp_path / "b", input_size=32)(X).shape == (2, 10)


class Sized(nn.Module):
    """Uses the size of its input where torch wants a number."""

    def __init__(self):
        super().__init__()
        self.net = cifar_resnet(14)

    def forward(self, x):
        noise = torch.ones(x.shape[0], device=x.device)
        return self.net(x) * noise[:, None]


def test_a_size_where_torch_wants_a_number_does_not_end_the_process():
    assert works(Sized(), X)
