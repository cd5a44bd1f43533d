from __future__ import annotations

import os

# Before torch starts its pools: busy OpenMP threads of two test processes starve each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from regulate import regulate, save
from regulate.models.by_name import load_model

from .uses import record

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
