"""The public functions: regulate and what goes with it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

from .build import build_stage
from .config import RegulatorConfig
from .fusion import Fusion
from .guard import check_regulated, holders
from .plan import Plan
from .planner import draw
from .splice import generate, rewrites
from .stage import install, uninstall

Cell = str | Callable[[int], nn.Module]


def regulate(
    model: nn.Module,
    cell: Cell = "lstm",
    *,
    kernel: str = "light",
    fusion: str = "paper",
    init: str = "identity",
    norm: str = "auto",
    stages: Sequence[str | int] | None = None,
    seed: int | None = None,
    inplace: bool = False,
    config: RegulatorConfig | None = None,
) -> nn.Module:
    """x"""
    options = _options(cell, kernel, fusion, init, norm, stages, seed, config)
    drawn = draw(model, options)
    drawn.warn_if_wide()
    work = rewrites(drawn)
    codes = {path: generate(model.get_submodule(path), rewrite) for path, rewrite in work.items()}
    fusions = {
        block.name: fused
        for stage in drawn.stages
        for block, fused in zip(stage.blocks, build_stage(model, stage, options), strict=True)
    }
    target = model if inplace else copy.deepcopy(model)
    for path, rewrite in work.items():
        own = {block.name: fusions[_join(path, block.name)] for block in rewrite.blocks}
        install(target.get_submodule(path), rewrite, codes[path], own)
    return target


def plan(
    model: nn.Module,
    cell: Cell = "lstm",
    *,
    input_size: int | Sequence[int] | None = None,
    kernel: str = "light",
    fusion: str = "paper",
    init: str = "identity",
    norm: str = "auto",
    stages: Sequence[str | int] | None = None,
    seed: int | None = None,
    config: RegulatorConfig | None = None,
) -> Plan:
    """x"""
    return draw(model, _options(cell, kernel, fusion, init, norm, stages, seed, config), input_size)


def _options(
    cell: Cell,
    kernel: str,
    fusion: str,
    init: str,
    norm: str,
    stages: Sequence[str | int] | None,
    seed: int | None,
    config: RegulatorConfig | None,
) -> RegulatorConfig:
    given = RegulatorConfig(cell, kernel, fusion, init, norm, stages, seed)  # type: ignore[arg-type]
    if config is None:
        return given
    if given != RegulatorConfig():
        raise TypeError("config= holds every option, but other options were given beside it; pass one or the other")
    return config


def unregulate(model: nn.Module) -> nn.Module:
    check_regulated(model)
    for _, holder in list(holders(model)):
        uninstall(holder)
    return model


def _join(root: str, path: str) -> str:
    return f"{root}.{path}" if root else path
