"""`regulate plan|verify|inspect|bench MODEL`, `regulate timm SCRIPT`, `regulate paper` and `regulate doctor`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import Plan, RegulateError, RegulatorConfig, is_regulated, kernels, plan, regulate
from ..checkpoint.archive import replaced
from ..config import CELL_GATES, CHOICES
from ..testing import verify
from .open_model import backbone_and_options, open_model
from .progress import erase, working
from .script import run_script

# None is 0.
Command = Callable[[argparse.Namespace], int | None]

MODEL = "a timm name, torchvision/NAME, cifar/DEPTH, or a folder of save_pretrained"
WEIGHTS = "a file of regulate.save, a state dict, or a script's checkpoint (its state_dict_ema before its state_dict)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("regulate", description="Memory across the depth of a residual network.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run, text in (
        ("plan", _plan, "show what would be rewritten, at what cost, and what is left alone and why"),
        ("verify", _verify, "regulate the model and check identity and gradients; exit code 1 if they fail"),
    ):
        sub = _add_on_network(commands, name, run, text)
        sub.add_argument("--json", action="store_true", help="JSON instead of text")
    _add_inspect(commands)
    _add_bench(commands)
    _add_timm(commands)
    _add(commands, "doctor", _doctor, "what runs on this machine and why, the versions, and what to install")
    text = "the parameters and FLOPs that the paper prints, beside those that its architectures have"
    _add(commands, "paper", _paper, text)
    return parser


def _add(commands: Any, name: str, run: Command, text: str) -> argparse.ArgumentParser:
    """Add a command."""
    sub: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    sub.set_defaults(run=run)
    return sub


def _add_on_network(commands: Any, name: str, run: Command, text: str) -> argparse.ArgumentParser:
    """Add a command on a network, with the options that all of them have."""
    sub = _add(commands, name, run, text)
    network = sub.add_argument_group("the network")
    network.add_argument("model", metavar="MODEL", help=MODEL)
    network.add_argument("--weights", metavar="FILE", help=WEIGHTS)
    network.add_argument("--pretrained", action="store_true", help="with the library's pretrained weights")
    network.add_argument("--num-classes", type=int, metavar="N", help="width of the classifier; else the library's")
    network.add_argument("--in-chans", type=int, metavar="N", help="channels of the image; else 3")
    size = "height and width in pixels, or one number for both; video: three"
    network.add_argument("--input-size", "--size", type=_positive, nargs="+", metavar="N", help=size)
    options = sub.add_argument_group("the regulators", "a network that has some keeps its own options")
    options.add_argument("--cell", default="lstm", choices=tuple(CELL_GATES))
    for option, allowed in CHOICES.items():
        options.add_argument(f"--{option}", default=allowed[0], choices=allowed)
    options.add_argument("--stages", nargs="+", metavar="STAGE", help="names or 0-based indices")
    options.add_argument("--seed", type=int, metavar="N", help="of the new weights")
    return sub


def _add_inspect(commands: Any) -> None:
    text = "draw a regulated model's maps, gates, hidden states and similarities for a folder of images"
    sub = _add_on_network(commands, "inspect", _inspect, text)
    sub.add_argument("--images", required=True, help="a folder of images, or one with a folder for each class")
    sub.add_argument("--count", type=_positive, default=16, help="images to take")
    sub.add_argument("--out", default="runs/inspect", help="folder of the figures")


def _add_bench(commands: Any) -> None:
    text = "time and memory of a network, plain and regulated in turn"
    sub = _add_on_network(commands, "bench", _bench, text)
    sub.add_argument("--train", action="store_true", help="a training step instead of inference")
    sub.add_argument("--batch", type=_positive, default=8)
    sub.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    sub.add_argument("--amp", action="store_true", help="autocast to bfloat16")
    sub.add_argument("--channels-last", action="store_true")
    sub.add_argument("--compile", action="store_true", help="both with torch.compile")
    sub.add_argument("--checkpointing", action="store_true", help="both with gradient checkpointing")
    sub.add_argument("--rounds", type=_positive, default=10, help="measured steps of each")
    sub.add_argument("--by-stage", action="store_true", help="also with one stage regulated at a time")
    sub.add_argument("--json", action="store_true", help="JSON instead of text")
    sub.add_argument("--out", metavar="FILE", help="also write the figures there, as JSON")


def _add_timm(commands: Any) -> None:
    text = "run a script of timm's repository, such as train.py, with the regulated architectures registered"
    sub = commands.add_parser("timm", help=text, description=text)
    sub.add_argument("script", type=_script, help="its path")
    sub.add_argument("arguments", nargs=argparse.REMAINDER, help="for the script: --model regulated_resnet50 ...")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number of 1 or more, got {text!r}")
    return int(text)


def _script(path: str) -> str:
    if not Path(path).is_file():
        hint = "timm's wheel has none, clone github.com/huggingface/pytorch-image-models"
        raise argparse.ArgumentTypeError(f"there is no script {path}; {hint}")
    return path


def _config(args: argparse.Namespace) -> RegulatorConfig:
    stages = args.stages and tuple(int(entry) if entry.isdigit() else entry for entry in args.stages)
    return RegulatorConfig(args.cell, args.kernel, args.fusion, args.init, args.norm, stages, args.seed)


def _opened(args: argparse.Namespace) -> nn.Module:
    options = {name: getattr(args, name) for name in ("pretrained", "weights", "num_classes", "in_chans")}
    with working(f"building {args.model}"):
        return open_model(args.model, **options, config=_config(args))


def _size(args: argparse.Namespace) -> int | tuple[int, ...] | None:
    size = args.input_size
    if not size:
        return None
    # Three numbers are depth, height and width; plan() takes a channel count before them.
    return int(size[0]) if len(size) == 1 else tuple(size) if len(size) == 2 else (args.in_chans or 3, *size)


def _square(args: argparse.Namespace) -> int | None:
    size = args.input_size or [None]
    if len(set(size)) > 1 or len(size) > 2:
        raise ValueError(f"{args.command} takes square images, got --input-size {' '.join(map(str, size))}")
    return size[0] and int(size[0])


def _planned(model: nn.Module, args: argparse.Namespace) -> tuple[nn.Module, RegulatorConfig, Plan]:
    backbone, config = backbone_and_options(model, _config(args))
    with working(f"planning {args.model}"):
        return backbone, config, plan(backbone, config=config, input_size=_size(args))


def _plan(args: argparse.Namespace) -> None:
    *_, found = _planned(_opened(args), args)
    print(json.dumps(found.to_dict()) if args.json else found)


def _verify(args: argparse.Namespace) -> int:
    torch.manual_seed(0)
    model, config, found = _planned(_opened(args), args)
    is_trained = args.pretrained or args.weights is not None or Path(args.model).is_dir()
    with working(f"verifying {args.model}: outputs, then gradients of three training steps"):
        verdict = verify(model, config, found.input_size, shake=not is_trained)
    figures = {
        "model": args.model,
        "input": list(found.input_size),
        "blocks": verdict.blocks,
        "eval_error": verdict.eval_error,
        "train_difference": verdict.train_difference,
        "without_gradient": list(verdict.lost),
        "passed": verdict.passed,
    }
    if args.json:
        print(json.dumps(figures))
    else:
        size = "x".join(map(str, found.input_size))
        print(f"{args.model}: {verdict.blocks} regulated blocks, input {size}, batch 2")
        print(f"  eval outputs, relative distance   {verdict.eval_error:.2e} (at most {verdict.tolerance:.0e})")
        print(f"  train outputs, relative distance  {verdict.train_difference:.2e} (batch statistics, for information)")
        print(f"  new parameters without gradient   {', '.join(verdict.lost) or 'none'}")
        print("pass" if verdict.passed else "fail")
    return 0 if verdict.passed else 1


def _inspect(args: argparse.Namespace) -> None:
    from .figures import draw
    from .images import pictures

    _square(args)
    model = _opened(args)
    _, config, found = _planned(model, args)
    channels, size, *rest = found.input_size
    if len(rest) != 1:
        raise ValueError(f"inspect draws images; {args.model} takes video of shape {found.input_size}")
    model = model if is_regulated(model) else regulate(model, config=config, input_size=found.input_size)
    images, labels = pictures(args.images, args.count, size, getattr(model, "pretrained_cfg", None), channels)
    with working(f"drawing {args.model}"):
        paths = draw(model, images, args.out, None if labels is None else [(images, labels)])
    print("\n".join(map(str, paths)))


def _bench(args: argparse.Namespace) -> None:
    from .bench import Setting, measure, report

    _, config = backbone_and_options(_opened(args), _config(args))
    names = ("weights", "num_classes", "in_chans", "train", "batch", "device", "amp", "channels_last", "compile")
    options = {name: getattr(args, name) for name in (*names, "checkpointing", "rounds")}
    found = measure(Setting(args.model, config, size=_square(args), **options, stages=args.by_stage))
    if args.out:
        with replaced(args.out) as path:
            path.write_text(json.dumps(found, indent=1))
    print(json.dumps(found) if args.json else report(found))


def _paper(args: argparse.Namespace) -> None:
    from .paper import compare

    print(compare())


def _doctor(args: argparse.Namespace) -> None:
    from .doctor import report

    print(report())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Return 0, 1 for a failed check, 2 for an error, which is one line on stderr."""
    args = _parser().parse_args(arguments)
    if args.command == "timm":
        run_script(args.script, args.arguments)  # whose errors are its own
        return 0
    try:
        kernels.setting()  # a wrong one is an error of every command
        return int(args.run(args) or 0)
    except ModuleNotFoundError as error:
        from .doctor import COMPANIONS, DISTRIBUTION

        extra = "inspect" if args.command == "inspect" else COMPANIONS.get(str(error.name))
        package = f"'{DISTRIBUTION}[{extra}]'" if extra else error.name
        message = f"this needs {error.name}, which is not installed; pip install {package}"
    except (RegulateError, ValueError, TypeError, RuntimeError, OSError, AssertionError) as error:
        if isinstance(error, AssertionError) and not str(error):
            raise  # not torch's, which has a text, but a fault of ours
        message = " ".join(str(error).split())
    erase()  # what a measurement that failed had shown
    print(f"regulate: {message}", file=sys.stderr)
    return 2
