from __future__ import annotations

import os

# Before torch starts its pools: busy OpenMP threads of two test processes starve each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from regulate import regulate, save
from regulate.models.by_name import load_model

from .compatibility.uses import record

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    """A checkpoint of a regulated resnet18; tests that damage it take a copy."""
    path = tmp_path_factory.mktemp("good") / "model.safetensors"
    save(regulate(load_model("resnet18"), seed=1), path)
    return path


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_runtest_makereport(item):
    outcome = yield
    record(item, outcome.get_result())


# A test without a marker is of the first tier, which is run between two edits: see docs/contributing.md.
TIERS = ("zoo", "gate", "slow")


def tier(report):
    return next((name for name in TIERS if name in report.keywords), "quick")


def pytest_terminal_summary(terminalreporter):
    """Say what each tier took, added up over the workers."""
    reports = [one for found in terminalreporter.stats.values() for one in found if hasattr(one, "duration")]
    seconds = {name: sum(one.duration for one in reports if tier(one) == name) for name in ("quick", *TIERS[::-1])}
    said = ", ".join(f"{name} {spent:.0f}" for name, spent in seconds.items() if spent)
    terminalreporter.write_line(f"seconds by tier, all workers together: {said or 0}")
