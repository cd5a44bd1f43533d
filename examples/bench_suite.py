"""The measurements of docs/performance.md: one JSON file each, and the tables made from them.

    python examples/bench_suite.py --out docs/results/performance [NAME ...]
    python examples/bench_suite.py --beside FOLDER FOLDER ...

What is there already is not measured again. Nothing else may run on the machine meanwhile. The second form puts the
ratios of several folders beside each other, of the names that all of them have.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from regulate import RegulatorConfig, kernels
from regulate.tools.bench import Setting, measure

R50 = Setting("resnet50", RegulatorConfig("lstm"), rounds=6)
CIFAR = Setting("cifar/20", RegulatorConfig("lstm"), True, 64, 32, rounds=20)


def both(name: str, setting: Setting) -> dict[str, Setting]:
    """Inference and a training step."""
    return {f"{name}-eval": setting, f"{name}-train": replace(setting, train=True)}


REFERENCE = both("resnet50-lstm-reference", R50)

SUITE: dict[str, dict[str, Setting]] = {
    "ResNet-50 and its relatives": {
        **both("resnet50-lstm", R50),
        **both("resnet50-gru", replace(R50, config=RegulatorConfig("gru"))),
        **both("resnet50-rnn", replace(R50, config=RegulatorConfig("rnn"))),
        **both("resnet18-lstm", replace(R50, model="resnet18")),
        **both("seresnext50-lstm", replace(R50, model="seresnext50_32x4d")),
    },
    "Channels last, both networks": both("resnet50-lstm-last", replace(R50, channels_last=True)),
    "Before: the equations as torch operations": REFERENCE,
    "Gradient checkpointing, both networks": {
        "resnet50-lstm-checkpointing-train": replace(R50, train=True, checkpointing=True)
    },
    "ResNet-20 on CIFAR-size images": {
        f"resnet20-{cell}-train": replace(CIFAR, config=RegulatorConfig(cell)) for cell in ("rnn", "gru", "lstm")
    },
    "Compiled by inductor, both networks": both("resnet50-lstm-compiled", replace(R50, compile=True)),
}


def run(name: str, setting: Setting, folder: Path) -> dict[str, Any]:
    """One measurement, or the file that an earlier call left."""
    path = folder / f"{name}.json"
    if not path.exists():
        with kernels.use("reference" if name in REFERENCE else "auto"):
            path.write_text(json.dumps(measure(setting), indent=1) + "\n")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def table(title: str, found: dict[str, dict[str, Any]]) -> str:
    """Return the figures of one group, in Markdown."""
    lines = [
        f"| {title} | plain, ms | regulated, ms | ratio | peak memory, MiB | ratio | multiply-adds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        plain, regulated = one["seconds"]["plain"], one["seconds"]["regulated"]
        peaks = [value and f"{value / 2**20:,.0f}" for value in one["peak_bytes"].values()]
        memory = (f"{peaks[0]}, {peaks[1]}", f"{one['memory_ratio']:.2f}") if all(peaks) else ("", "")
        macs = f"{one['arithmetic']:.2f}" if one["arithmetic"] else ""
        lines.append(
            f"| `{name}` | {plain * 1e3:,.0f} | {regulated * 1e3:,.0f} | {one['ratio']['regulated']:.2f} | "
            f"{memory[0]} | {memory[1]} | {macs} |"
        )
    return "\n".join(lines)


def beside(folders: Sequence[Path]) -> str:
    """Return the times and ratios of several folders in one table, in Markdown; a folder's name heads its column."""
    names = [name for group in SUITE.values() for name in group]
    lines = [
        f"| plain, regulated, ms; ratio | {' | '.join(f'`{folder.name}`' for folder in folders)} |",
        "|---" * (len(folders) + 1) + "|",
    ]
    for name in names:
        paths = [folder / f"{name}.json" for folder in folders]
        if all(path.exists() for path in paths):
            found = [json.loads(path.read_text())["seconds"] for path in paths]
            lines.append(f"| `{name}` | {' | '.join(map(_ratio, found))} |")
    return "\n".join(lines)


def _ratio(seconds: dict[str, float]) -> str:
    plain, regulated = seconds["plain"], seconds["regulated"]
    return f"{plain * 1e3:,.0f}, {regulated * 1e3:,.0f}; {regulated / plain:.2f}"


def main() -> None:
    """Measure what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="only these")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, help="folder of the JSON files")
    where.add_argument("--beside", type=Path, nargs="+", help="such folders, of which nothing is measured")
    args = parser.parse_args()
    if args.beside:
        print(beside(args.beside))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    for title, group in SUITE.items():
        asked = {name: setting for name, setting in group.items() if not args.names or name in args.names}
        if asked:
            print(
                table(title, {name: run(name, setting, args.out) for name, setting in asked.items()}) + "\n", flush=True
            )


if __name__ == "__main__":
    main()
