"""Times plan() and regulate(), beside the copy of the model that regulate() makes unless inplace.

python examples/bench_rewrite.py resnet18 resnet50 resnet152
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable

import torch

import regulate
from regulate.named import load_model


def seconds(work: Callable[[], object], runs: int = 5) -> float:
    work()
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    print(f"{'model':<12} {'plan':>7} {'copy':>7} {'regulate':>9} {'beyond the copy':>16}   (seconds, median of 5)")
    for name in names:
        model = load_model(name)
        copying = seconds(lambda model=model: copy.deepcopy(model))
        planning = seconds(lambda model=model: regulate.plan(model))
        whole = seconds(lambda model=model: regulate.regulate(model))
        print(f"{name:<12} {planning:>7.2f} {copying:>7.2f} {whole:>9.2f} {whole - copying:>16.2f}")


if __name__ == "__main__":
    main(sys.argv[1:] or ["resnet18", "resnet50", "resnet152"])
