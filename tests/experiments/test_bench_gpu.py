"""The command for a GPU: what it does without one, what it writes, and what counts as a failure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import bench_gpu

pytestmark = pytest.mark.gate

ROOT = Path(__file__).parents[2]


def test_without_a_gpu_it_says_so_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", "--out", str(tmp_path / "out")])
    assert bench_gpu.main() == 2
    assert capsys.readouterr().err.splitlines() == [
        "bench_gpu: torch sees no CUDA GPU here, so there is nothing to measure"
    ]
    assert not (tmp_path / "out").exists()


def test_what_raises_and_what_comes_too_late_are_results(tmp_path):
    def broken():
        raise RuntimeError("no\nsuch kernel")

    found = bench_gpu.carry_out({"a": broken, "b": lambda: {"ms": {}}}, tmp_path, 60)
    assert found["a"]["raised"] == "RuntimeError: no such kernel"
    assert "broken" in found["a"]["trace"]
    assert json.loads((tmp_path / "b.json").read_text()) == {"ms": {}}
    late = bench_gpu.carry_out({"c": broken}, tmp_path, 0)
    assert late == {"c": {"left out": "no time was left"}}
    page = bench_gpu.page({**found, **late}, {"processor": "a GPU", "torch": "2", "python": "3"})
    assert "- `a`: raised: RuntimeError: no such kernel" in page
    assert "- `c`: left out: no time was left" in page


def test_a_wrong_kernel_fails_the_checks(monkeypatch):
    pytest.importorskip("triton", reason="torch brings no Triton on this platform")
    from tests.kernels import triton_job

    wanted = list(bench_gpu.cases(("rnn", "lstm"), ((1, 2, 4, 3), (1, 3, 2, 2))))
    assert len(wanted) == 2 * 2 * 2 * 2 + 2 * 2 * 2
    errors = iter([1e-7, float("nan"), 1.0, *[0.0] * len(wanted)])
    monkeypatch.setattr(triton_job, "worst", lambda *arguments: next(errors))
    monkeypatch.setattr(bench_gpu.gpu, "works", lambda device: True)
    found = bench_gpu.check("cpu", wanted)
    assert found["failed"] == 2
    page = bench_gpu.page({"checks": found}, {"processor": "a GPU", "torch": "2", "python": "3"})
    assert f"{len(wanted) - 2} of {len(wanted)} checks" in page
    monkeypatch.setattr(bench_gpu.gpu, "works", lambda device: False)
    monkeypatch.setattr(triton_job, "worst", lambda *arguments: 0.0)
    assert bench_gpu.check("cpu", wanted)["failed"] == 1


def test_the_whole_of_it_small_in_the_interpreter(tmp_path):
    pytest.importorskip("triton", reason="torch brings no Triton on this platform")
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(ROOT / "examples" / "bench_gpu.py"),
        "--smoke",
        "--out",
        str(tmp_path),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    names = ("checks", "resnet20-rnn-train", "forms", "profile", "machine")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["README.md", *(f"{name}.json" for name in names)]
    )
    page = (tmp_path / "README.md").read_text()
    assert "8 of 8 checks" in page
    assert "| `resnet20-rnn-train` |" in page
    assert "| 1x2x4x3, float32 |" in page
