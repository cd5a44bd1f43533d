"""What a checkpoint remembers of a network, and whether a network is the one that it remembers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..schema.plan import Block
from ..utils.classes import original

# What regulate.timm puts before the names of timm's architectures.
REGULATED = "regulated_"


def identity(model: nn.Module) -> dict[str, str | None]:
    """Class name, and architecture if timm built it."""
    card = getattr(model, "pretrained_cfg", None)
    architecture = card.get("architecture") if isinstance(card, Mapping) else None
    return {
        "class": original(type(model)).__qualname__,
        "timm": architecture.removeprefix(REGULATED) if isinstance(architecture, str) else None,
    }


def layout(stages: Iterable[Sequence[Block]]) -> list[list[dict[str, Any]]]:
    """Return what the tensors mean, as JSON: which blocks share a cell, where each reads and writes, and its form."""
    layout = [[{**asdict(block), "stride": list(block.stride)} for block in blocks] for blocks in stages]
    for block in (block for stage in layout for block in stage):
        del block["sources"]  # of the start only
    return sorted(layout, key=lambda stage: str(stage[0]["name"]))


def fingerprint(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Dtype, shape and a hash of each tensor; counters of batches are left out, no output depends on them."""
    return {key: _digest(value) for key, value in state.items() if not key.endswith("num_batches_tracked")}


def _digest(tensor: Tensor) -> str:
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{_describe(tensor)} {hashlib.sha256(plain.data).hexdigest()[:32]}"


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def differences(a: Mapping[str, str], b: Mapping[str, str]) -> list[str]:
    """Return the keys under which two records differ, those of the first one first."""
    return [key for key in {**a, **b} if a.get(key) != b.get(key)]


def check_identity(saved: Mapping[str, str | None], found: Mapping[str, str | None]) -> None:
    """Raise CheckpointError unless class and timm architecture are the saved ones."""
    if saved["class"] != found["class"]:
        raise CheckpointError(f"it holds a {saved['class']}, and this is a {found['class']}")
    if saved["timm"] and found["timm"] and saved["timm"] != found["timm"]:
        raise CheckpointError(f"it holds timm's {saved['timm']}, and this is {found['timm']}")


def check_layout(saved: Any, found: list[list[dict[str, Any]]]) -> None:
    """Raise CheckpointError unless the stages, and what every block does, are the saved ones."""
    if saved == found:
        return
    named = [[block["name"] for block in stage] for stage in saved], [[b["name"] for b in stage] for stage in found]
    if named[0] != named[1]:
        raise CheckpointError(f"its stages are {named[0]}, and those of this model are {named[1]}")
    pairs = zip(chain.from_iterable(saved), chain.from_iterable(found), strict=True)
    was, now = next((old, new) for old, new in pairs if old != new)
    fields = [field for field in now if was.get(field) != now[field]]
    raise CheckpointError(
        f"block {now['name']} was regulated with "
        + ", ".join(f"{field} {was.get(field)!r}, here {now[field]!r}" for field in fields)
    )


def check_backbone(saved: Mapping[str, str], state: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless a backbone's tensors have the saved fingerprint."""
    if any(tensor.is_meta for tensor in state.values()):
        raise CheckpointError("regulators alone need the backbone's weights, and these are on the meta device")
    found = fingerprint(state)
    differing = differences(saved, found)
    if differing:
        raise CheckpointError(
            f"the backbone is not the one that the regulators were trained on: {len(differing)} of {len(saved)} "
            f"tensors differ, first {differing[0]}. A backbone that was trained along changes, norm statistics too; "
            "freeze_backbone(model) keeps it, save(model, path) stores all of it, also= a new classifier"
        )


def check_tensors(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless names, dtypes and shapes are the expected ones."""
    there = {key: _describe(value) for key, value in expected.items()}
    given = {key: _describe(value) for key, value in found.items()}
    differing = differences(there, given)
    if differing:
        key = differing[0]
        raise CheckpointError(
            f"{len(differing)} tensors differ in name, dtype or shape, first {key}: {given.get(key, 'none')} in the "
            f"file, {there.get(key, 'none')} in the model; build the model with the same arguments"
        )
