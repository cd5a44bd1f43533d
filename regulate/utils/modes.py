"""Running a model in another mode, or with fixed random numbers, for a while."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Train or eval mode for the body; each module's own mode comes back after it."""
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            # Not module.train(), which would reach into children and may be frozen.
            module.training = mode


@contextmanager
def private_rng(seed: int | None, salt: int) -> Iterator[None]:
    """Seed the CPU generator for the body and put it back; a seed of `None` is `torch.initial_seed()`."""
    base = torch.initial_seed() if seed is None else seed
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would seed the GPU generators as well. The factor is odd and large: neighbouring
        # seeds and salts have no state in common.
        torch.default_generator.manual_seed((base + salt * 0x9E3779B1) % 2**63)
        yield


@contextmanager
def fixed_random_state() -> Iterator[None]:
    """Run the body with the same random numbers each time: Python's, numpy's and those of torch's CPU generator.

    Their states are put back after it.
    """
    python, arrays = random.getstate(), np.random.get_state()
    try:
        with private_rng(0, 0):
            random.seed(0)
            np.random.seed(0)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
