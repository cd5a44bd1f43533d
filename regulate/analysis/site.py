"""A residual block that can be regulated, between finding it and planning its stage."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..schema.plan import Block
from .dataflow import Dataflow
from .residual_blocks import Found


@dataclass(frozen=True)
class Site:
    """A block that can be regulated, with what stages are made of.

    Args:
        block: its plan.
        grid: spatial size at the write point.
        dtype: of the convolution there.
        found: its nodes.
        flow: the dataflow they are part of.
        root: path of the module that was traced.
    """

    block: Block
    grid: tuple[int, ...]
    dtype: torch.dtype
    found: Found
    flow: Dataflow
    root: str
