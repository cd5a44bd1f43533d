"""What a training run is asked for: recipes, options, and the command line that sets them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from .data import NAMES

DEPTHS = (20, 32, 44, 56, 110)
CIFAR_MODELS = tuple(f"{kind}resnet{depth}" for kind in ("", "se_") for depth in DEPTHS)


@dataclass(frozen=True)
class Recipe:
    """SGD with momentum; `batch` is that of all processes.

    The rate falls to a tenth at each milestone. With `rise`, there is one cycle instead: up to `rate` in that share of
    the training, in a straight line, and down to zero in the rest.
    """

    rate: float
    batch: int
    epochs: int
    milestones: tuple[int, ...] = ()
    momentum: float = 0.9
    decay: float = 1e-4
    nesterov: bool = False
    rise: float = 0.0

    def rate_at(self, epoch: float) -> float:
        """Return the learning rate after so many epochs: no state, so a run that goes on finds it again."""
        if not self.rise:
            return self.rate * 0.1 ** sum(epoch >= milestone for milestone in self.milestones)
        done = epoch / self.epochs
        return self.rate * min(done / self.rise, (1 - done) / (1 - self.rise))


PAPER = Recipe(0.1, 64, 150, (80,))  # arXiv 2101.00590, section IV-A
RECIPES = {
    "paper": PAPER,
    "short": Recipe(0.2, 128, 10, decay=5e-4, nesterov=True, rise=0.25),
    "imagenet": Recipe(0.06, 128, 90, (50, 70)),  # section IV-B
    "upgrade": Recipe(0.1, 64, 6, nesterov=True, rise=0.1),  # of upgrade_backbone.py
    "digits": Recipe(0.1, 32, 40, (25, 35)),
}
_RECIPE_OF = {"digits": "digits", "imagefolder": "imagenet"}


@dataclass(frozen=True)
class Options:
    """Everything that decides a run's numbers, and how it is run. What is None is left to the recipe."""

    dataset: str = "digits"
    data: str | None = None
    cache: str | None = None
    like: str | None = None
    subset: int | None = None
    size: int = 224
    model: str = "resnet20"
    width: int = 16
    shortcut: str = "B"
    pretrained: bool = False
    weights: str | None = None
    new_head: bool = False
    frozen: bool = False
    cell: str = "none"
    kernel: str = "light"
    fusion: str = "paper"
    init: str | None = None
    norm: str = "auto"
    stages: tuple[str | int, ...] | None = None
    recipe: str | None = None
    epochs: int | None = None
    rate: float | None = None
    batch: int | None = None
    milestones: tuple[int, ...] | None = None
    clip: float | None = None
    seed: int = 0
    amp: bool = False
    channels_last: bool = False
    compile: bool = False
    workers: int = 0
    device: str | None = None
    test_every: int = 1
    out: str = "runs/train"
    name: str = ""
    resume: bool = False
    quiet: bool = False

    def plan(self) -> Recipe:
        """Return the recipe with what was asked for put over it."""
        base = RECIPES[self.recipe or _RECIPE_OF.get(self.dataset, "paper")]
        asked = {name: getattr(self, name) for name in ("epochs", "rate", "batch", "milestones")}
        return replace(base, **{name: value for name, value in asked.items() if value is not None})

    def deciding(self) -> dict[str, Any]:
        """Return what decides the numbers, without where things lie and how much is said."""
        return {name: value for name, value in asdict(self).items() if name not in _PRIVATE}


# Where things lie, what is said, and what changes no number.
_PRIVATE = {"data", "cache", "out", "name", "weights", "quiet", "resume", "workers", "test_every", "device"}


def at_least(lowest: int) -> Callable[[str], int]:
    """Return a type of argparse: a whole number from `lowest` on, of 32 bits."""

    def number(text: str) -> int:
        if (value := int(text)) < lowest:
            raise argparse.ArgumentTypeError(f"takes {lowest} or more, got {value}")
        if value >= 2**32:
            raise argparse.ArgumentTypeError(f"takes less than {2**32}, got {value}")
        return value

    return number


COUNT = at_least(1)


