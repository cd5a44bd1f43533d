"""Memory across the depth of a residual network.

`regulate(model, cell="lstm")` takes any ResNet-family network from timm, torchvision or your own code and
splices ConvRNN regulators into its residual blocks (Xu et al., "RegNet: Self-Regulated Network for Image
Classification", arXiv 2101.00590): same class, same weights, same outputs until it is trained.
"""

from . import _moved
from .api import plan, regulate, regulator_parameters, regulator_state_dict, unregulate
from .checkpoint.hub import from_pretrained, save_pretrained
from .checkpoint.save_load import load, save
from .config import RegulatorConfig
from .errors import (
    AlreadyRegulatedError,
    BlockCallError,
    CalibrationError,
    CheckpointError,
    NoBlocksError,
    NotRegulatedError,
    RegulateError,
    UnknownStageError,
    UnsupportedModelError,
)
from .nn.cells import ConvGRUCell, ConvLSTMCell, ConvRNNCell
from .rewrite.disable import disabled
from .rewrite.freezing import freeze_backbone
from .rewrite.guard import is_regulated
from .schema.plan import Block, Plan, Skipped, Stage
from .training.calibration import calibrate

__version__ = "0.1.0"

__getattr__ = _moved.moved

__all__ = [
    "regulate",
    "unregulate",
    "is_regulated",
    "plan",
    "calibrate",
    "disabled",
    "save",
    "load",
    "save_pretrained",
    "from_pretrained",
    "freeze_backbone",
    "regulator_parameters",
    "regulator_state_dict",
    "RegulatorConfig",
    "Plan",
    "Stage",
    "Block",
    "Skipped",
    "ConvRNNCell",
    "ConvGRUCell",
    "ConvLSTMCell",
    "RegulateError",
    "NoBlocksError",
    "UnknownStageError",
    "UnsupportedModelError",
    "AlreadyRegulatedError",
    "NotRegulatedError",
    "BlockCallError",
    "CalibrationError",
    "CheckpointError",
    "__version__",
]
