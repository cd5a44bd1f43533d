"""The matrix of uses: each test marked with `@use(...)` stands behind a row of docs/compatibility.md."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regulate import regulate

from ..helpers import network, stir

# ResNets, squeeze-and-excitation with groups, wide; one pre-activation network; one dual path network.
TIMM = ("resnet18", "resnet50", "seresnext50_32x4d", "wide_resnet50_2", "resnetv2_18", "dpn48b")
TORCHVISION = ("torchvision/resnet18", "torchvision/resnet50", "torchvision/wide_resnet50_2")
ONE = ("torchvision/resnet18",)

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))


def use(
    group: str, title: str, models: tuple[str, ...] = ONE, fails: dict[str, str] | None = None
) -> Callable[[Any], Any]:
    """Marks a test as the proof of a row, one cell for each model.

    Args:
        group: the table.
        title: the row.
        models: the columns; the test gets each as `name`.
        fails: cells that do not work, with the cause. Their test fails on the day that they start to.
    """
    cells = [
        pytest.param(name, marks=pytest.mark.xfail(strict=True, reason=fails[name])) if name in (fails or {}) else name
        for name in models
    ]

    def mark(test: Any) -> Any:
        return pytest.mark.use(group, title)(pytest.mark.parametrize("name", cells)(test))

    return mark


def record(item: pytest.Item, report: pytest.TestReport) -> None:
    """Writes a cell's result where `REGULATE_USES_RESULTS` says."""
    folder, mark = os.environ.get("REGULATE_USES_RESULTS"), item.get_closest_marker("use")
    if not folder or not mark or (report.when != "call" and not report.skipped):
        return
    group, title = mark.args
    outcome = "yes" if report.passed else "failed"
    said = getattr(report, "wasxfail", None) or (report.skipped and str(report.longrepr[2])) or outcome
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    figures = {"group": group, "title": title, "model": parameters.get("name", ""), "said": said}
    Path(folder).mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(item.nodeid.encode()).hexdigest()[:16]
    (Path(folder) / f"{name}.json").write_text(json.dumps(figures))


@functools.cache
def _plain(name: str) -> nn.Module:
    return network(name)


@functools.cache
def _regulated(name: str) -> nn.Module:
    # Less than elsewhere: at random weights a squeeze-and-excitation amplifies rounding along with everything else.
    return stir(regulate(_plain(name)), 0.03).eval()


def plain(name: str) -> nn.Module:
    """A fresh network that looks trained, in eval mode."""
    return copy.deepcopy(_plain(name))


def regulated(name: str) -> nn.Module:
    """A fresh regulated network, its regulators moved from their start, in eval mode."""
    return copy.deepcopy(_regulated(name))


def close(a: Any, b: Any, tolerance: float = 1e-4) -> bool:
    """Whether tensors, or lists or dicts of tensors, are close and not trivial."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[key], b[key], tolerance) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(close(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if a.shape != b.shape or not a.any():
        return False
    return bool((a.double() - b.double()).norm() <= tolerance * b.double().norm())


def passing(model: nn.Module, paths: list[str], x: Tensor = X) -> list[Tensor]:
    """What the modules at the paths put out when the whole model runs."""
    seen: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(path).register_forward_hook(
            lambda module, args, out, path=path: seen.__setitem__(path, out.clone())
        )
        for path in paths
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return [seen[path] for path in paths]


def gradients(model: nn.Module, x: Tensor = X) -> dict[str, Tensor]:
    """The gradient of every parameter for one loss."""
    model.zero_grad()
    model(x).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
