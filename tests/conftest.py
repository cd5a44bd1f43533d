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
    """Make `-m quick` choose what has no tier of its own, and tell the report of each test its tier."""
    for item in items:
        tier = next((name for name in TIERS if item.get_closest_marker(name)), "quick")
        item.add_marker(tier)
        item.user_properties.append(("tier", tier))


def pytest_terminal_summary(terminalreporter):
    """Say what each tier took, added up over the workers."""
    seconds = dict.fromkeys(reversed(TIERS), 0.0)
    reports = (one for found in terminalreporter.stats.values() for one in found)
    for report in (one for one in reports if isinstance(one, pytest.TestReport)):
        seconds[dict(report.user_properties).get("tier", "quick")] += report.duration
    said = ", ".join(f"{name} {spent:.0f}" for name, spent in seconds.items() if spent)
    terminalreporter.write_line(f"seconds by tier, all workers together: {said or 0}")
