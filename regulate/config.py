"""The options of a regulator, as one validated value."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from inspect import Parameter, signature
from typing import Any, TypedDict, TypeVar

from torch import nn

# A row for each cell of the library: its gate convolutions, and the gates of each in the order of their weights.
# Gates g and n are in (-1, 1), by tanh; the others in (0, 1), by the sigmoid function.
CELL_GATES = {
    "rnn": {"gates": "n"},
    "gru": {"gates": "rz", "candidate": "n"},
    "lstm": {"gates": "ifgo"},
}
CHOICES = {
    "kernel": ("light", "dense"),
    "fusion": ("paper", "residual"),
    "init": ("identity", "unit", "random"),
    "norm": ("auto", "batch", "group", "none"),
}


Cell = str | Callable[[int], nn.Module]
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class RegulatorConfig:
    """Everything that decides what a regulator is. Immutable, comparable, JSON by `to_dict`.

    Args:
        cell: `"rnn"` (paper, Eq. (1)), `"gru"` (Ballas et al. 2016), `"lstm"` (Shi et al. 2015, no
            peepholes), or a callable `channels -> nn.Module` that follows the cell protocol
            (see `regulate.nn.cells`).
        kernel: `"light"`, the paper's grouped 1x1 and depthwise 3x3, or `"dense"`, one full 3x3.
            A callable cell brings its own kernel and ignores this.
        fusion: `"paper"` is `act(BN(W * concat[x, h]))`, Eq. (2) and (3); `"residual"` is
            `x + W * concat[x, h]` without norm and activation, which is the identity in train mode too.
        init: `"identity"` starts as the function the network was, with the fusion's statistics
            taken from the norm before it; `"unit"` is the same with unit statistics, kept for
            comparison; `"random"` is for training from scratch.
        norm: of what is new: `"auto"` follows the block's own norm, else `"batch"`, `"group"` or `"none"`.
        stages: names or 0-based indices, in forward order, of the stages to regulate; `None` is all of them, and
            `plan(model)` lists them. The name of a stage's first block will do. The paper's RegNet(i) is
            `stages=[i - 1]`.
        seed: seed of the private generator for new weights; `None` takes `torch.initial_seed()`. The global
            generator is not used.

    Raises:
        ValueError: an option has a value that it does not take.
        TypeError: an option has a value of the wrong type.

    Examples:
        >>> RegulatorConfig(cell="gru").to_dict()["cell"]
        'gru'
        >>> RegulatorConfig.from_dict({"cell": "gru"}) == RegulatorConfig(cell="gru")
        True
    """

    cell: Cell = "lstm"
    kernel: str = "light"
    fusion: str = "paper"
    init: str = "identity"
    norm: str = "auto"
    stages: tuple[str | int, ...] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        _check_cell(self.cell)
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(
                    f"{name} must be one of {_listed(allowed)}, got {value!r}; leave it out for {allowed[0]!r}"
                )
        object.__setattr__(self, "stages", _checked_stages(self.stages))
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int)):
            raise TypeError(f"seed must be an int or None, got {self.seed!r}; pass seed=0 to fix the weights")

    def to_dict(self) -> dict[str, Any]:
        """Return the options as JSON values.

        Raises:
            TypeError: the cell is a callable, which JSON cannot hold.
        """
        if not isinstance(self.cell, str):
            raise TypeError(
                f"a config can be written down only if its cell is one of {_listed(CELL_GATES)}, got the "
                f"callable {self.cell!r}; keep the code that builds it and pass it to regulate() again"
            )
        return {**asdict(self), "stages": self.stages and list(self.stages)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RegulatorConfig:
        """Rebuild a config from `to_dict`'s result; missing keys take their defaults.

        Raises:
            ValueError: a key is unknown or a value is not allowed.
            TypeError: a value has the wrong type.
        """
        unknown = sorted(set(values) - set(OPTIONS))
        if unknown:
            raise ValueError(f"a config has the keys {_listed(OPTIONS)}, found also {_listed(unknown)}; remove them")
        return cls(**values)


OPTIONS = tuple(field.name for field in fields(RegulatorConfig))


class Options(TypedDict, total=False):
    """The fields of `RegulatorConfig` beside the cell, as keywords, for type checkers."""

    kernel: str
    """See `RegulatorConfig`."""
    fusion: str
    """See `RegulatorConfig`."""
    init: str
    """See `RegulatorConfig`."""
    norm: str
    """See `RegulatorConfig`."""
    stages: Sequence[str | int] | None
    """See `RegulatorConfig`."""
    seed: int | None
    """See `RegulatorConfig`."""


def resolve_config(config: RegulatorConfig | None, cell: Cell, options: Options) -> RegulatorConfig:
    """Return the config that was given, or the one that cell and keywords make.

    Raises:
        TypeError: both were given, or a keyword is no option.
        ValueError: an option has a value that it does not take.
    """
    unknown = sorted(options.keys() - Options.__annotations__.keys())
    if unknown:
        raise TypeError(
            f"the options of a regulator are {_listed(Options.__annotations__)}, got an unexpected keyword argument "
            f"{unknown[0]!r}; see RegulatorConfig"
        )
    given = RegulatorConfig(cell, **options)  # type: ignore[arg-type]
    if config is not None and (options or cell != RegulatorConfig.cell):
        raise TypeError("config= holds every option, but other options were given beside it; pass one or the other")
    return config or given


def with_signature(function: Function) -> Function:
    """Let `help(function)` show the options and their defaults in place of `**options`."""
    own = signature(function)
    named = [p for p in own.parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
    options = [
        Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in fields(RegulatorConfig)
        if field.name in Options.__annotations__
    ]
    vars(function)["__signature__"] = own.replace(parameters=[*named, *options])
    return function


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _check_cell(cell: object) -> None:
    if isinstance(cell, str):
        if cell not in CELL_GATES:
            raise ValueError(
                f"cell must be one of {_listed(CELL_GATES)} or a callable channels -> nn.Module, got {cell!r}"
            )
    elif isinstance(cell, nn.Module):
        raise TypeError(
            "cell must be a name or a callable that builds a cell from a channel count, got a built "
            f"{type(cell).__name__}; pass `lambda channels: {type(cell).__name__}(channels)`, since each "
            "stage needs a cell of its own width"
        )
    elif not callable(cell):
        raise TypeError(f"cell must be one of {_listed(CELL_GATES)} or a callable, got {cell!r}")


def _checked_stages(stages: object) -> tuple[str | int, ...] | None:
    if stages is None:
        return None
    if isinstance(stages, str | int) or not isinstance(stages, Sequence):
        raise TypeError(f"stages must be a list of names or 0-based indices, got {stages!r}; write stages=[{stages!r}]")
    for entry in stages:
        if isinstance(entry, bool) or not isinstance(entry, str | int):
            raise TypeError(f"stages must hold names or 0-based indices, found {entry!r}")
    if not stages:
        raise ValueError("stages must name at least one stage, got none; leave it out for all stages")
    return tuple(stages)
