"""What a network is run with: inputs of the user's, else images of a size that the network itself knows of."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._compat.operators import tree_leaves, tree_map
from ..utils.modes import fixed_random_state
from .effects import put_back

_DEFAULT_GRID = {1: (224,), 2: (224, 224), 3: (16, 112, 112)}
# Small and odd, so that what depends on the size shows.
_ODD_GRID = {1: (131,), 2: (97, 131), 3: (9, 49, 65)}
# What libraries call the size of an image, on a network or on its `config`.
_SIZE_NAMES = ("input_size", "in_size", "image_size", "img_size", "sample_size")


@dataclass(frozen=True)
class Inputs:
    """Arguments of a forward: tensors on the meta device, everything else as it is.

    Args:
        args: the positional ones.
        kwargs: the others, by name.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors, in order; a trace has a placeholder for each."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    @property
    def image(self) -> tuple[int, ...]:
        """Shape of the first map, batch axis included; empty if there is none."""
        return next((tuple(t.shape) for t in self.tensors if t.dim() > 2), ())

    def replaced(self, make: Callable[[int, Tensor], Any]) -> Inputs:
        """Return the same arguments with other values in place of the tensors, made from index and tensor."""
        count = itertools.count()
        args, kwargs = tree_map(
            lambda leaf: make(next(count), leaf) if isinstance(leaf, Tensor) else leaf, (self.args, self.kwargs)
        )
        return Inputs(tuple(args), kwargs)

    def odd(self) -> Inputs | None:
        """Return the same with an image of odd size; None where another tensor may have to fit it."""
        if len(self.tensors) != 1 or not self.image or len(self.image) - 2 not in _ODD_GRID:
            return None
        shape = (*self.image[:2], *_ODD_GRID[len(self.image) - 2])
        return self.replaced(lambda _, tensor: tensor.new_empty(shape))


@dataclass(frozen=True)
class Size:
    """Size of an image.

    Args:
        grid: its spatial axes; one number stands for each of them, None for a default.
        channels: None for what the first convolution takes.
    """

    grid: tuple[int, ...] | int | None = None
    channels: int | None = None

    def on(self, dims: int) -> tuple[int, ...]:
        """Return the grid for a network of so many spatial axes.

        Raises:
            ValueError: it has another number of axes.
        """
        if self.grid is None:
            return _DEFAULT_GRID[dims]
        grid = (self.grid,) * dims if isinstance(self.grid, int) else self.grid
        if len(grid) != dims:
            raise ValueError(f"its convolutions have {dims} spatial axes, the input {len(grid)}")
        return grid


def sizes(model: nn.Module, input_size: int | Sequence[int] | None = None) -> tuple[Size, ...]:
    """Return the sizes to try: the one asked for, else the network's own, then a default.

    Raises:
        ValueError, TypeError: `input_size` is no size.
    """
    if input_size is not None:
        return (_size(input_size),)
    return (*dict.fromkeys(_own_sizes(model)), Size())


def shapes(channels: int, dims: int, sizes: Sequence[Size]) -> Iterator[tuple[int, ...]]:
    """Yield the shapes of two images to try.

    What a network takes is what its first convolution takes, unless something rearranges the image before.

    Args:
        channels: of the first convolution's input.
        dims: its spatial axes.
        sizes: in the order to try them.

    Raises:
        ValueError: all sizes have another number of axes.
    """
    fitting = [size for size in sizes if not isinstance(size.grid, tuple) or len(size.grid) == dims]
    for size in fitting or sizes:
        grid = size.on(dims)
        yield from ((2, count, *grid) for count in dict.fromkeys((size.channels, channels, 3, 1)) if count)


def _size(value: Any) -> Size:
    numbers = (value,) if isinstance(value, int) else tuple(value) if isinstance(value, Sequence) else ()
    if not numbers or isinstance(value, str) or not all(type(n) is int for n in numbers):
        raise TypeError(f"input_size is H = W, (H, W), (C, H, W) or (C, D, H, W) in pixels, got {value!r}")
    if min(numbers) < 1 or len(numbers) > 4:
        raise ValueError(f"input_size is H = W, (H, W), (C, H, W) or (C, D, H, W) in pixels, got {value!r}")
    if isinstance(value, int):
        return Size(value)
    return Size(numbers[1:], numbers[0]) if len(numbers) > 2 else Size(numbers)


