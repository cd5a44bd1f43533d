"""Runs the registered experiments and makes their tables: every arm has the same seeds and data, no run is left out.

    python examples/compare.py list
    python examples/compare.py run scratch retrofit --data DIR --work runs/compare --results docs/results --jobs 2
    python examples/compare.py tables --results docs/results

`run` goes on with what an earlier call began, repeats nothing that is finished, and writes a JSON file for each run
that is done. `tables` writes each experiment's picture, and its table into README.md in the folder of results.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.checkpoint import written
from experiments.messages import EXPECTED, one_line
from experiments.options import COUNT
from experiments.plots import draw
from experiments.registry import EXPERIMENTS, Experiment, jobs
from experiments.results import read_runs
from experiments.runner import Folders, run_all
from experiments.tables import renewed, table


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = made.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the experiments and their arms")
    run = commands.add_parser("run", help="run what is not finished")
    run.add_argument("--data", help="folder of the data sets")
    run.add_argument("--cache", help="folder of the data sets as arrays, by default that of the data")
    run.add_argument("--work", type=Path, default=Path("runs/compare"), help="folder of checkpoints")
    run.add_argument("--jobs", type=COUNT, default=1, help="runs at a time, each with one thread")
    run.add_argument("--seeds", type=COUNT, help="only so many of the registered seeds")
    run.add_argument("--device", choices=("cpu", "cuda"))
    for command in (run, commands.add_parser("tables", help="tables and pictures of what is finished")):
        command.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help=", ".join(EXPERIMENTS))
        command.add_argument("--results", type=Path, default=Path("docs/results"), help="folder of the results")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what was asked. Return 0, 130 after Ctrl-C, 2 after an error or with runs that failed."""
    args = parser().parse_args(arguments)
    try:
        if args.command == "list":
            return show()
        unknown = sorted(set(args.experiments) - set(EXPERIMENTS))
        if unknown:
            raise ValueError(f"an experiment is one of {', '.join(EXPERIMENTS)}; got {', '.join(unknown)}")
        chosen = [EXPERIMENTS[name] for name in args.experiments] or _registered(args.results)
        return run(chosen, args) if args.command == "run" else tables(chosen, args.results)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    except EXPECTED as error:
        print(f"compare.py: {one_line(error)}", file=sys.stderr)
        return 2


def _registered(results: Path) -> list[Experiment]:
    """Those that the page of results names."""
    page = results / "README.md"
    if not page.exists():
        raise ValueError(f"there is no {page}; name the experiments")
    found = [one for one in EXPERIMENTS.values() if f"<!-- {one.name}:" in page.read_text()]
    if not found:
        raise ValueError(f"{page} has a place for no experiment; name the experiments")
    return found


def show() -> int:
    """Print the experiments and their arms."""
    for experiment in EXPERIMENTS.values():
        print(f"{experiment.name}: {experiment.title}; seeds 0 to {experiment.seeds - 1}")
        for arm in experiment.arms:
            print(f"    {arm.name}{f', from {arm.start}' if arm.start else ''}")
    return 0


def run(chosen: Sequence[Experiment], args: argparse.Namespace) -> int:
    """Run what is not finished."""
    # A runner that is told to stop takes its processes with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folders = Folders(args.work, args.results, args.data, args.cache)
    missing = run_all(jobs(chosen, args.seeds), folders, args.jobs, args.device)
    for job in missing:
        what = (
            "diverged, which is its result"
            if folders.failure(job).exists()
            else "not finished; the same command goes on"
        )
        print(f"{job.name}: {what}", file=sys.stderr)
    return 2 if missing else 0


def tables(chosen: Sequence[Experiment], results: Path) -> int:
    """Write the pictures, and the tables into the page of results; print the tables."""
    page = results / "README.md"
    text = page.read_text() if page.exists() else None
    for experiment in chosen:
        runs = read_runs(experiment, results)
        if runs:
            picture = results / experiment.name / "plot.png"
            draw(runs, picture, experiment.title, experiment.references[0], experiment.starts)
            print(f"{experiment.title}\n\n{table(runs, experiment.references, experiment.starts)}\n")
        else:
            print(
                f"{experiment.name}: no run in {results}; `compare.py run {experiment.name}` makes them",
                file=sys.stderr,
            )
        if text is not None and f"<!-- {experiment.name}:" in text:
            text = renewed(text, experiment, results)
    if text is not None:
        with written(page) as temporary:
            temporary.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
