"""What each fast piece brings: a regulated network's time without it, beside its time with all of them.

    python examples/bench_ablations.py --out docs/results/performance/ablations [resnet50-train ...] [--compiled]

Plain, regulated, and regulated without one piece after the other, in turn in one process (A B A B), medians. What is
there already is not measured again. `--compiled`: ResNet-50 compiled by torch.compile instead, the cell as an operator
and written out. AVX2 alone is measured where the processor has more.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from regulate import RegulatorConfig, kernels
from regulate.kernels.cpu import build
from regulate.tools import bench, machine
from regulate.tools.bench import PLAIN, REGULATED, Setting

LSTM = RegulatorConfig("lstm")
NETWORKS = {
    "resnet50": Setting("resnet50", LSTM, rounds=5),
    "resnet18": Setting("resnet18", LSTM, rounds=10),
    "resnet20": Setting("cifar/20", LSTM, batch=64, size=32, rounds=15),
}
RUNS = {
    f"{name}-{mode}": replace(setting, train=mode == "train")
    for name, setting in NETWORKS.items()
    for mode in ("eval", "train")
}
COMPILED = {name.replace("-", "-compiled-"): replace(setting, compile=True) for name, setting in RUNS.items()}

Context = Callable[[], AbstractContextManager[Any]]


@contextmanager
def patched(module: str, name: str, value: object) -> Iterator[None]:
    """One name of one module is something else for the body."""
    where = importlib.import_module(f"regulate.{module}")
    before = getattr(where, name)
    setattr(where, name, value)
    try:
        yield
    finally:
        setattr(where, name, before)


def pieces() -> dict[str, Context]:
    """Return what is taken away, by what computes then."""
    return {
        "norms with ReLU by torch": lambda: patched("kernels.norm", "native_here", lambda *tensors: False),
        "norms of inference in fresh memory": lambda: patched("kernels", "eager_on_cpu", lambda *tensors: False),
        "mix by convolution": lambda: patched("kernels", "mixed", lambda *tensors: None),
        "cell in aten": lambda: patched("kernels.run_step", "choose", lambda *arguments: "aten"),
        "cell written out": lambda: patched("kernels.run_step", "choose", lambda *arguments: None),
        "all of that": lambda: kernels.use("reference"),
    }


def avx2(folder: Path) -> dict[str, Context]:
    """Return the kernels compiled for AVX2, where this processor's own are wider."""
    if kernels.instruction_set() != "AVX-512":
        return {}
    build.make_library(build.compiler(), folder / "kernels.so", ("-march=haswell",))
    narrow = ctypes.CDLL(str(folder / "kernels.so"))
    return {"AVX2 alone": lambda: patched("kernels.cpu.library", "_found", narrow)}


def within(context: Context, run: Callable[[], None]) -> Callable[[], None]:
    """Return a step in a context."""

    def step() -> None:
        with context():
            run()

    return step


def steps(setting: Setting, folder: Path) -> dict[str, Callable[[], None]]:
    """Return the steps to take in turn, by name."""
    size = setting.size or 224
    found = {PLAIN: bench.step(setting, None, size), REGULATED: bench.step(setting, setting.config, size)}
    if setting.compile:
        own = bench.step(setting, setting.config, size)
        return {**found, "cell written out": within(pieces()["cell written out"], own)}
    found |= {name: within(context, found[REGULATED]) for name, context in {**pieces(), **avx2(folder)}.items()}
    return found


def measure(setting: Setting) -> dict[str, Any]:
    """Median seconds of each step, and the machine."""
    with tempfile.TemporaryDirectory() as folder:
        times = bench.in_turn(steps(setting, Path(folder)), setting.rounds)
    return {
        "setting": {"model": setting.model, "train": setting.train, "batch": setting.batch, "size": setting.size},
        "machine": machine.machine("cpu"),
        "seconds": {name: statistics.median(own) for name, own in times.items()},
    }


def table(found: dict[str, dict[str, Any]]) -> str:
    """One line a piece: the time without it, relative to that with all, and below the ratio to the plain network."""
    names = dict.fromkeys(name for one in found.values() for name in one["seconds"] if name not in (PLAIN, REGULATED))
    lines = [f"| time / regulated | {' | '.join(found)} |", "|---" * (len(found) + 1) + "|"]
    for name in names:
        cells = [one["seconds"].get(name, 0) / one["seconds"][REGULATED] for one in found.values()]
        lines.append(f"| {name} | {' | '.join(f'{cell:.2f}' if cell else '' for cell in cells)} |")
    ratios = (one["seconds"][REGULATED] / one["seconds"][PLAIN] for one in found.values())
    return "\n".join([*lines, f"| *regulated / plain* | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |"])


def main() -> None:
    """Measure what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="only these")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--compiled", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, setting in (COMPILED if args.compiled else RUNS).items():
        path = args.out / f"{name}.json"
        if not args.names or name in args.names:
            if not path.exists():
                path.write_text(json.dumps(measure(setting), indent=1) + "\n")
            found[name] = json.loads(path.read_text())
    print(table(found))


if __name__ == "__main__":
    main()
