"""The layers of a fusion: torch's own classes, whose `forward` takes a faster way where the tensors allow it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .. import kernels
from .activations import cut, with_cut


class BatchNormReLU2d(nn.BatchNorm2d):
    """`ReLU(batch_norm(x))`: a batch norm whose output is rectified.

    Arguments, parameters and buffers are those of `torch.nn.BatchNorm2d`. In training on the CPU both are one pass
    over the map, in inference they share its memory. In a fusion it is given the map before the fusion as well, and
    adds what a ReLU would cut from that: see `cut`.

    Examples:
        >>> import torch
        >>> norm = BatchNormReLU2d(8)
        >>> norm(torch.randn(2, 8, 5, 5)).min().item()
        0.0
    """

    def forward(self, input: Tensor, unfused: Tensor | None = None) -> Tensor:
        """Normalise and rectify (N, C, H, W); running statistics move as in `torch.nn.BatchNorm2d`.

        Args:
            input: (N, C, H, W).
            unfused: None, or the map before the fusion, (N, C, H, W).
        """
        if isinstance(input, fx.Proxy):
            return _call_in_graph(self, *((input,) if unfused is None else (input, unfused)))
        fast = kernels.norm_relu(self, input, unfused)
        if fast is not None:
            return fast
        y = super().forward(input)
        maps = (y,) if unfused is None else (y, unfused)
        if not torch.is_grad_enabled() and kernels.eager_on_cpu(*maps):
            # In the norm's own result, which saves fresh memory for two maps.
            return y.relu_() if unfused is None else y.relu_().add_(cut("relu", unfused))
        return F.relu(y) if unfused is None else with_cut("relu", F.relu(y), unfused)


class Mix2d(nn.Conv2d):
    """A 1x1 convolution of the concatenation of two maps, which need not be concatenated for it.

    Arguments and parameters are those of `torch.nn.Conv2d`; called with one map it is that convolution.

    Examples:
        >>> import torch
        >>> mix, x, h = Mix2d(8, 5, 1), torch.randn(2, 5, 4, 4), torch.randn(2, 3, 4, 4)
        >>> torch.allclose(mix(x, h), mix(torch.cat([x, h], 1)), atol=1e-6)
        True
    """

    def forward(self, input: Tensor, second: Tensor | None = None) -> Tensor:
        """Convolve (N, C, H, W) or, of two maps, (N, A, H, W) and (N, C - A, H, W)."""
        if second is None:
            return super().forward(input)
        fast = kernels.mixed(input, second, self.weight, self.bias) if self._is_1x1() else None
        if fast is not None:
            return fast
        both = kernels.joined(input, second)
        if isinstance(both, fx.Proxy):
            return _call_in_graph(self, both)
        return kernels.laid_out_as(input, super().forward(both))

    def _is_1x1(self) -> bool:
        """Check whether it is what `kernels.mixed` computes; the weight may be anybody's."""
        return self.stride == (1, 1) and self.padding == (0, 0) and self.groups == 1


def _call_in_graph(module: nn.Module, *maps: Any) -> Any:
    """Stay one call in a graph of torch.fx, as torch's own layers do: its tracers look into all other classes."""
    tracer = maps[0].tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), maps, {})
