"""The benchmark: what it measures, and how it is called."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from regulate import RegulatorConfig, kernels
from regulate.tools import bench
from regulate.tools.bench import Setting, in_turn, measure, report
from regulate.tools.cli import main

pytestmark = pytest.mark.gate

ROOT = Path(__file__).parents[2]


def test_the_networks_take_turns():
    order = []
    found = in_turn({name: lambda name=name: order.append(name) for name in "ab"}, 3)
    assert "".join(order) == "ab" * 5
    assert {name: len(own) for name, own in found.items()} == {"a": 3, "b": 3}


def test_a_step_takes_the_seconds_that_it_takes():
    found = in_turn({"short": lambda: None, "long": lambda: time.sleep(0.05)}, 2)
    assert all(0 <= seconds < 0.05 for seconds in found["short"])
    assert all(0.05 <= seconds < 5 for seconds in found["long"])


def test_figures_and_their_ratios():
    found = measure(Setting("cifar/20", RegulatorConfig("gru"), train=True, batch=4, size=16, rounds=2, stages=True))
    seconds, peaks = found["seconds"], found["peak_bytes"]
    assert list(seconds) == ["plain", "regulated", "layer1", "layer2", "layer3"]
    assert found["ratio"]["regulated"] == seconds["regulated"] / seconds["plain"]
    assert found["throughput"]["plain"] == 4 / seconds["plain"]
    assert found["memory_ratio"] == peaks["regulated"] / peaks["plain"]
    # 272,474 parameters with gradients and momenta are three megabytes.
    assert 3e6 < peaks["plain"] < 4e8
    # (33 C + 2 C^2) / 18 C^2 in a block of width C = 16, 32, 64: 0.226, 0.168, 0.140, and strides and stem besides.
    assert found["arithmetic"] == pytest.approx(1.185, abs=0.01)
    assert found["machine"]["kernels"] == "auto"
    assert found["machine"]["instruction set"] == kernels.instruction_set() is not None
    text = report(found)
    assert "cifar/20, gru light, train step, batch 4, 16x16, float32, NCHW, eager" in text
    assert f"kernels auto, native {kernels.instruction_set()}" in text
    assert "only layer2" in text


def test_a_network_that_takes_more_memory_is_seen_to():
    settings = (Setting("cifar/20", RegulatorConfig(), True, batch) for batch in (1, 64))
    small, large = (bench.peak_bytes(setting, None, 32) for setting in settings)
    # 64 images of 21 maps of some 0.1 MB each.
    assert large - small > 5e7


def test_channels_last_and_autocast_reach_the_step():
    seen = []
    setting = Setting("cifar/20", RegulatorConfig(), batch=2, channels_last=True, amp=True)
    model = setting.network()
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0].is_contiguous()))
    model.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Setting, "network", lambda self: model)
        bench.step(setting, None, 16)()
    assert seen == [False, torch.bfloat16]


def test_the_command(tmp_path, capsys):
    out = tmp_path / "found.json"
    command = ["bench", "cifar/20", "--cell", "rnn", "--batch", "2", "--size", "16", "--rounds", "1"]
    assert main([*command, "--out", str(out)]) == 0
    assert "multiply-adds 1." in capsys.readouterr().out
    assert json.loads(out.read_text())["setting"]["config"]["cell"] == "rnn"
    assert main([*command, "--out", str(tmp_path / "none" / "found.json")]) == 2
    assert capsys.readouterr().err.startswith("regulate: there is no folder")
    assert main([*command, "--json", "--in-chans", "1", "--num-classes", "7"]) == 0
    assert json.loads(capsys.readouterr().out)["setting"]["num_classes"] == 7
    assert main(["bench", "cifar/many"]) == 2
    assert "cifar/20 and so on" in capsys.readouterr().err
    assert kernels.setting() == "auto"


@pytest.mark.parametrize(
    ("script", "shown"),
    [
        ("bench_profile.py cifar/20 --cell rnn --train --batch 2 --size 16 --rounds 1 --lines 99", "_StepBackward"),
        ("bench_rewrite.py cifar/20", "cifar/20"),
        ("bench_memory.py resnet20-rnn-train", "| `resnet20-rnn-train`"),
    ],
)
def test_the_scripts_of_the_performance_page(script, shown):
    name, *options = script.split()
    command = [sys.executable, "-W", "ignore", str(ROOT / "examples" / name), *options]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert any(line.startswith(shown) for line in done.stdout.splitlines()), done.stderr