def _own_sizes(model: nn.Module) -> Iterator[Size]:
    """Return the sizes that a network, or a part of it, carries in its configuration; timm's card comes first."""
    for module in (model, *model.children()):
        card = getattr(module, "pretrained_cfg", None)
        known = card.get("input_size") if isinstance(card, Mapping) else getattr(card, "input_size", None)
        holders = (module, getattr(module, "config", None))
        values: list[Any] = [known, *(getattr(holder, name, None) for holder in holders for name in _SIZE_NAMES)]
        for value in values:
            with suppress(TypeError, ValueError):
                # (H, W, C), as Keras has it.
                is_last = isinstance(value, tuple | list) and len(value) == 3 and value[2] in (1, 3)
                yield _size((value[2], *value[:2]) if is_last else value)


def example(model: nn.Module, given: Any) -> Inputs | None:
    """Read `example_inputs=`: a tensor, a tuple of arguments, a dict of them by name, or a pair of both.

    Raises:
        TypeError: it is something else, holds no image, or the model's forward does not take it.
    """
    if given is None:
        return None
    inputs = Inputs(*_arguments(given)).replaced(lambda _, tensor: tensor.detach().to("meta"))
    if not inputs.image:
        raise TypeError(
            "example_inputs are the arguments of the model's forward: a tensor, a tuple of arguments, a dict of them "
            f"by name, or a pair (tuple, dict), with a map (N, C, H, W) among them; got {_shown(given)}"
        )
    try:
        inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs)
    except TypeError as error:
        raise TypeError(
            f"example_inputs are the arguments of {type(model).__name__}.forward, which does not take them: {error}; "
            "pass them as you call the model"
        ) from error
    return inputs


def _arguments(given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(given, Mapping):
        return (), dict(given)
    pair = isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], tuple | list)
    if pair and isinstance(given[1], Mapping):
        return tuple(given[0]), dict(given[1])
    return tuple(given) if isinstance(given, tuple) else (given,), {}


def _shown(given: Any) -> str:
    shapes = [tuple(leaf.shape) for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
    return f"tensors of shapes {shapes}" if shapes else f"a {type(given).__name__} without a tensor"


def guessed(module: nn.Module) -> Inputs:
    """Return placeholders for what a forward must be given, and for its first argument in any case."""
    parameters = enumerate(inspect.signature(module.forward).parameters.values())
    given = [p for at, p in parameters if p.kind is not p.VAR_KEYWORD and (not at or _is_required(p))]
    args = tuple(torch.empty(0, device="meta") for p in given if p.kind is not p.KEYWORD_ONLY)
    return Inputs(args, {p.name: torch.empty(0, device="meta") for p in given if p.kind is p.KEYWORD_ONLY})


def missing_arguments(module: nn.Module) -> str:
    """Say what a forward must be given beside its first argument, as a reason; empty if nothing."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    names = ", ".join(parameter.name for parameter in parameters[1:] if _is_required(parameter))
    if not names:
        return ""
    first = parameters[0].name
    return f"its forward needs {names} beside {first}; give example_inputs=({first}, ...)"


def _is_required(parameter: inspect.Parameter) -> bool:
    takes_any = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return parameter.default is parameter.empty and not takes_any


def recorded(bare: nn.Module, inputs: Inputs) -> dict[str, Inputs]:
    """Return what each module of a skeleton is called with first, by path, as far as the meta device takes it."""
    seen: dict[str, Inputs] = {"": inputs}

    def note(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.setdefault(path, Inputs(args, dict(kwargs)))

    with ExitStack() as hooks:
        for path, module in bare.named_modules():
            hooks.enter_context(module.register_forward_pre_hook(partial(note, path), with_kwargs=True))
        # If it fails, what was reached until then is known; the rest is tried with images.
        with suppress(Exception), torch.no_grad(), torch.device("meta"), fixed_random_state(), put_back(bare):
            bare(*inputs.args, **inputs.kwargs)
    return seen
