"""Networks as the command line names them: by name or folder, with weights from a file."""

from __future__ import annotations

import argparse
import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .. import CheckpointError, RegulatorConfig, from_pretrained, is_regulated, load, regulate, unregulate
from ..checkpoint.archive import is_archive
from ..checkpoint.save_load import options_of
from ..models.by_name import load_model
from ..schema.text import first_line

# Under which keys training scripts keep a state dict beside other things.
_NESTED = ("state_dict_ema", "state_dict", "model_ema", "model")


def open_model(
    name: str,
    *,
    pretrained: bool = False,
    weights: str | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    config: RegulatorConfig | None = None,
) -> nn.Module:
    """Return the network that a command was given.

    Args:
        name: a timm name, `torchvision/NAME`, `cifar/DEPTH`, or a folder that `save_pretrained` wrote.
        pretrained: with the library's pretrained weights.
        weights: a file of `regulate.save`, or a state dict (.safetensors, or anything that
            `torch.load(weights_only=True)` reads), of the plain or of the regulated network; of a checkpoint of
            timm's `train.py` the average, `state_dict_ema`, where there is one.
        num_classes: width of the classifier; by default the library's.
        in_chans: channels of the image; by default 3.
        config: options of the regulators in `weights`, where the file does not hold them.

    Returns:
        The network, plain or regulated, on the CPU.

    Raises:
        ValueError: there is no such network, the options do not fit a folder, or the weights do not fit.
        FileNotFoundError: there is no such file.
        CheckpointError: folder or file is damaged, or belongs to another network.
    """
    if Path(name).is_dir():
        if pretrained or weights or num_classes is not None or in_chans is not None:
            raise ValueError(
                f"{name} is a folder, which holds its own weights and sizes; leave out --pretrained, --weights, "
                "--num-classes and --in-chans"
            )
        return from_pretrained(name)
    model = load_model(name, pretrained, num_classes=num_classes, in_chans=in_chans)
    return model if weights is None else _with_weights(model, weights, config)


def backbone_and_options(model: nn.Module, config: RegulatorConfig) -> tuple[nn.Module, RegulatorConfig]:
    """Return a network without regulators, and the options of those it had.

    Args:
        model: a plain or regulated network; left as it is.
        config: the options that a plain network is to get.
    """
    if not is_regulated(model):
        return model, config
    return unregulate(copy.deepcopy(model)), options_of(model)


def _with_weights(model: nn.Module, path: str, config: RegulatorConfig | None) -> nn.Module:
    if is_archive(path):
        return load(model, path)
    state = _state_dict(path)
    if any(".regulator." in key for key in state):
        model = regulate(model, config=config or RegulatorConfig())
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"{path} does not fit {type(model).__name__}: {' '.join(str(error).split())[:300]}; give the "
            "--num-classes, --in-chans and options of the regulators that it was trained with"
        ) from error
    return model


def _state_dict(path: str) -> Mapping[str, Tensor]:
    """Read a state dict, on the CPU, out of what a training script may have put around it."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the arguments of timm's train.py
            found: Any = (
                load_file(path) if path.endswith(".safetensors") else torch.load(path, "cpu", weights_only=True)
            )
    except Exception as error:  # whatever a parser makes of bytes that anyone may have written
        raise CheckpointError(f"{path} holds no weights that can be read: {first_line(error)}") from error
    nested = (found[key] for key in _NESTED if isinstance(found, Mapping) and isinstance(found.get(key), Mapping))
    found = next(nested, found)
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise CheckpointError(f"{path} holds no state dict; store model.state_dict(), or call regulate.save")
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", key): value for key, value in found.items()}
