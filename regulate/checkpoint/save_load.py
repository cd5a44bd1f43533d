"""save and load: a regulated network, or its regulators alone, in one file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor, fx, nn

from ..analysis.meta_copy import duplicate
from ..analysis.planner import make_plan
from ..config import RegulatorConfig
from ..errors import CheckpointError, RegulateError
from ..nn.cells import CELLS
from ..rewrite.guard import check_model, check_regulated, regulators, unwrapped
from ..rewrite.install import Prepared, prepare
from ..rewrite.lookup import blocks, chains, containers, displaced, regulator_keys, whole
from ..schema.text import first_line, last_line
from ..utils.rollback import all_or_nothing
from .archive import read, write
from .compatibility import (
    check_backbone,
    check_identity,
    check_layout,
    check_tensors,
    fingerprint,
    identity,
    layout,
)
from .foreign import prepared_for
from .tensors import fill, plain_state

File = str | os.PathLike[str]


def save(model: nn.Module, path: File, *, regulator_only: bool = False, also: Sequence[str] = ()) -> None:
    """Write a regulated network to one safetensors file, with its options and plan in the metadata.

    The file appears wholly or not at all; a killed process leaves what was there before.

    Args:
        model: a regulated model; a wrapper around one will do.
        path: the file, usually `*.safetensors`.
        regulator_only: store only the new tensors, and of every other one a fingerprint, norm statistics
            included: `load` takes the file only onto the very backbone that they were trained on, which
            `freeze_backbone` keeps as it is.
        also: paths of modules to store beside the regulators, such as a new classifier (`["fc"]`).

    Raises:
        NotRegulatedError: there are no regulators.
        CheckpointError: the model holds something that cannot be stored: a cell of the user's own, a
            tensor that is sharded or quantized, parts regulated with different options, a regulated
            stage of which a part was replaced or removed.
        ValueError: `also` names no tensors, or comes without `regulator_only`.
        FileNotFoundError: there is no such folder.
        OSError: the file cannot be written there.
    """
    check_regulated(model)
    model = unwrapped(model)
    state = plain_state(model)
    record = {
        "model": identity(model),
        "config": options_of(model).to_dict(),
        "plan": layout(blocks(model)),
        "content": "regulator" if regulator_only else "all",
    }
    if regulator_only:
        record["also"] = beside = _checked(also, state)
        kept = regulator_keys(model) | {key for key in state if _under(key, beside)}
        record["backbone"] = fingerprint({key: value for key, value in state.items() if key not in kept})
        state = {key: value for key, value in state.items() if key in kept}
    elif also:
        raise ValueError("also= adds to regulator_only=True; without it everything is stored, leave also= out")
    write(path, state, record)


def load(
    model: nn.Module,
    path: File,
    *,
    input_size: int | Sequence[int] | None = None,
    example_inputs: Any = None,
    inplace: bool = False,
) -> nn.Module:
    """Regulates a plain network as the saved one was and gives it the saved tensors.

    Args:
        model: the network without regulators, built as the saved one was: same class, same timm
            architecture, same number of classes, in the dtype of the file. Left untouched unless `inplace`.
        path: a file of `save`; or the safetensors file of another library, such as a checkpoint of transformers,
            with the state dict of a regulated network. Such a file has no record: cell, kernel, fusion, norm and
            stages are told by names and shapes.
        input_size: as `regulate` got it.
        example_inputs: as `regulate` got them.
        inplace: change and return `model` itself. If the call fails, nothing changed; to that end the call holds
            a copy of the model's tensors while it lasts.

    Returns:
        The regulated network, on the model's device and in its training mode.

    Raises:
        CheckpointError: the file is damaged, foreign, or of a newer format, or does not fit the model; the
            message says where. With regulators alone: the backbone is not the one they were trained on.
        AlreadyRegulatedError, UnsupportedModelError: as `regulate` does.
        FileNotFoundError: there is no such file.

    Examples:
        >>> import tempfile
        >>> from regulate import regulate
        >>> from torchvision.models import resnet18
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(regulate(resnet18(), cell="gru"), f"{folder}/model.safetensors")
        ...     model = load(resnet18(), f"{folder}/model.safetensors")
        >>> type(model.layer1[0].regulator.cell).__name__
        'ConvGRUCell'
    """
    check_model(model)
    record, tensors = read(path)
    inner = unwrapped(model)
    try:
        if record is None:
            prepared = prepared_for(inner, tensors, input_size, example_inputs)
        else:
            prepared = _prepared(inner, record, tensors, input_size, example_inputs)
    except CheckpointError as error:
        raise CheckpointError(f"{path} does not fit this model: {error}") from error
    except (RegulateError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be applied to this model: {first_line(error)}") from error
    target = model if inplace else duplicate(model)
    try:
        with all_or_nothing(target) if inplace else nullcontext():
            prepared.install(unwrapped(target))
            fill(unwrapped(target), tensors)
    except (CheckpointError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} could not be copied into this model, which is as it was: {last_line(error)}"
        ) from error
    return target


def _prepared(
    model: nn.Module, record: Mapping[str, Any], tensors: Mapping[str, Tensor], input_size: Any, example_inputs: Any
) -> Prepared:
    """Prepare what the record of a file of `save` says, and check that its tensors fit."""
    check_identity(record["model"], identity(model))
    config = RegulatorConfig.from_dict(record["config"])
    planned = make_plan(model, config, input_size, example_inputs)
    check_layout(record["plan"], layout([stage.blocks for stage in planned.stages]))
    prepared = prepare(model, planned, config)
    base = model.state_dict()
    if record["content"] == "regulator":
        kept = tuple(_checked(record["also"], base))
        check_backbone(record["backbone"], {key: value for key, value in base.items() if not _under(key, kept)})
        base = {key: value for key, value in base.items() if _under(key, kept)}
    check_tensors({**base, **prepared.state_dict(model)}, tensors)
    return prepared


def options_of(model: nn.Module) -> RegulatorConfig:
    """Return the options that a model was regulated with.

    Raises:
        CheckpointError: its parts were regulated with different ones, or with a cell that is not in this library.
    """
    found = [record.options for _, _, record in containers(model)]
    _check_whole(model)
    if any(options != found[0] for options in found):
        raise CheckpointError(
            "a checkpoint holds one set of options, and parts of this model were regulated with different ones; "
            "save the parts one by one"
        )
    for _, regulator in regulators(model):
        if hasattr(regulator, "cell") and not (type(regulator.cell) in CELLS.values() and found[0]["cell"] in CELLS):
            raise CheckpointError(
                f"a checkpoint cannot hold the code of a cell of your own, {type(regulator.cell).__name__}; keep the "
                "code, store model.state_dict(), and load it after regulate(model, cell=...)"
            )
    # Of a part that was regulated alone, or of a whole that is a part now, the names of stages were others.
    moved = any(path != record.path for path, _, record in containers(model))
    return RegulatorConfig.from_dict(found[0] | ({"stages": [s[0].name for s in blocks(model)]} if moved else {}))


def _check_whole(model: nn.Module) -> None:
    """Raise CheckpointError where a regulated stage lost its container or a block."""
    known = {chain: container for _, container, record in containers(model) for chain in record.chains}
    entire = whole(model)
    broken = [chain for chain in chains(model) if chain not in known]
    broken += [c for c, container in known.items() if not isinstance(container, fx.GraphModule) and c not in entire]
    broken += displaced(model)
    if broken:
        raise CheckpointError(
            f"a checkpoint says how to regulate the network again, and of {broken[0].name} a block, or the module that "
            "runs its blocks, was replaced, moved or removed since; store model.state_dict(), or make that change "
            "before regulate(model)"
        )


def _under(key: str, paths: Iterable[str]) -> bool:
    return any(key.startswith(f"{path}.") for path in paths)


def _checked(also: Sequence[str], state: Mapping[str, Tensor]) -> list[str]:
    if isinstance(also, str):
        raise TypeError(f"also must be a list of module paths, got {also!r}; write also=[{also!r}]")
    for path in also:
        if not any(_under(key, (path,)) for key in state):
            top = sorted({key.split(".")[0] for key in state})
            raise ValueError(f"also must name modules that hold tensors, and {path!r} does not; there are {top}")
    return list(also)
