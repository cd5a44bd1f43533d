"""A cell's step beside what the machine allows: multiply-adds at its peak rate, bytes at its bandwidth.

    python examples/bench_limits.py [--cell lstm] [--march native] [--json FILE]

For the stages of ResNet-50 (batch 8, 224x224) and ResNet-20 (batch 64, 32x32). The limit is the longer of the two
times, as if all else were free and both overlapped perfectly. Counted are multiplications and multiply-adds, of which
an activation has some (see `ACTIVATIONS`); additions, comparisons and changes of bits are not, as some processors make
them beside. Bytes are those of the maps, each once. The bandwidth is that of STREAM's triad over as many bytes, as
often repeated as the step, so it is that of a cache where they fit one. Results lie in memory that was used before.
`--march haswell` compiles step and limits for AVX2 on a machine that has more.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regulate.kernels.cpu import build, library
from regulate.tools.machine import machine

STAGES = {
    "ResNet-50": [(8, 64, 56, 56), (8, 128, 28, 28), (8, 256, 14, 14), (8, 512, 7, 7)],
    "ResNet-20": [(64, 16, 32, 32), (64, 32, 16, 16), (64, 64, 8, 8)],
}
GATES = {"rnn": 1, "gru": 3, "lstm": 4}
NUMBER = {"rnn": 0, "gru": 1, "lstm": 2}

# Multiplications and multiply-adds of sigmoid and tanh: the polynomial, the power of two and the quotient, that as one.
ACTIVATIONS = {"sigmoid": 6, "tanh": 9}

# Per pixel, beside mix and 3x3: activations (sigmoid, tanh), and what joins them to the state or its gradient.
FORWARD = {"rnn": (0, 1, 0), "gru": (2, 1, 2), "lstm": (3, 2, 3)}
BACKWARD = {"rnn": (0, 0, 2), "gru": (2, 1, 12), "lstm": (3, 2, 18)}
MAPS = {"rnn": (3, 6), "gru": (3, 5), "lstm": (5, 8)}

# mix and 3x3 once; in the backward again (an RNN's mix alone), then the taps' sums, the gradient of the mix, and
# what it gives to x, h and the mix's two weights.
ONCE, BACK = 2 + 9, 9 + 9 + 4


def multiply_adds(cell: str, backward: bool) -> int:
    """Multiplications and multiply-adds of a step per pixel and channel."""
    sigmoids, tanhs, others = (BACKWARD if backward else FORWARD)[cell]
    again = 2 if backward and cell == "rnn" else ONCE
    each = again + BACK if backward else ONCE
    return each * GATES[cell] + sigmoids * ACTIVATIONS["sigmoid"] + tanhs * ACTIVATIONS["tanh"] + others


class Machine:
    """The limits of this machine, by a library compiled for `march`, and the step compiled for the same."""

    def __init__(self, march: str, folder: Path) -> None:
        command, target = build.compiler(), (f"-march={march}",)
        build.make_library(command, folder / "kernels.so", target)
        here = Path(__file__).with_suffix(".cpp")
        made, out = folder / "limits.o", folder / "limits.so"
        flags = ("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-Wno-psabi", "-I", str(Path(build.__file__).parent))
        subprocess.run([*command, *flags, *target, "-c", str(here), "-o", str(made)], check=True)
        # Without OpenMP's library: torch has loaded its own.
        subprocess.run([*command, "-shared", str(made), "-o", str(out)], check=True)
        self.step, self.limits = ctypes.CDLL(str(folder / "kernels.so")), ctypes.CDLL(str(out))
        self.limits.limits_per_round.restype = ctypes.c_int64
        self.limits.limits_multiply_adds.restype = ctypes.c_float

    def multiply_adds(self, threads: int, rounds: int = 2_000_000) -> float:
        """Return the most multiply-adds per second."""
        one, near = ctypes.c_float(1e-3), ctypes.c_float(0.999)
        run = lambda: self.limits.limits_multiply_adds(  # noqa: E731
            ctypes.c_int64(threads), ctypes.c_int64(rounds), near, one
        )
        return float(threads * rounds * self.limits.limits_per_round() / min(seconds(run, 10)))

    def bandwidth(self, size: int, threads: int) -> float:
        """Return the most bytes per second of a triad over arrays of `size` bytes together."""
        count = size // 12
        a, b, c = (torch.ones(count) for _ in range(3))
        rounds = max(1, 50_000_000 // size)
        arguments = [ctypes.c_int64(threads), ctypes.c_int64(rounds), ctypes.c_int64(count), ctypes.c_float(0.5)]
        run = lambda: self.limits.limits_triad(*arguments, *(ctypes.c_void_p(t.data_ptr()) for t in (a, b, c)))  # noqa: E731
        return 12 * count * rounds / min(seconds(run, 10))


def seconds(run: Callable[[], object], times: int) -> list[float]:
    """Seconds of some calls, after one that is not counted."""
    found = []
    for _ in range(times + 1):
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return found[1:]


def steps(cell: str, shape: tuple[int, ...]) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return a step forward and one backward, with all that they read and write."""
    rows, memory = GATES[cell] * shape[1], cell == "lstm"
    x, h, c, dh, dc, *out = (torch.randn(shape) for _ in range(10))
    weights = torch.randn(rows, 2, 1, 1), torch.randn(rows, 1, 3, 3) / 3, torch.randn(rows)
    sums = [weight.new_empty(library.chunks(x), *weight.shape) for weight in weights]
    start = NUMBER[cell], *weights, x, h
    old: Tensor | None = c if memory else None

    def forward() -> None:
        library.call("regulate_step", x, *start, old, None, None, *out[:2], None, None, None, None)

    def backward() -> None:
        kept = out[0] if cell == "rnn" else old
        library.call("regulate_step", x, *start, kept, dh, dc if memory else None, *out[2:5], *sums)

    return forward, backward