def parser(text: str | None) -> argparse.ArgumentParser:
    """Return the command line; each option is a field of `Options`."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--dataset", choices=NAMES, help="digits come with scikit-learn")
    add("--data", help="folder of the data")
    add("--cache", help="folder where CIFAR and Fashion-MNIST are kept as arrays, by default that of the data")
    add("--like", choices=("cifar10",), help="give grey images three channels and a margin, as CIFAR-10 has them")
    add("--subset", type=COUNT, help="train on so many images, balanced over the classes")
    add("--size", type=COUNT, help="of the images of an image folder, in pixels")
    add("--model", help=f"{', '.join(CIFAR_MODELS[:3])}, ..., se_resnet20, ..., or timm/NAME")
    add("--width", type=COUNT, help="channels of the first stage of a CIFAR network")
    add("--shortcut", choices=("A", "B"), help="of a CIFAR network: zero padding, or 1x1 convolutions")
    add("--pretrained", action="store_true", help="timm's weights")
    add("--weights", help="model.safetensors of a plain run to start from")
    add("--new-head", action="store_true", help="do not take the last layer from --weights")
    add("--frozen", action="store_true", help="train the regulators alone")
    add("--cell", choices=("none", "rnn", "gru", "lstm"))
    add("--kernel", choices=("light", "dense"))
    add("--fusion", choices=("paper", "residual"))
    add("--norm", choices=("auto", "batch", "group", "none"), help="of the fusion")
    add("--init", choices=("identity", "unit", "random"), help="random from scratch, else identity")
    add("--stages", nargs="+", help="names or indices, which start at 0: the paper's RegNet(1) is --stages 0")
    add("--recipe", choices=tuple(RECIPES), help="paper, or that of the data set; short: one cycle of 10 epochs")
    add("--epochs", type=COUNT)
    add("--rate", type=float, help="learning rate")
    add("--batch", type=COUNT, help="of all processes together")
    add("--milestones", type=int, nargs="*", help="epochs after which the rate falls to a tenth")
    add("--clip", type=float, help="largest norm of all gradients together; larger ones are scaled down to it")
    add("--seed", type=at_least(0))
    add("--amp", action="store_true", help="bfloat16 autocast")
    add("--channels-last", action="store_true")
    add("--compile", action="store_true")
    add("--workers", type=at_least(0))
    add("--device", choices=("cpu", "cuda"))
    add("--test-every", type=COUNT, help="epochs from one look at the test images to the next; the last one is tested")
    add("--out", help="folder of the run")
    add("--name", help="put before each line about an epoch")
    add("--resume", action="store_true", help="go on from the folder's checkpoint, if there is one")
    add("--quiet", action="store_true")
    return made


def options_of(arguments: Sequence[str] | None = None, text: str | None = None) -> Options:
    """Return the options of a command line; what it does not name keeps its default. `text` is shown by --help."""
    made = parser(text)
    made.set_defaults(**{field.name: field.default for field in fields(Options)})
    values = vars(made.parse_args(arguments))
    if values["stages"]:
        values["stages"] = tuple(int(entry) if entry.isdigit() else entry for entry in values["stages"])
    if values["milestones"] is not None:
        values["milestones"] = tuple(values["milestones"])
    if values["model"] not in CIFAR_MODELS and not values["model"].startswith("timm/"):
        made.error(f"--model takes one of {', '.join(CIFAR_MODELS)}, or timm/NAME; got {values['model']!r}")
    if values["clip"] is not None and not values["clip"] > 0:
        made.error(f"--clip takes a number above 0, got {values['clip']}; leave it out to clip nothing")
    options = Options(**values)
    for idle, names, why in _idle(options):
        given = [name for name in names.split() if getattr(options, name) not in (getattr(Options, name), ())]
        if idle and given:
            made.error(f"{', '.join('--' + name.replace('_', '-') for name in given)} would do nothing {why}")
    return options


def _idle(options: Options) -> tuple[tuple[bool, str, str], ...]:
    """Return for options whether they do nothing beside the others, their names, and why, with the next step."""
    timm = options.model.startswith("timm/")
    return (
        (timm, "width shortcut", "to a network of timm; give a CIFAR network as --model, or leave it out"),
        (not timm, "pretrained", "for a CIFAR network; give --model timm/NAME"),
        (options.cell == "none", "kernel fusion norm init stages frozen", "without a regulator; give a --cell"),
        (not options.weights, "new_head", "without a network to start from; give --weights"),
        (options.plan().rise > 0, "milestones", "in one cycle; give a --recipe of steps, or leave it out"),
        (options.dataset != "imagefolder", "size", "to images of a fixed size; give --dataset imagefolder"),
    )
