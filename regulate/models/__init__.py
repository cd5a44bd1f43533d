"""Networks: those of the paper for CIFAR, and any by its name."""

from .cifar import cifar_resnet

__all__ = ["cifar_resnet"]
