"""State dicts that other libraries have written: the options of the regulators in them, as names and shapes tell."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

from torch import Tensor, nn

from ..analysis.planner import make_plan
from ..config import CELL_GATES, CHOICES, RegulatorConfig
from ..errors import CheckpointError
from ..rewrite.install import Prepared, prepare
from ..schema.plan import Plan
from .compatibility import check_tensors

_CELL, _PART = ".regulator.cell.", ".regulator."


def prepared_for(model: nn.Module, tensors: Mapping[str, Tensor], input_size: Any, example_inputs: Any) -> Prepared:
    """Prepare a model for a state dict of a regulated one, of which nothing else is known.

    Raises:
        CheckpointError: there are no regulators in it, or none that fit the model.
    """
    config, base = options_in(tensors), model.state_dict()
    if config is None:
        raise CheckpointError(
            "it was not written by regulate.save and holds no regulators; load it into the plain network with "
            "load_state_dict, then call regulate"
        )
    drawn = make_plan(model, config, input_size, example_inputs)
    config = of_blocks(drawn, config, tensors.keys())
    _check_form(drawn, config, tensors.keys())
    configs = (replace(config, norm=norm) for norm in CHOICES["norm"])
    made = (prepare(model, make_plan(model, one, input_size, example_inputs), one) for one in configs)
    first = next(made)  # which follows the block's own norm
    prepared = next((one for one in chain([first], made) if {*base, *one.state_dict(model)} == tensors.keys()), first)
    check_tensors({**base, **prepared.state_dict(model)}, tensors)
    return prepared


def _check_form(planned: Plan, config: RegulatorConfig, keys: Collection[str]) -> None:
    """Raise CheckpointError where neither names nor shapes tell which function the fusions are.

    Without norms `fusion="paper"` has the same tensors as `"residual"`, and an activation besides.
    """
    without = config.fusion == "paper" and not _has("mix_norm", keys)
    if without and any(block.activation != "none" for stage in planned.stages for block in stage.blocks):
        raise CheckpointError(
            'without norms regulators of fusion="paper" and fusion="residual" have the same tensors; build the '
            "network, call regulate(model, ...) with the options that it had, then load_state_dict"
        )


def options_in(tensors: Mapping[str, Tensor]) -> RegulatorConfig | None:
    """Return the options of the regulators in a state dict; None if there are none. Norm and stages are left open.

    Raises:
        CheckpointError: they are none of this library's, or of a cell of the user's own.
    """
    first = next((key.split(_CELL)[0] for key in tensors if _CELL in key), None)
    if first is None:
        return None
    parts = {key.removeprefix(first + _CELL): value for key, value in tensors.items() if key.startswith(first + _CELL)}
    mix = tensors.get(f"{first}{_PART}mix.weight")
    cell = None if mix is None or mix.dim() < 2 else _cell(parts, mix.shape[1] - mix.shape[0])
    if cell is None:
        raise CheckpointError(
            f"the tensors of {first}.regulator are of no cell of this library ({', '.join(CELL_GATES)}); build the "
            "network, call regulate(model, cell=...) with that cell and the other options, then load_state_dict"
        )
    residual = _has("hidden_norm", tensors.keys()) and not _has("mix_norm", tensors.keys())
    kernel = "light" if "gates.mix" in parts else "dense"
    return RegulatorConfig(cell, kernel, fusion="residual" if residual else "paper")


def _cell(parts: Mapping[str, Tensor], width: int) -> str | None:
    """Return the cell whose gate convolutions have these biases, for a hidden state of so many channels."""
    held = {name.removesuffix(".bias"): len(bias) for name, bias in parts.items() if name.endswith(".bias")}
    rows = {cell: {conv: len(gates) * width for conv, gates in row.items()} for cell, row in CELL_GATES.items()}
    return next((cell for cell, row in rows.items() if row == held), None)


def of_blocks(planned: Plan, config: RegulatorConfig, keys: Collection[str]) -> RegulatorConfig:
    """Return options with those stages of a plan of all whose blocks have regulators in a state dict."""
    named = {key.split(_PART)[0] for key in keys if _PART in key}
    held = [stage.index for stage in planned.stages if any(block.name in named for block in stage.blocks)]
    return config if len(held) == len(planned.stages) else replace(config, stages=tuple(held))


def _has(part: str, keys: Collection[str]) -> bool:
    return any(f"{_PART}{part}." in key for key in keys)
