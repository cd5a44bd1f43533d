"""The Triton kernels: in Triton's interpreter everywhere, compiled where there is a GPU."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch

from regulate import kernels
from regulate.kernels.cuda import gpu
from regulate.nn.cells import CELLS

pytestmark = pytest.mark.gate

pytest.importorskip("triton", reason="torch brings no Triton on this platform")

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("cell", CELLS)
def test_values_and_gradients_in_the_interpreter(cell):
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.triton_job", cell]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(cases) == 7
    assert all(error <= tolerance for *_, error, tolerance in cases), cases


def test_kernels_that_do_not_work_are_not_used():
    """Without the interpreter Triton has nothing to run on a CPU."""
    gpu.works.cache_clear()
    with pytest.warns(UserWarning, match="without its Triton kernels on cpu: a trial step raised"):
        assert not gpu.works("cpu")
    gpu.works.cache_clear()


@GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_values_and_gradients_on_a_gpu(cell, dtype):
    from .triton_job import FLOATS, case, worst

    for shape, last, zeros in itertools.product(((3, 5, 7, 6), (2, 64, 14, 14)), (False, True), (False, True)):
        tensors = [t.cuda() for t in case(cell, shape, last, dtype)]
        assert worst(cell, tensors, zeros) <= FLOATS[dtype]


@GPU
@pytest.mark.parametrize("cell", CELLS)
def test_the_cell_under_autocast_on_a_gpu(cell):
    one = CELLS[cell](16).cuda()
    x = torch.randn(2, 16, 9, 9, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        found = one(x, one(x, None))
        with kernels.use("reference"):
            expected = one(x, one(x, None))
    assert all(torch.allclose(a.float(), b.float(), atol=0.05) for a, b in zip(found, expected, strict=True))
    found[0].float().sum().backward()
    assert all(p.grad is not None for p in one.parameters())
