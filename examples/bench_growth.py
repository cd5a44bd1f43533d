"""How a regulator's cost grows with depth, width, image size and batch.

    python examples/bench_growth.py [--cell lstm] [--train]

CIFAR ResNets, plain and regulated in turn. `added` is the difference of the medians; `per unit` is that per step of a
cell, channel, image pixel or image, relative to the first line: 1 all the way down is linear growth.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace

from regulate import RegulatorConfig, regulate
from regulate.models.cifar import cifar_resnet
from regulate.tools.bench import PLAIN, REGULATED, Setting, in_turn, step_of

GROWTH = {
    "depth (steps per stage)": ("depth", (20, 32, 44, 56)),
    "width (channels of the first stage)": ("width", (16, 32, 64)),
    "image (pixels)": ("size", (16, 32, 64)),
    "batch": ("batch", (16, 32, 64, 128)),
}


def seconds(setting: Setting, depth: int = 20, width: int = 16, size: int = 32, batch: int = 32) -> tuple[float, float]:
    """Median seconds of a step, plain and regulated."""
    setting = replace(setting, batch=batch)
    models = {
        PLAIN: cifar_resnet(depth, width=width),
        REGULATED: regulate(cifar_resnet(depth, width=width), config=setting.config),
    }
    found = in_turn({name: step_of(model, setting, size) for name, model in models.items()}, setting.rounds)
    return statistics.median(found[PLAIN]), statistics.median(found[REGULATED])


def table(title: str, name: str, values: tuple[int, ...], setting: Setting) -> list[str]:
    """One line a value, in Markdown."""
    lines = [f"| {title} | plain, ms | regulated, ms | ratio | added, ms | per unit |", "|---|---|---|---|---|---|"]
    first = 0.0
    for value in values:
        plain, regulated = seconds(setting, **{name: value})
        units = {"depth": (value - 2) // 6, "width": value, "size": value * value, "batch": value}[name]
        each = (regulated - plain) / units
        first = first or each
        lines.append(
            f"| {units} | {plain * 1e3:.1f} | {regulated * 1e3:.1f} | {regulated / plain:.2f} | "
            f"{(regulated - plain) * 1e3:.1f} | {each / first:.2f} |"
        )
    return lines


def main() -> None:
    """Print one table for each way to grow."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", default="lstm", choices=("rnn", "gru", "lstm"))
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    setting = Setting("cifar", RegulatorConfig(args.cell), args.train, rounds=args.rounds)
    for title, (name, values) in GROWTH.items():
        print("\n".join([*table(title, name, values, setting), ""]), flush=True)


if __name__ == "__main__":
    main()
