"""What `regulate bench` is told reaches the networks that it measures, whatever they take."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from regulate import RegulatorConfig, is_regulated
from regulate.models.cifar import cifar_resnet
from regulate.testing import example_inputs
from regulate.tools import bench
from regulate.tools.bench import Setting, measure, report, step
from regulate.tools.cli import main

from ..helpers import small

LSTM = RegulatorConfig()


def test_every_option_of_the_command_is_in_the_setting(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(bench, "measure", lambda setting: asked.append(setting) or {})
    switches = ["--train", "--amp", "--channels-last", "--compile", "--checkpointing", "--by-stage", "--json"]
    numbers = ["--batch", "3", "--rounds", "4", "--size", "16", "--num-classes", "7", "--in-chans", "1"]
    assert main(["bench", "cifar/14", "--cell", "gru", "--device", "cuda", *switches, *numbers]) == 0
    switched = dict.fromkeys(("train", "amp", "channels_last", "compile", "checkpointing", "stages"), True)
    sizes = {"batch": 3, "rounds": 4, "size": 16, "num_classes": 7, "in_chans": 1}
    assert asked == [Setting("cifar/14", RegulatorConfig("gru"), device="cuda", **switched, **sizes)]
    assert main(["bench", "cifar/14", "--json"]) == 0
    assert asked[1] == Setting("cifar/14", LSTM)


@pytest.fixture
def network(monkeypatch):
    """The network that is measured, of which a test may see more."""
    model = cifar_resnet(14)
    monkeypatch.setattr(Setting, "network", lambda self: model)
    return model


@pytest.mark.parametrize("on", [False, True])
@pytest.mark.parametrize("config", [None, LSTM])
def test_checkpointing_and_compile_reach_the_network(config, on, network, monkeypatch):
    switched, compiled = [], []
    network.set_grad_checkpointing = switched.append
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    step(Setting("", LSTM, checkpointing=on, compile=on), config, 16)
    assert switched == [True] * on
    assert compiled == [network] * on
    assert is_regulated(network) == (config is not None)


def test_a_network_without_checkpointing_is_refused(network):
    with pytest.raises(ValueError, match="needs a network with set_grad_checkpointing; cifar/14 has none"):
        step(Setting("cifar/14", LSTM, checkpointing=True), None, 16)


def test_it_is_regulated_at_the_size_that_it_runs_at(monkeypatch):
    model = nn.Sequential(small(), nn.Flatten(), nn.Linear(8 * 16 * 16, 5))
    monkeypatch.setattr(Setting, "network", lambda self: model)
    step(Setting("", LSTM, batch=1), LSTM, 16)()
    assert is_regulated(model)


@pytest.mark.slow
def test_video(monkeypatch):
    monkeypatch.setattr(bench, "peak_bytes", lambda *given: None)
    found = measure(Setting("torchvision/r3d_18", LSTM, batch=1, size=16, rounds=1))
    assert found["setting"]["input"] == [3, 16, 16, 16]
    assert "batch 1, 16x16x16, float32" in report(found)


@pytest.mark.slow
def test_images_have_the_channels_of_the_plan():
    # The first convolution takes 48, of images that have been rearranged.
    step(Setting("tresnet_m", LSTM, batch=1), None, (3, 32, 32))()


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True])
def test_a_detector_gets_its_targets(train):
    step(Setting("torchvision/fasterrcnn_mobilenet_v3_large_320_fpn", LSTM, train, batch=1), None, (3, 32, 32))()


def test_targets_lie_where_the_network_does():
    model = type("Detector", (torch.nn.Linear,), {"__module__": "torchvision.models.detection.own"})(
        1, 1, device="meta"
    )
    images, targets = example_inputs(model, (3, 32, 32))
    assert {value.device.type for value in (*images, *targets[0].values())} == {"meta"}
