"""Counts residual blocks by the classes that an architecture instantiates: independent of the finder.

Each row was read off the class's source: when does its forward add a shortcut, around a branch of two
convolutions or more? `python -m tests.zoo.count_blocks NAME ...` prints the counts that architectures.py holds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import nn

from regulate.models.by_name import load_model


def always(_: nn.Module) -> bool:
    return True


def has(attribute: str) -> Callable[[nn.Module], bool]:
    return lambda block: getattr(block, attribute) is not None


def adds_unless_skipless(block: nn.Module) -> bool:
    return not block.no_skip


T, V = "timm.models.", "torchvision.models."
RULES: dict[str, Callable[[nn.Module], bool]] = {
    f"{T}resnet.BasicBlock": always,
    f"{T}resnet.Bottleneck": always,
    f"{T}senet.SEResNetBlock": always,
    f"{T}senet.SEResNetBottleneck": always,
    f"{T}senet.SEResNeXtBottleneck": always,
    f"{T}senet.SEBottleneck": always,
    f"{T}resnetv2.PreActBasic": always,
    f"{T}resnetv2.PreActBottleneck": always,
    f"{T}resnetv2.Bottleneck": always,
    # create_shortcut gives None where the shape changes and the architecture wants no projection.
    f"{T}regnet.Bottleneck": has("downsample"),
    f"{T}regnet.PreBottleneck": has("downsample"),
    f"{T}byobnet.BasicBlock": has("shortcut"),
    f"{T}byobnet.BottleneckBlock": has("shortcut"),
    f"{T}byobnet.DarkBlock": has("shortcut"),
    f"{T}byobnet.EdgeBlock": has("shortcut"),
    f"{T}byobnet.SelfAttnBlock": has("shortcut"),
    f"{T}sknet.SelectiveKernelBasic": always,
    f"{T}sknet.SelectiveKernelBottleneck": always,
    f"{T}res2net.Bottle2neck": always,
    f"{T}resnest.ResNestBottleneck": always,
    f"{T}dpn.DualPathBlock": always,
    f"{T}inception_resnet_v2.Block35": always,
    f"{T}inception_resnet_v2.Block17": always,
    f"{T}inception_resnet_v2.Block8": always,
    f"{T}nfnet.NormFreeBlock": always,
    f"{T}cspnet.BottleneckBlock": always,
    f"{T}cspnet.DarkBlock": always,
    f"{T}cspnet.EdgeBlock": always,
    f"{T}tresnet.BasicBlock": always,
    f"{T}tresnet.Bottleneck": always,
    f"{T}dla.DlaBasic": always,
    f"{T}dla.DlaBottleneck": always,
    f"{T}dla.DlaBottle2neck": always,
    f"{T}xception.Block": always,
    f"{T}xception_aligned.XceptionModule": adds_unless_skipless,
    f"{T}xception_aligned.PreXceptionModule": adds_unless_skipless,
    # The mobile families: the shortcut exists where the shape does not change.
    f"{T}_efficientnet_blocks.InvertedResidual": lambda block: block.has_skip,
    f"{T}_efficientnet_blocks.DepthwiseSeparableConv": lambda block: block.has_skip,
    f"{T}_efficientnet_blocks.EdgeResidual": lambda block: block.has_skip,
    f"{T}rexnet.LinearBottleneck": lambda block: block.use_shortcut,
    f"{T}ghostnet.GhostBottleneck": always,
    # One convolution and two linear layers, unless these are written as convolutions.
    f"{T}convnext.ConvNeXtBlock": always,
    f"{V}resnet.BasicBlock": always,
    f"{V}resnet.Bottleneck": always,
    f"{V}regnet.ResBottleneckBlock": always,
    f"{V}video.resnet.BasicBlock": always,
    f"{V}video.resnet.Bottleneck": always,
    f"{V}quantization.resnet.QuantizableBasicBlock": always,
    f"{V}quantization.resnet.QuantizableBottleneck": always,
    f"{V}mobilenetv2.InvertedResidual": lambda block: block.use_res_connect,
}


def names(model: nn.Module) -> list[str]:
    """Paths of the residual blocks of two convolutions or more that the model instantiates."""
    found = []
    for path, module in model.named_modules():
        rule = RULES.get(f"{type(module).__module__}.{type(module).__qualname__}")
        convolutions = sum(isinstance(part, nn.modules.conv._ConvNd) for part in module.modules())
        if rule and rule(module) and convolutions >= 2:
            found.append(path)
    return found


def load_weightless(name: str) -> nn.Module:
    """The model without memory for its weights; torchvision's RegNet computes its widths with tensors."""
    with torch.device("cpu" if "torchvision/regnet" in name else "meta"):
        return load_model(name)


def main(architectures: list[str]) -> None:
    for name in architectures:
        print(f"{name!r}: {len(names(load_weightless(name)))},")


if __name__ == "__main__":
    main(sys.argv[1:])
