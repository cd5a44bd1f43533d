"""save and load: a regulated network, or its regulators alone, in one file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .apply import prepare
from .archive import read, write
from .cells import CELLS
from .config import RegulatorConfig
from .errors import CheckpointError, RegulateError, first_line
from .fit import (
    blocks,
    check_backbone,
    check_identity,
    check_layout,
    check_tensors,
    fingerprint,
    identity,
    layout,
)
from .fold import is_folded
from .guard import MARK, check_model, check_regulated, holders, regulators, unwrapped
from .planner import draw

File = str | os.PathLike[str]


def save(model: nn.Module, path: File, *, regulator_only: bool = False, also: Sequence[str] = ()) -> None:
    """Writes a regulated network to one safetensors file, with its options and plan in the metadata.

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
            tensor that is sharded or quantized, folded norms, parts regulated with different options.
        ValueError: `also` names no tensors, or comes without `regulator_only`.
        FileNotFoundError: there is no such folder.
    """
    check_regulated(model)
    model = unwrapped(model)
    if is_folded(model):
        raise CheckpointError(
            "a network that is optimized for inference has lost its norms and cannot be stored; save the original"
        )
    state = _state(model)
    record = {
        "model": identity(model),
        "config": _options(model).to_dict(),
        "plan": layout(blocks(model)),
        "content": "regulator" if regulator_only else "all",
    }
    if regulator_only:
        kept = (*(path for path, _ in regulators(model)), *_checked(also, state))
        record["also"] = list(also)
        record["backbone"] = fingerprint({key: value for key, value in state.items() if not _under(key, kept)})
        state = {key: value for key, value in state.items() if _under(key, kept)}
    elif also:
        raise ValueError("also= adds to regulator_only=True; without it everything is stored, leave also= out")
    write(path, state, record)


def load(model: nn.Module, path: File, *, inplace: bool = False) -> nn.Module:
    """Regulates a plain network as the saved one was and gives it the saved tensors.

    Args:
        model: the network without regulators, built as the saved one was: same class, same timm
            architecture, same number of classes, in the dtype of the file. Left untouched unless `inplace`.
        path: a file of `save`.
        inplace: change and return `model` itself. If the call fails, nothing changed.

    Returns:
        The regulated network, on the model's device and in its training mode.

    Raises:
        CheckpointError: the file is damaged, foreign, or of a newer format, or does not fit the model; the
            message says where. With regulators alone: the backbone is not the one they were trained on.
        AlreadyRegulatedError, UnsupportedModelError: as `regulate` does.
        FileNotFoundError: there is no such file.

    Example:
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
        check_identity(record["model"], identity(inner))
        config = RegulatorConfig.from_dict(record["config"])
        drawn = draw(model, config)
        check_layout(record["plan"], layout([stage.blocks for stage in drawn.stages]))
        prepared = prepare(model, drawn, config)
        base = inner.state_dict()
        if record["content"] == "regulator":
            kept = tuple(_checked(record["also"], base))
            check_backbone(record["backbone"], {key: value for key, value in base.items() if not _under(key, kept)})
            base = {key: value for key, value in base.items() if _under(key, kept)}
        check_tensors({**base, **prepared.state_dict()}, tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{path} does not fit this model: {error}") from error
    except (RegulateError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be applied to this model: {first_line(error)}") from error
    target = prepared.install(model, inplace)
    weightless = any(tensor.is_meta for tensor in base.values())
    unwrapped(target).load_state_dict(tensors, strict=record["content"] == "all", assign=weightless)
    return target


def _state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as safetensors takes it: on the CPU, contiguous, no two tensors in one memory."""
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, value in model.state_dict().items():
        if type(value) not in (Tensor, nn.Parameter) or value.is_meta or value.is_quantized:
            raise CheckpointError(
                f"a checkpoint holds plain tensors, and {key} is {_kind(value)}; gather a sharded model first "
                "(torch.distributed.checkpoint.state_dict.get_model_state_dict), save a quantized one before quantizing"
            )
        tensor = value.detach().cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        state[key] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return state


def _kind(value: Any) -> str:
    if isinstance(value, Tensor) and value.is_meta:
        return "on the meta device"
    return "a quantized tensor" if isinstance(value, Tensor) and value.is_quantized else f"a {type(value).__name__}"


def _options(model: nn.Module) -> RegulatorConfig:
    found = [getattr(type(holder), MARK).options for _, holder in holders(model)]
    if any(options != found[0] for options in found):
        raise CheckpointError(
            "a checkpoint holds one set of options, and parts of this model were regulated with different ones; "
            "save the parts one by one"
        )
    for _, regulator in regulators(model):
        if hasattr(regulator, "cell") and type(regulator.cell) not in CELLS.values():
            raise CheckpointError(
                f"a checkpoint cannot hold the code of a cell of your own, {type(regulator.cell).__name__}; keep the "
                "code, store model.state_dict(), and load it after regulate(model, cell=...)"
            )
    return RegulatorConfig.from_dict(found[0])


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
