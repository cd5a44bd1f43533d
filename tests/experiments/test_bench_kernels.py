"""The scripts that measure the kernels: what they count, what they take away, and what they write."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import bench_ablations
import bench_limits

from regulate import kernels
from regulate.kernels.cpu import library
from regulate.nn.cells import CELLS
from regulate.nn.layers import BatchNormReLU2d

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _compiled():
    assert kernels.why_no_native() is None, "these tests need a C++ compiler"


def test_multiply_adds_are_those_of_the_equations():
    """Mix, 3x3 and activations; the backward adds to them twice the 3x3 and twice the mix."""
    assert bench_limits.multiply_adds("rnn", False) == 2 + 9 + 9
    assert bench_limits.multiply_adds("lstm", False) == 4 * (2 + 9) + 3 * 6 + 2 * 9 + 3
    for cell, gates in bench_limits.GATES.items():
        again = bench_limits.multiply_adds(cell, False) if cell != "rnn" else 2
        assert bench_limits.multiply_adds(cell, True) >= again + gates * (2 * 9 + 2 * 2)


def test_limits_of_small_steps(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_limits, "STAGES", {"small": [(2, 3, 4, 5)]})
    machine = bench_limits.Machine("native", tmp_path)
    monkeypatch.setattr(library, "_found", machine.step)
    found = bench_limits.measure("gru", machine, 2)
    assert [one["direction"] for one in found] == ["forward", "backward"]
    assert [one["bytes"] for one in found] == [4 * 120 * 3, 4 * 120 * 5]
    for one in found:
        assert 0 < one["ratio"] == one["seconds"]["limit"] / one["seconds"]["reached"]
        assert one["seconds"]["limit"] == max(one["seconds"]["bytes"], one["seconds"]["multiply-adds"])
    peak = machine.multiply_adds(1, 100_000)
    # More than scalars could do, and not what is optimised away.
    assert 2e9 < peak < 3e11


def test_the_command_prints_its_table_and_leaves_the_figures(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_limits, "STAGES", {"small": [(2, 3, 4, 5)]})
    monkeypatch.setattr(bench_limits.Machine, "bandwidth", lambda self, size, threads: 1e10)
    monkeypatch.setattr(library, "_found", library._found)  # put back afterwards
    monkeypatch.setattr(sys, "argv", ["bench_limits.py", "--rounds", "2", "--json", str(tmp_path / "limits.json")])
    bench_limits.main()
    found = json.loads((tmp_path / "limits.json").read_text())
    assert bench_limits.table(found) == capsys.readouterr().out.strip()
    assert found["machine"]["instruction set"] == kernels.instruction_set()


def test_a_piece_that_is_taken_away_does_not_run(monkeypatch):
    """Each context keeps the native library from what it names."""
    called = []
    call = library.call
    from regulate.kernels import norm
    from regulate.kernels.cpu import native

    for module in (native, norm):
        monkeypatch.setattr(module, "call", lambda name, *rest: (called.append(name), call(name, *rest)))
    cell, x, batch_norm = CELLS["lstm"](4), torch.randn(2, 4, 5, 5), nn.BatchNorm2d(4)

    def run(context):
        called.clear()
        with ExitStack() as stack:
            stack.enter_context(context())
            cell(x, None)
            kernels.norm_relu(batch_norm, x)
        return set(called)

    pieces = bench_ablations.pieces()
    both = {"regulate_step", "regulate_norm_relu"}
    assert run(ExitStack) == both
    assert run(pieces["norms with ReLU by torch"]) == {"regulate_step"}
    assert run(pieces["cell in aten"]) == run(pieces["cell written out"]) == {"regulate_norm_relu"}
    assert run(pieces["all of that"]) == set()
    assert run(pieces["mix by convolution"]) == run(ExitStack) == both


def test_norms_of_inference_in_fresh_memory_go_by_torchs_relu(monkeypatch):
    rectified, relu = [], F.relu
    monkeypatch.setattr(F, "relu", lambda x: rectified.append(x) or relu(x))
    norm, x = BatchNormReLU2d(4).eval(), torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        expected = norm(x)
        assert not rectified
        with bench_ablations.pieces()["norms of inference in fresh memory"]():
            assert torch.equal(norm(x), expected)
    assert len(rectified) == 1


def test_an_ablation_and_its_table():
    setting = replace(bench_ablations.RUNS["resnet20-eval"], batch=2, size=16, rounds=1)
    found = {"tiny": bench_ablations.measure(setting)}
    seconds = found["tiny"]["seconds"]
    assert {"plain", "regulated", "cell in aten"} <= set(seconds)
    line = f"| cell in aten | {seconds['cell in aten'] / seconds['regulated']:.2f} |"
    assert line in bench_ablations.table(found).splitlines()
