"""Config and plan as values, and the command line."""

from __future__ import annotations

import dataclasses
import inspect
import json
import subprocess
import sys

import pytest
from timm import create_model
from torch import nn

from regulate import NoBlocksError, Plan, RegulatorConfig, plan, regulate
from regulate.config import Options
from regulate.models.by_name import load_model
from regulate.models.cifar import cifar_resnet
from regulate.rewrite.guard import regulators
from regulate.testing import verify
from regulate.tools.cli import main

from ..helpers import small, small_block

pytestmark = pytest.mark.slow


def test_config_round_trip_through_json():
    config = RegulatorConfig("gru", "dense", "residual", "unit", "group", ["layer1", 2], 7)
    assert RegulatorConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(RegulatorConfig.from_dict(config.to_dict()))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.cell = "rnn"
    with pytest.raises(ValueError, match=r"found also 'cells'.*remove"):
        RegulatorConfig.from_dict({"cells": "gru"})
    assert RegulatorConfig.from_dict({}) == RegulatorConfig()


def test_a_config_is_the_options():
    model = cifar_resnet(20)
    config = RegulatorConfig("gru", stages=("layer2",), seed=3)
    a, b = regulate(model, config=config), regulate(model, "gru", stages=["layer2"], seed=3)
    assert all((x == y).all() for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert plan(model, config=config) == plan(model, "gru", stages=["layer2"], seed=3)


@pytest.mark.parametrize("name", ["resnet50", "resnet50_gn", "resnetaa50"])
def test_plan_round_trip_through_json(name):
    drawn = plan(create_model(name))
    assert Plan.from_dict(json.loads(json.dumps(drawn.to_dict()))) == drawn


def test_plan_of_resnet50():
    drawn = plan(create_model("resnet50"))
    assert [stage.name for stage in drawn.stages] == ["layer1", "layer2", "layer3", "layer4"]
    assert [stage.index for stage in drawn.stages] == [0, 1, 2, 3]
    assert [len(stage.blocks) for stage in drawn.stages] == [3, 4, 6, 3]
    assert [stage.grid for stage in drawn.stages] == [(56, 56), (28, 28), (14, 14), (7, 7)]
    first = drawn.stages[1].blocks[0]
    assert (first.name, first.read, first.write) == ("layer2.0", "layer2.0.conv2", "layer2.0.conv3")
    assert (first.read_width, first.write_width, first.stride, first.crop) == (128, 128, (2, 2), False)
    assert drawn.stages[1].blocks[1].stride == (1, 1)
    assert first.norm.kind == "batch"
    assert first.activation == "relu"
    assert first.sources[0].norm == "layer2.0.bn2"
    assert drawn.skipped == ()
    text = str(drawn)
    for part in ("layer3", "2,576,128", "conv2 /2", "14x14", "+10.1%", "+11.5%", "lstm cell"):
        assert part in text


def test_the_zero_padding_shortcut_counts_as_a_shortcut():
    for shortcut, parameters in (("A", 269_722), ("B", 272_474)):
        drawn = plan(cifar_resnet(20, shortcut=shortcut))
        assert [len(stage.blocks) for stage in drawn.stages] == [3, 3, 3]
        assert drawn.base_parameters == parameters


def test_plan_counts_what_regulate_makes():
    for options in (
        {},
        {"cell": "gru", "kernel": "dense"},
        {"fusion": "residual"},
        {"norm": "group"},
        {"norm": "none"},
    ):
        for name in ("resnet50", "resnet50_gn"):
            model = create_model(name)
            regulated = regulate(model, **options)
            new = sum(p.numel() for _, part in regulators(regulated) for p in part.parameters())
            assert plan(model, **options).parameters == new


def test_input_size_decides_the_grid():
    model = create_model("resnet18")
    assert plan(model).input_size == (3, 224, 224)
    assert plan(model, input_size=96).stages[0].grid == (24, 24)
    assert plan(model, input_size=(97, 131)).stages[0].grid == (25, 33)
    assert plan(model, input_size=(3, 64, 96)).stages[0].grid == (16, 24)
    video = load_model("torchvision/r3d_18")
    assert plan(video).input_size == (3, 16, 112, 112)
    assert plan(video, input_size=(3, 8, 64, 64)).stages[0].grid == (8, 32, 32)
    with pytest.raises(NoBlocksError, match="3 spatial axes, the input 2"):
        plan(video, input_size=(64, 64))
    assert plan(video, input_size=64).stages[0].grid == (64, 32, 32)
    assert plan(create_model("resnet18", in_chans=1)).input_size == (1, 224, 224)
    assert plan(create_model("ecaresnet26t")).input_size == (3, 256, 256)


def test_stages_by_name_and_index():
    model = create_model("resnet18")
    for stages in (["layer2", "layer4"], [1, 3], [3, "layer2"]):
        drawn = plan(model, stages=stages)
        assert [(s.name, s.index) for s in drawn.stages] == [("layer2", 1), ("layer4", 3)]
        assert [(s.name, s.reason) for s in drawn.skipped] == [
            ("layer1", "not among the stages asked for"),
            ("layer3", "not among the stages asked for"),
        ]
        regulated = regulate(model, stages=stages)
        assert {path.split(".")[0] for path, _ in regulators(regulated)} == {"layer2", "layer4"}


def test_a_stage_of_one_block_only_by_name():
    model = create_model("resnet10t")
    assert len(plan(model, stages=["layer1"]).blocks) == 1
    assert len(list(regulators(regulate(model, stages=[0])))) == 1


def test_norm_can_be_forced():
    model = cifar_resnet(14)
    kinds = {norm: plan(model, norm=norm).blocks[0].norm.kind for norm in ("auto", "batch", "group", "none")}
    assert kinds == {"auto": "batch", "batch": "batch", "group": "group", "none": "none"}


def test_import_needs_neither_timm_nor_torchvision():
    code = "import sys, regulate; sys.exit(any(m.split('.')[0] in ('timm', 'torchvision') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def run(capsys, *arguments):
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_cli_plan(capsys):
    code, out, _ = run(capsys, "plan", "resnet50", "--cell", "gru")
    assert code == 0
    assert out.strip() == str(plan(create_model("resnet50"), "gru"))
    code, out, _ = run(capsys, "plan", "torchvision/resnet18", "--stages", "layer1", "3", "--size", "64", "--json")
    assert code == 0
    assert [s.name for s in Plan.from_dict(json.loads(out)).stages] == ["layer1", "layer4"]


def test_cli_verify_passes(capsys):
    code, out, _ = run(capsys, "verify", "resnet18", "--size", "96")
    assert code == 0
    assert out.rstrip().endswith("pass")
    code, out, _ = run(capsys, "verify", "torchvision/resnet18", "--size", "64", "96", "--json", "--cell", "gru")
    figures = json.loads(out)
    assert code == 0
    assert figures["blocks"] == 8
    assert 0 <= figures["eval_error"] < 1e-5
    assert figures["without_gradient"] == []


def test_verify_regulates_at_the_size_that_it_runs_at():
    blocks = small(*(small_block() for _ in range(3)))
    model = nn.Sequential(blocks, nn.Flatten(), nn.Linear(8 * 16 * 16, 5))
    assert verify(model, RegulatorConfig(), (3, 16, 16)).passed


def test_cli_verify_takes_video(capsys):
    code, out, _ = run(capsys, "verify", "torchvision/r3d_18", "--size", "8", "32", "32")
    assert code == 0
    assert "input 3x8x32x32" in out


def test_cli_verify_fails_where_identity_or_gradients_are_missing(capsys):
    code, out, _ = run(capsys, "verify", "resnet18", "--size", "64", "--init", "random")
    assert code == 1
    assert out.rstrip().endswith("fail")
    code, out, _ = run(capsys, "verify", "resnet10t", "--size", "64", "--stages", "layer1")
    assert code == 1
    assert "layer1.0.regulator" in out, "one block has nothing to remember, so the forget gate gets no gradient"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("plan", "resnet19"), "did you mean"),
        (("plan", "torchvision/resnet19"), "torchvision has no model"),
        (("verify", "vgg11"), "no residual blocks"),
        (("plan", "resnet18", "--stages", "layer7"), "'layer1' (0)"),
    ],
)
def test_cli_errors_are_one_line(capsys, arguments, says):
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert says in err
    assert err.count("\n") == 1


def test_module_runs():
    done = subprocess.run([sys.executable, "-m", "regulate", "plan", "nosuchmodel"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("function", [regulate, plan])
def test_options_are_stated_once_and_shown_by_every_function(function):
    options = {field.name: field.default for field in dataclasses.fields(RegulatorConfig)}
    shown = {name: p.default for name, p in inspect.signature(function).parameters.items() if name in options}
    assert shown == options
    assert set(Options.__annotations__) == options.keys() - {"cell"}


@pytest.mark.parametrize("function", [regulate, plan])
def test_a_keyword_that_is_no_option_is_named(function):
    with pytest.raises(TypeError, match=r"'seed', got an unexpected keyword argument 'kernal'; see RegulatorConfig"):
        function(cifar_resnet(14), kernal="dense")
