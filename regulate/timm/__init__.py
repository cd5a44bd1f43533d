"""Regulated architectures in timm's registry: `import regulate.timm` is all it takes.

Each ResNet-family architecture of timm gets a namesake with the prefix `regulated_`, which `timm.create_model` and
timm's scripts take like any other. It is built as timm builds the original, pretrained weights included, and then
regulated; the options of `regulate` are keywords.

Examples:
    >>> import regulate.timm, timm
    >>> model = timm.create_model("regulated_resnet18", cell="gru", num_classes=10)
    >>> type(model).__name__, type(model.layer1[0].regulator.cell).__name__
    ('ResNet', 'ConvGRUCell')
    >>> timm.list_models("regulated_resnet3*")
    ['regulated_resnet32ts', 'regulated_resnet33ts', 'regulated_resnet34', 'regulated_resnet34d']
"""

from .families import PREFIX, architectures
from .regulated import register

__all__ = ["PREFIX", "architectures"]

register()
