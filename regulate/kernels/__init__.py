"""Fast forms of the light cells: the same parameters, the same results to rounding, less memory traffic.

`reference.py` is the written-out step. Three faster forms stand beside it:

    native   C++ for float32 on the CPU (cpu/), of the wheel, or compiled once by the compiler that is there
    triton   for CUDA
    aten     torch operations that use their buffers again, for every device and type

`"auto"` takes the first that fits the tensors at hand, and the reference where none does: dense kernels, maps
that are not two-dimensional, tensor subclasses, function transforms, tracing and export. A setting for the
process is the environment variable REGULATE_KERNELS, one for a while and for this thread or task is `use`.
"""

from .choose import CHOICES, eager_on_cpu, setting, use
from .cpu.library import instruction_set, origin
from .cpu.library import why_not as why_no_native
from .mixing import joined, laid_out_as, mixed
from .norm import norm_relu
from .run_step import step

__all__ = [
    "CHOICES",
    "eager_on_cpu",
    "instruction_set",
    "joined",
    "laid_out_as",
    "mixed",
    "norm_relu",
    "origin",
    "setting",
    "step",
    "use",
    "why_no_native",
]
