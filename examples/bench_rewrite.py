"""Times plan() and regulate(), beside the copy of the model that regulate() makes unless inplace; and their memory.

python examples/bench_rewrite.py resnet18 resnet50 resnet152
"""

from __future__ import annotations

import copy
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable

import torch

import regulate
from regulate.models.by_name import load_model
from regulate.tools.machine import resident_peak


def seconds(work: Callable[[], object], runs: int = 5) -> float:
    work()
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def memory(name: str) -> int:
    model = load_model(name)
    return resident_peak(lambda: regulate.regulate(model, inplace=True))


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    print("seconds, median of 5; MiB by which memory rises at most, the copy not included (Linux)")
    print(f"{'model':<36} {'plan':>7} {'copy':>7} {'regulate':>9} {'beyond the copy':>16} {'MiB':>6}")
    for name in names:
        model = load_model(name)
        copying = seconds(lambda model=model: copy.deepcopy(model))
        planning = seconds(lambda model=model: regulate.plan(model))
        whole = seconds(lambda model=model: regulate.regulate(model))
        # A process of its own, whose memory nothing has been through before.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peak = pool.apply(memory, (name,)) / 2**20
        print(f"{name:<36} {planning:>7.2f} {copying:>7.2f} {whole:>9.2f} {whole - copying:>16.2f} {peak:>6.0f}")


if __name__ == "__main__":
    main(sys.argv[1:] or ["resnet18", "resnet50", "resnet152"])
