from __future__ import annotations

import os

# Before torch starts its pools: busy OpenMP threads of two test processes starve each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from .uses import record

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_runtest_makereport(item):
    outcome = yield
    record(item, outcome.get_result())
