"""Carries jobs out: several at a time, a thread each, going on with what was begun, one JSON for each that is done."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch

from .checkpoint import written
from .loop import train
from .messages import EXPECTED, one_line
from .options import Options
from .registry import Job
from .results import read_failure, read_run
from .steps import DivergedError


@dataclass(frozen=True)
class Folders:
    """Where a runner reads and writes.

    Args:
        work: checkpoints, a folder a run.
        results: one JSON a finished run, and the networks that others start from.
        data: the data sets.
        cache: of the data sets as arrays; None for `data`.
    """

    work: Path
    results: Path
    data: str | None = None
    cache: str | None = None

    def result(self, job: Job) -> Path:
        """Return the file that says that a job is done."""
        return self.results / f"{job.key}.json"

    def failure(self, job: Job) -> Path:
        """Return the file that says that a job diverged."""
        return self.results / f"{job.failed_key}.json"

    def start(self, job: Job) -> Path | None:
        """Return the network that a job starts from, or None."""
        return self.results / f"{job.start_key}.safetensors" if job.start_key else None


def run_all(jobs: Iterable[Job], folders: Folders, at_a_time: int = 1, device: str | None = None) -> list[Job]:
    """Run what has no result yet; a run that diverged has one.

    Args:
        jobs: in the order in which they are begun; one that starts from another's network comes after it.
        folders: where to read and write.
        at_a_time: processes, of one thread each.
        device: as of `Options`.

    Returns:
        The jobs that are still without a result: they failed, or what they start from is missing.
    """
    waiting = [job for job in jobs if not read_run(job, folders.results) and not _diverged_before(job, folders)]
    running: dict[SpawnProcess, Job] = {}
    failed: list[Job] = []
    try:
        while waiting or running:
            ready = [job for job in waiting if (start := folders.start(job)) is None or start.exists()]
            for job in ready[: at_a_time - len(running)]:
                waiting.remove(job)
                running[_begun(job, folders, device)] = job
            if not running:
                break
            wait([process.sentinel for process in running])
            for process in [process for process in running if not process.is_alive()]:
                job = running.pop(process)
                if process.exitcode:
                    failed.append(job)
    finally:
        for process in running:
            process.terminate()
    # Another runner may have finished what this one could not begin.
    failed = [job for job in failed if not folders.result(job).exists()]
    for job in waiting:
        print(f"{job.name}: waits for {folders.start(job)}, which does not come", file=sys.stderr, flush=True)
    return failed + waiting


def _diverged_before(job: Job, folders: Folders) -> bool:
    failure = read_failure(job, folders.results)
    if failure:
        path = folders.failure(job)
        print(f"{job.name}: {failure['error']}, which is its result; see {path}", file=sys.stderr, flush=True)
    return failure is not None


def _begun(job: Job, folders: Folders, device: str | None) -> SpawnProcess:
    process = multiprocessing.get_context("spawn").Process(target=_work, args=(job, folders, device), daemon=True)
    process.start()
    return process


def _work(job: Job, folders: Folders, device: str | None) -> None:
    """In a process of its own; an error is one line."""
    torch.set_num_threads(1)
    try:
        with _diverged(job, folders):
            if not folders.result(job).exists():  # another runner may have finished it meanwhile
                run(job, folders, device)
    except KeyboardInterrupt:
        sys.exit(130)
    except EXPECTED as error:
        print(f"{job.name}: {one_line(error)}", file=sys.stderr, flush=True)
        sys.exit(2)


@contextmanager
def _diverged(job: Job, folders: Folders) -> Iterator[None]:
    """Leave a file that says so, of a run that diverges."""
    try:
        yield
    except DivergedError as error:
        _put(
            folders.failure(job),
            _head(job) | {"options": job.options.deciding(), "error": str(error).partition(";")[0]},
        )
        raise


def options_of(job: Job, folders: Folders, device: str | None = None) -> Options:
    """Return the options of a job's run."""
    start = folders.start(job)
    return replace(
        job.options,
        data=folders.data,
        cache=folders.cache,
        weights=str(start) if start else None,
        device=device,
        out=str(folders.work / job.key),
        name=job.name,
        resume=True,
    )


def run(job: Job, folders: Folders, device: str | None = None) -> None:
    """Train, and put the result into the folder of results."""
    options = options_of(job, folders, device)
    report = train(options)
    done = folders.result(job)
    if done.exists():
        raise RuntimeError(f"{done} was made by another runner meanwhile, and stays; this one's is in {options.out}")
    if job.start_key:
        report["start"] = {"network": job.start_key, "sha256": report["weights"]}
    done.parent.mkdir(parents=True, exist_ok=True)
    if job.arm.kept:
        with written(done.with_suffix(".safetensors")) as temporary:
            shutil.copyfile(Path(options.out) / "model.safetensors", temporary)
    _put(done, _head(job) | report)


def _head(job: Job) -> dict[str, Any]:
    return {"experiment": job.experiment.name, "arm": job.arm.name, "seed": job.seed}


def _put(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with written(path) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n")
