"""Counts the tensors at the peak of a step. Unlike a resident set, which `bench` reads, they are the same in every run.

    python examples/bench_memory.py --json docs/results/performance/tensors.json [NAME ...]

Names are those of bench_suite.py. What libraries take without torch's allocator, such as oneDNN's scratch memory, is
not seen. Other work on the machine changes nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from bench_suite import REFERENCE, SUITE
from torch.profiler import ProfilerActivity, profile

from regulate import RegulatorConfig, plan
from regulate.tools.bench import Setting, step
from regulate.tools.machine import machine

NAMES = {
    name: setting
    for group in SUITE.values()
    for name, setting in group.items()
    if name not in REFERENCE and not setting.compile
}


def peak(run: Callable[[], object]) -> int:
    """Return the most bytes on torch's CPU allocator while a call lasts, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        run()
    results = seen.profiler.kineto_results  # type: ignore[union-attr]
    now = most = 0
    for event in sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def count(setting: Setting, config: RegulatorConfig | None) -> int:
    """Return the peak of building a network and two steps: weights, gradients and momentum included."""
    size = plan(setting.network(), config=setting.config, input_size=setting.size).input_size[-1]

    def work() -> None:
        run = step(setting, config, size)
        run()
        run()

    return peak(work)


def table(found: dict[str, dict[str, int]]) -> str:
    """Return the figures in Markdown."""
    lines = ["| tensors at the peak, MiB | plain | regulated | ratio |", "|---|---|---|---|"]
    for name, one in found.items():
        plain, regulated = one["plain"], one["regulated"]
        lines.append(f"| `{name}` | {plain / 2**20:,.0f} | {regulated / 2**20:,.0f} | {regulated / plain:.3f} |")
    return "\n".join(lines)


def main() -> None:
    """Count, print a table, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"only these of {', '.join(NAMES)}")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if unknown := set(args.names) - set(NAMES):
        parser.error(f"no such measurement: {', '.join(sorted(unknown))}")
    settings = {name: NAMES[name] for name in args.names or NAMES}
    found = {
        name: {"plain": count(setting, None), "regulated": count(setting, setting.config)}
        for name, setting in settings.items()
    }
    print(table(found))
    if args.json:
        args.json.write_text(json.dumps({"machine": machine("cpu"), "peak_bytes": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
