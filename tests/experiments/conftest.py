"""What stands in for the data sets."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from torchvision.datasets import CIFAR10, CIFAR100

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from experiments import store


@pytest.fixture
def fake_cifar(monkeypatch):
    """A handful of images passes for CIFAR."""
    for kind in (CIFAR10, CIFAR100):
        monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
        monkeypatch.setattr(kind, "_load_meta", lambda self: setattr(self, "classes", []))
    monkeypatch.setattr(store, "DIGESTS", {})
