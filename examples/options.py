"""What a training run is asked for: recipes, options, and the command line that sets them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

from data import NAMES

DEPTHS = (20, 32, 44, 56, 110)
CIFAR_MODELS = tuple(f"{kind}resnet{depth}" for kind in ("", "se_") for depth in DEPTHS)


@dataclass(frozen=True)
class Recipe:
    """SGD with momentum; the rate falls to a tenth at each milestone. `batch` is that of all processes."""

    rate: float
    batch: int
    epochs: int
    milestones: tuple[int, ...]
    momentum: float = 0.9
    decay: float = 1e-4


RECIPES = {
    "cifar": Recipe(0.1, 64, 150, (80,)),  # arXiv 2101.00590, section IV-A
    "imagenet": Recipe(0.06, 128, 90, (50, 70)),  # section IV-B
    "digits": Recipe(0.1, 32, 40, (25, 35)),
}
_RECIPE_OF = {"digits": "digits", "cifar10": "cifar", "cifar100": "cifar", "imagefolder": "imagenet"}


@dataclass(frozen=True)
class Options:
    """Everything that decides a run's numbers, and how it is run. The defaults of the recipe are None."""

    dataset: str = "digits"
    data: str | None = None
    subset: int | None = None
    size: int = 224
    model: str = "resnet20"
    width: int = 16
    shortcut: str = "B"
    pretrained: bool = False
    weights: str | None = None
    cell: str = "none"
    kernel: str = "light"
    fusion: str = "paper"
    init: str | None = None
    stages: tuple[str | int, ...] | None = None
    recipe: str | None = None
    epochs: int | None = None
    rate: float | None = None
    batch: int | None = None
    milestones: tuple[int, ...] | None = None
    seed: int = 0
    amp: bool = False
    channels_last: bool = False
    compile: bool = False
    workers: int = 0
    device: str | None = None
    out: str = "runs/train"
    resume: bool = False
    quiet: bool = False

    def plan(self) -> Recipe:
        """The recipe with what was asked for put over it."""
        base = RECIPES[self.recipe or _RECIPE_OF[self.dataset]]
        asked = {name: getattr(self, name) for name in ("epochs", "rate", "batch", "milestones")}
        return Recipe(**{**asdict(base), **{name: value for name, value in asked.items() if value is not None}})


def parser(text: str | None) -> argparse.ArgumentParser:
    """The command line; each option is a field of `Options`."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--dataset", choices=NAMES, help="digits come with scikit-learn")
    add("--data", help="folder of the data")
    add("--subset", type=int, help="train on so many images, balanced over the classes")
    add("--size", type=int, help="of the images of an image folder, in pixels")
    add("--model", help=f"{', '.join(CIFAR_MODELS[:3])}, ..., se_resnet20, ..., or timm/NAME")
    add("--width", type=int, help="channels of the first stage of a CIFAR network")
    add("--shortcut", choices=("A", "B"), help="of a CIFAR network: zero padding, or 1x1 convolutions")
    add("--pretrained", action="store_true", help="timm's weights")
    add("--weights", help="model.pt of a plain run to start from")
    add("--cell", choices=("none", "rnn", "gru", "lstm"))
    add("--kernel", choices=("light", "dense"))
    add("--fusion", choices=("paper", "residual"))
    add("--init", choices=("identity", "unit", "random"), help="random from scratch, else identity")
    add("--stages", nargs="+", help="names or indices, which start at 0: the paper's RegNet(1) is --stages 0")
    add("--recipe", choices=tuple(RECIPES), help="by default that of the data set")
    add("--epochs", type=int)
    add("--rate", type=float, help="learning rate")
    add("--batch", type=int, help="of all processes together")
    add("--milestones", type=int, nargs="*", help="epochs after which the rate falls to a tenth")
    add("--seed", type=int)
    add("--amp", action="store_true", help="bfloat16 autocast")
    add("--channels-last", action="store_true")
    add("--compile", action="store_true")
    add("--workers", type=int)
    add("--device", choices=("cpu", "cuda"))
    add("--out", help="folder of the run")
    add("--resume", action="store_true", help="go on from the folder's checkpoint, if there is one")
    add("--quiet", action="store_true")
    return made


def options_of(arguments: Sequence[str] | None = None, text: str | None = None) -> Options:
    """Options from a command line; what it does not name keeps its default. `text` is shown by --help."""
    made = parser(text)
    made.set_defaults(**{field.name: field.default for field in fields(Options)})
    values = vars(made.parse_args(arguments))
    if values["stages"]:
        values["stages"] = tuple(int(entry) if entry.isdigit() else entry for entry in values["stages"])
    if values["milestones"] is not None:
        values["milestones"] = tuple(values["milestones"])
    if values["model"] not in CIFAR_MODELS and not values["model"].startswith("timm/"):
        made.error(f"--model takes one of {', '.join(CIFAR_MODELS)}, or timm/NAME; got {values['model']!r}")
    if values["cell"] == "none" and (values["stages"] or values["init"]):
        made.error("--stages and --init are options of a regulator; give a --cell")
    return Options(**values)