def measure(cell: str, machine: Machine, rounds: int) -> list[dict[str, Any]]:
    """One entry for each stage and direction."""
    threads = torch.get_num_threads()
    peak = machine.multiply_adds(threads)
    found = []
    for network, shapes in STAGES.items():
        for shape in shapes:
            pixels = shape[0] * shape[1] * shape[2] * shape[3]
            for backward, run in enumerate(steps(cell, shape)):
                size, count = 4 * pixels * MAPS[cell][backward], pixels * multiply_adds(cell, bool(backward))
                bandwidth = machine.bandwidth(size, threads)
                times = {"bytes": size / bandwidth, "multiply-adds": count / peak}
                took = statistics.median(seconds(run, rounds))
                found.append(
                    {
                        "network": network,
                        "shape": shape,
                        "direction": "backward" if backward else "forward",
                        "bytes": size,
                        "multiply_adds": count,
                        "bandwidth": bandwidth,
                        "seconds": {**times, "limit": max(times.values()), "reached": took},
                        "ratio": max(times.values()) / took,
                    }
                )
    return found


def table(found: dict[str, Any]) -> str:
    """Return the figures in Markdown."""
    cell, machine = found["cell"], found["machine"]
    rates = "; ".join(
        f"{threads} thread{'s' * (int(threads) > 1)}: {one['multiply_adds'] / 1e9:.0f}G multiply-adds, "
        f"{one['bandwidth'] / 1e9:.1f} GB per second"
        for threads, one in found["peak"].items()
    )
    head = (
        f"{machine['processor']}, {machine['instruction set']}, {machine['threads']} threads, "
        f"torch {machine['torch']}. Most of {rates}."
    )
    lines = [
        textwrap.fill(head, 100, break_on_hyphens=False),
        "",
        f"| {cell.upper()}, {machine['instruction set']} | MB | GB/s | multiply-adds | bytes, ms | multiply-adds, ms | "
        "reached, ms | limit / reached |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in found["steps"]:
        shape, times = "x".join(str(size) for size in one["shape"]), one["seconds"]
        lines.append(
            f"| {one['network']}, {shape}, {one['direction']} | {one['bytes'] / 1e6:.1f} | "
            f"{one['bandwidth'] / 1e9:.0f} | "
            f"{one['multiply_adds'] / 1e6:.0f}M | {times['bytes'] * 1e3:.2f} | {times['multiply-adds'] * 1e3:.2f} | "
            f"{times['reached'] * 1e3:.2f} | {one['ratio']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", default="lstm", choices=tuple(GATES))
    parser.add_argument("--march", default="native", help="what to compile for")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        limits = Machine(args.march, Path(folder))
        library._found = limits.step
        threads = torch.get_num_threads()
        # Arrays that no cache holds.
        peak = {
            str(some): {"multiply_adds": limits.multiply_adds(some), "bandwidth": limits.bandwidth(600_000_000, some)}
            for some in sorted({1, threads})
        }
        found = {"cell": args.cell, "machine": machine("cpu"), "march": args.march, "peak": peak}
        found["steps"] = measure(args.cell, limits, args.rounds)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
