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


# The first that a test is marked with is its tier: see docs/contributing.md. What is not marked is quick.
TIERS = ("zoo", "gate", "slow", "quick")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Make `-m quick` choose what has no tier of its own."""
    for item in items:
        if not any(item.get_closest_marker(name) for name in TIERS):
            item.add_marker(pytest.mark.quick)


def pytest_terminal_summary(terminalreporter):
    """Say what each tier took, added up over the workers."""
    seconds = dict.fromkeys(reversed(TIERS), 0.0)
    for report in (one for found in terminalreporter.stats.values() for one in found if hasattr(one, "duration")):
        seconds[next(name for name in TIERS if name in report.keywords)] += report.duration
    said = ", ".join(f"{name} {spent:.0f}" for name, spent in seconds.items() if spent)
    terminalreporter.write_line(f"seconds by tier, all workers together: {said or 0}")
