"""`python -m regulate plan|verify|inspect|bench MODEL` and `python -m regulate paper`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch

from .api import regulate
from .archive import replaced
from .checkpoint import load
from .config import CELL_NAMES, CHOICES, RegulatorConfig
from .errors import RegulateError
from .inputs import sizes
from .named import load_model
from .planner import draw
from .verify import verify

MODEL = "a timm name, torchvision/NAME, or cifar/DEPTH"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("regulate", description="Memory across the depth of a residual network.")
    commands = parser.add_subparsers(dest="command", required=True)
    for command, text in (
        ("plan", "show what would be rewritten, at what cost, and what is left alone and why"),
        ("verify", "regulate the model and check identity and gradients; exit code 1 if they fail"),
    ):
        sub = commands.add_parser(command, help=text, description=text)
        sub.add_argument("model", help=MODEL)
        sub.add_argument("--cell", default="lstm", choices=CELL_NAMES)
        for option, allowed in CHOICES.items():
            sub.add_argument(f"--{option}", default=allowed[0], choices=allowed)
        sub.add_argument("--stages", nargs="+", help="names or 0-based indices")
        sub.add_argument("--seed", type=int)
        sub.add_argument("--size", type=int, nargs="+", help="height and width, or one number for both; video: three")
        sub.add_argument("--pretrained", action="store_true", help="with the library's pretrained weights")
        sub.add_argument("--json", action="store_true", help="JSON instead of text")
    _add_inspect(commands)
    _add_bench(commands)
    text = "the parameters and FLOPs that the paper prints, beside those that its architectures have"
    commands.add_parser("paper", help=text, description=text)
    return parser


def _add_inspect(commands: Any) -> None:
    text = "draw a regulated model's maps, gates, hidden states and similarities for a folder of images"
    sub = commands.add_parser("inspect", help=text, description=text)
    sub.add_argument("model", help=MODEL)
    sub.add_argument("--weights", help="a file of regulate.save; without it the model is regulated afresh")
    sub.add_argument("--cell", default="lstm", choices=CELL_NAMES, help="without --weights")
    sub.add_argument("--images", required=True, help="a folder of images, or one with a folder for each class")
    sub.add_argument("--count", type=int, default=16, help="images to take")
    sub.add_argument("--size", type=int, help="height and width; by default the model's own")
    sub.add_argument("--out", default="runs/inspect", help="folder of the figures")
    sub.add_argument("--pretrained", action="store_true", help="with the library's pretrained weights")


def _add_bench(commands: Any) -> None:
    text = "time and memory of a network, plain and regulated in turn"
    sub = commands.add_parser("bench", help=text, description=text)
    sub.add_argument("model", help=MODEL)
    sub.add_argument("--cell", default="lstm", choices=CELL_NAMES)
    for option in ("kernel", "fusion", "norm"):
        sub.add_argument(f"--{option}", default=CHOICES[option][0], choices=CHOICES[option])
    sub.add_argument("--train", action="store_true", help="a training step instead of inference")
    sub.add_argument("--batch", type=int, default=8)
    sub.add_argument("--size", type=int, help="height and width; by default the model's own")
    sub.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    sub.add_argument("--amp", action="store_true", help="autocast to bfloat16")
    sub.add_argument("--channels-last", action="store_true")
    sub.add_argument("--compile", action="store_true", help="both with torch.compile")
    sub.add_argument("--checkpointing", action="store_true", help="both with gradient checkpointing")
    sub.add_argument("--rounds", type=int, default=10, help="measured steps of each")
    sub.add_argument("--by-stage", action="store_true", help="also with one stage regulated at a time")
    sub.add_argument("--json", metavar="FILE", help="write the figures there, too")


def _config(args: argparse.Namespace) -> RegulatorConfig:
    stages = args.stages and tuple(int(entry) if entry.isdigit() else entry for entry in args.stages)
    return RegulatorConfig(args.cell, args.kernel, args.fusion, args.init, args.norm, stages, args.seed)


def _plan(args: argparse.Namespace) -> int:
    drawn = draw(load_model(args.model, args.pretrained), _config(args), _grid(args.size))
    print(json.dumps(drawn.to_dict()) if args.json else drawn)
    return 0


def _grid(size: list[int] | None) -> int | tuple[int, ...] | None:
    if not size:
        return None
    # Three numbers are depth, height and width; draw() takes a channel count before them.
    return size[0] if len(size) == 1 else tuple(size) if len(size) == 2 else (3, *size)


def _verify(args: argparse.Namespace) -> int:
    torch.manual_seed(0)
    model = load_model(args.model, args.pretrained)
    drawn = draw(model, _config(args), _grid(args.size))
    verdict = verify(model, _config(args), drawn.input_size, shake=not args.pretrained)
    figures = {
        "model": args.model,
        "input": list(drawn.input_size),
        "blocks": verdict.blocks,
        "eval_error": verdict.eval_error,
        "train_difference": verdict.train_difference,
        "without_gradient": list(verdict.lost),
        "passed": verdict.passed,
    }
    if args.json:
        print(json.dumps(figures))
    else:
        size = "x".join(map(str, drawn.input_size))
        print(f"{args.model}: {verdict.blocks} regulated blocks, input {size}, batch 2")
        print(f"  eval outputs, relative distance   {verdict.eval_error:.2e} (at most {verdict.tolerance:.0e})")
        print(f"  train outputs, relative distance  {verdict.train_difference:.2e} (batch statistics, for information)")
        print(f"  new parameters without gradient   {', '.join(verdict.lost) or 'none'}")
        print("pass" if verdict.passed else "fail")
    return 0 if verdict.passed else 1


def _inspect(args: argparse.Namespace) -> int:
    from .figures import draw as draw_figures
    from .pictures import pictures

    model = load_model(args.model, args.pretrained)
    model = load(model, args.weights) if args.weights else regulate(model, args.cell)
    size = args.size or sizes(model)[0].on(2)[0]
    images, labels = pictures(args.images, args.count, size, getattr(model, "pretrained_cfg", None))
    for path in draw_figures(model, images, args.out, None if labels is None else [(images, labels)]):
        print(path)
    return 0


def _bench(args: argparse.Namespace) -> int:
    from .bench import Setting, measure, report

    names = ("train", "batch", "size", "device", "amp", "channels_last", "compile", "checkpointing", "rounds")
    config = RegulatorConfig(args.cell, args.kernel, args.fusion, norm=args.norm)
    options = {name: getattr(args, name) for name in names}
    found = measure(Setting(args.model, config, **options, stages=args.by_stage))
    if args.json:
        with replaced(args.json) as path:
            path.write_text(json.dumps(found, indent=1))
    print(report(found))
    return 0


def _paper(args: argparse.Namespace) -> int:
    from .paper import compare

    print(compare())
    return 0


_COMMANDS = {"plan": _plan, "verify": _verify, "inspect": _inspect, "bench": _bench, "paper": _paper}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. Returns 0, 1 for a failed check, 2 for an error, which is one line on stderr."""
    args = _parser().parse_args(arguments)
    try:
        return _COMMANDS[args.command](args)
    except ModuleNotFoundError as error:
        message = f"this needs {error.name}, which is not installed; pip install {error.name}"
    except (RegulateError, ValueError, TypeError, RuntimeError, OSError) as error:
        message = " ".join(str(error).split())
    print(f"regulate: {message}", file=sys.stderr)
    return 2
