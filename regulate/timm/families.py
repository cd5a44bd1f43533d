"""Which architectures of timm have residual blocks that can be regulated."""

from __future__ import annotations

from fnmatch import fnmatch

import timm

from ..checkpoint.compatibility import REGULATED as PREFIX

__all__ = ["PREFIX", "architectures", "tagged"]

# Files of timm.models.
_MODULES = (
    "resnet", "senet", "resnetv2", "regnet", "byobnet", "byoanet", "sknet", "res2net", "resnest", "dpn",
    "inception_resnet_v2", "nfnet", "cspnet", "tresnet", "dla", "hrnet", "xception", "xception_aligned",
)  # fmt: skip
# Those of them where every stage has one block, which has nothing to carry, or whose blocks are no sequence.
_WITHOUT = ("resnet10t", "resnet14t", "resnest14d", "darknet17", "*_pruned", "mobileone_*", "repvgg_*", "test_*")


def architectures() -> list[str]:
    """Return the names of timm's architectures that have a regulated namesake, without the prefix."""
    return list(tagged())


def tagged() -> dict[str, list[str]]:
    """Return for each of them the names with their tags."""
    found: dict[str, list[str]] = {}
    for name in timm.list_models(module=_MODULES, include_tags=True):
        architecture = name.partition(".")[0]
        if not any(fnmatch(architecture, pattern) for pattern in _WITHOUT):
            found.setdefault(architecture, []).append(name)
    return found
