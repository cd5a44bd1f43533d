"""The state of a run: written after every epoch, wholly or not at all, and gone on with."""

from __future__ import annotations

import fcntl
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from regulate.checkpoint.archive import replaced

NAME = "checkpoint.pt"
_DAMAGED = (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError, pickle.UnpicklingError)


class TrainingError(RuntimeError):
    """Training cannot go on; the message is all that a user needs."""


@dataclass
class Run:
    """The state of a run, all that a checkpoint holds.

    Args:
        model: the network.
        optimizer: of its parameters.
        history: the figures of each epoch that is done.
        asked: what must be the same when the run goes on.
        parts: which code and machine the run was on, from which epoch.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    history: list[dict[str, float]]
    asked: dict[str, Any]
    parts: list[dict[str, Any]] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write the checkpoint, wholly or not at all."""
        states = {name: getattr(self, name).state_dict() for name in ("model", "optimizer")}
        others = {name: getattr(self, name) for name in ("history", "asked", "parts")}
        with written(path) as temporary:
            torch.save({**states, **others}, temporary)

    def load(self, path: Path) -> None:
        """Go on where the checkpoint was written; it must be of the same options."""
        state = read(path)
        other = sorted(key for key in self.asked if state["asked"].get(key) != self.asked[key])
        if other:
            raise TrainingError(
                f"{path} is of a run with other {', '.join(other)}; give another folder, or begin anew without it"
            )
        for name in ("model", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.history[:] = state["history"]
        self.parts[:] = state.get("parts", [])

    def goes_on(self, origin: dict[str, Any]) -> None:
        """Note on what the next epochs are run, unless the last ones were run on the same."""
        if not self.parts or any(self.parts[-1].get(key) != value for key, value in origin.items()):
            self.parts.append({"epoch": len(self.history), **origin})


def read(path: Path) -> dict[str, Any]:
    """Return what a checkpoint holds.

    Raises:
        TrainingError: it is damaged.
    """
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        if missing := sorted({"model", "optimizer", "history", "asked"} - state.keys()):
            raise KeyError(missing[0])
    except _DAMAGED as error:
        raise TrainingError(
            f"{path} is no whole checkpoint ({type(error).__name__}); delete it, and the run begins anew"
        ) from error
    return state


def keep_what_is_there(out: Path, resume: bool) -> None:
    """Make sure that no run's epochs are lost to one that was meant to go on, or for another folder.

    Raises:
        TrainingError: they would be.
    """
    path = out / NAME
    if resume or not path.exists():
        return
    if done := len(read(path)["history"]):
        raise TrainingError(
            f"{path} holds {done} epochs of a run; give --resume to go on with it, or another --out to begin another"
        )


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other processes from training in a folder, which is made: they would spoil each other's checkpoints.

    Raises:
        TrainingError: another one does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TrainingError(f"another process trains in {folder}; wait for it, or name another folder") from error
        yield


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """Yield a temporary file that takes the place of `path`, whose old content stays if it cannot be written.

    Raises:
        TrainingError: it cannot.
    """
    try:
        with replaced(path) as temporary:
            yield temporary
    except (OSError, RuntimeError, SafetensorError) as error:
        raise TrainingError(
            f"{path} cannot be written ({str(error).splitlines()[0]}); make room and go on: what was there is as it was"
        ) from error
