"""From a plan to a regulated network."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import Tensor, nn

from .build import build_stage
from .config import RegulatorConfig
from .fusion import Fusion
from .guard import unwrapped
from .plan import Plan
from .splice import Code, Rewrite, generate, rewrites
from .stage import install
from .trace import join


@dataclass(frozen=True)
class Prepared:
    """Everything that a rewrite needs, made without a change to the model; what is left cannot fail.

    Args:
        rewrites: what is done to each holder, by path.
        codes: each holder's new code, by path.
        fusions: the new modules, by path of their block.
    """

    rewrites: dict[str, Rewrite]
    codes: dict[str, Code]
    fusions: dict[str, Fusion]

    def state_dict(self) -> dict[str, Tensor]:
        """The new tensors, under the names that they will have."""
        return {
            f"{block}.regulator.{key}": value
            for block, fusion in self.fusions.items()
            for key, value in fusion.state_dict().items()
        }

    def install(self, model: nn.Module, inplace: bool) -> nn.Module:
        """Carries the rewrite out, once.

        Args:
            model: the model that this was prepared for, or a wrapper that may stay around it.
            inplace: change `model` itself instead of a copy.

        Returns:
            The model or its copy, as wrapped as it was.
        """
        target = model if inplace else copy.deepcopy(model)
        for path, rewrite in self.rewrites.items():
            fusions = {block.name: self.fusions[join(path, block.name)] for block in rewrite.blocks}
            install(unwrapped(target).get_submodule(path), rewrite, self.codes[path], fusions)
        return target


def prepare(model: nn.Module, plan: Plan, config: RegulatorConfig) -> Prepared:
    """Generates the code and builds the modules that a plan asks for.

    Args:
        model: the network that the plan was drawn for; only read.
        plan: the plan.
        config: the options it was drawn with.

    Raises:
        TypeError: a cell of the user's own breaks the cell protocol.
    """
    inner = unwrapped(model)
    work = rewrites(plan)
    return Prepared(
        rewrites=work,
        codes={path: generate(inner.get_submodule(path), rewrite) for path, rewrite in work.items()},
        fusions={
            block.name: fusion
            for stage in plan.stages
            for block, fusion in zip(stage.blocks, build_stage(inner, stage, config), strict=True)
        },
    )
