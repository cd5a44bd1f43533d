"""The native kernels compiled for every instruction set of this kind of machine, each against the equations."""

from __future__ import annotations

import ctypes
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regulate import kernels
from regulate.kernels.cpu import build, library
from regulate.nn.cells import CELLS

from .test_kernels import LAYOUTS, SHAPES, alike, case, run

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Target:
    """An instruction set: its name, the flags for it, the floats of its vectors, and what it needs to run."""

    name: str
    flags: tuple[str, ...]
    lanes: int
    needs: str = ""


# The last one has no vectors as far as the source knows.
X86 = (
    Target("AVX-512", ("-march=skylake-avx512",), 16, "avx512f avx512bw avx512cd avx512dq avx512vl"),
    Target("AVX2", ("-march=haswell",), 8, "avx2 fma bmi2"),
    Target("SSE2", ("-march=x86-64",), 4),
    Target("generic", ("-march=x86-64", "-U__SSE__", "-U__SSE2__"), 4),
)
ARM = (Target("NEON", ("-march=armv8-a",), 4), Target("generic", ("-march=armv8-a", "-U__ARM_NEON"), 4))
TARGETS = X86 if platform.machine() in ("x86_64", "AMD64") else ARM if platform.machine() == "aarch64" else ()


@pytest.fixture(scope="module", params=TARGETS, ids=lambda target: target.name)
def compiled(request, tmp_path_factory):
    """A target and the path of the library for it, beside which the objects lie."""
    out = tmp_path_factory.mktemp(request.param.name) / "kernels.so"
    build.make_library(build.compiler(), out, request.param.flags)
    return request.param, out


@pytest.fixture
def loaded(compiled, monkeypatch):
    """The same, with the library in place of the one for this processor."""
    target, path = compiled
    known = Path("/proc/cpuinfo").read_text()
    lacking = [flag for flag in target.needs.split() if f" {flag} " not in known]
    if lacking:
        pytest.skip(f"compiled only: this processor has no {', '.join(lacking)}")
    found = ctypes.CDLL(str(path))
    monkeypatch.setattr(library, "library", lambda: found)
    return target


def test_its_name_and_the_width_of_its_vectors(loaded):
    assert kernels.instruction_set() == loaded.name
    assert library.library().regulate_lanes() == loaded.lanes


@pytest.mark.parametrize("zeros", [False, True], ids=["state", "zeros"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "last"])
@pytest.mark.parametrize("name", CELLS)
def test_a_step_against_the_equations(name, layout, zeros, loaded):
    for shape in SHAPES:
        arguments = case(name, shape, layout, zeros=zeros)
        alike(run("native", *arguments), run("reference", *arguments), 1e-5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "last"])
def test_norm_and_relu_against_torchs(layout, loaded):
    for shape in ((3, 5, 7, 6), (9, 33, 1, 1), (4, 17, 5, 9)):
        x = (torch.randn(shape, dtype=torch.float64) + 3).to(memory_format=layout)
        norm = nn.BatchNorm2d(shape[1])
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        wide = [t.detach().double().requires_grad_() for t in (x, norm.weight, norm.bias)]
        expected = F.relu(F.batch_norm(wide[0], None, None, *wide[1:], True))
        x = x.float().requires_grad_()
        y = kernels.norm_relu(norm, x)
        assert type(y.grad_fn).__name__ == "_NormReLUBackward"
        weight = torch.randn(shape) * (expected > 1e-4)  # where rounding cannot move it across zero
        found = torch.autograd.grad(y, [x, norm.weight, norm.bias], weight)
        right = torch.autograd.grad(expected, wide, weight.double())
        alike([y.double(), *(g.double() for g in found)], [expected, *right], 1e-4)
        assert kernels.norm_relu(norm.eval(), x) is None, "with running statistics torch's operators are as fast"


def test_no_comparison_is_broken_into_single_floats(compiled):
    """Which compilers do to vectors wider than the processor's, at three times the time of a step."""
    _, path = compiled
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("needs objdump, to read the machine code")
    for unit in path.parent.glob("*.o"):
        code = subprocess.run([objdump, "-d", str(unit)], capture_output=True, text=True, check=True).stdout
        assert re.search(r"\bv?(mul|add|fmadd\d+)ps\b|\bf(mul|mla)\s+v", code), "no vectors at all?"
        assert not re.findall(r"\bv?u?comiss\b|\bv?cmp\w*ss\b|\bfcmpe?\s+s.*", code), unit.name


def test_this_processors_own_library_is_as_wide_as_its_vectors():
    flags = Path("/proc/cpuinfo").read_text()
    widest = "AVX-512" if " avx512f " in flags else "AVX2" if " avx2 " in flags else None
    if widest is None:
        pytest.skip("neither AVX-512 nor AVX2 here: other sets are not told apart by /proc/cpuinfo alone")
    assert kernels.instruction_set() == widest
