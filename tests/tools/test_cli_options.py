"""Options of the command line reach what they are of."""

from __future__ import annotations

import json

import pytest
import torch

from regulate import RegulatorConfig
from regulate.models.cifar import cifar_resnet
from regulate.testing import Verdict
from regulate.tools import cli
from regulate.tools.cli import main

OPTIONS = [
    ("cell", "gru"),
    ("kernel", "dense"),
    ("fusion", "residual"),
    ("init", "unit"),
    ("norm", "group"),
    ("stages", ["layer2"]),
    ("seed", 7),
]


@pytest.mark.parametrize(("option", "value"), OPTIONS)
def test_each_option_of_the_regulators_is_in_the_plan(option, value, capsys):
    assert main(["plan", "cifar/14", "--json", f"--{option}", str(value[0] if option == "stages" else value)]) == 0
    assert json.loads(capsys.readouterr().out)["options"] == {**RegulatorConfig().to_dict(), option: value}


@pytest.fixture
def shaken(monkeypatch):
    """Whether each network that was verified was given the look of a trained one."""
    asked = []
    monkeypatch.setattr(cli, "verify", lambda *given, shake: asked.append(shake) or Verdict(1, 0.0, 0.0, ()))
    return asked


def test_only_weights_that_are_not_trained_are_shaken(shaken, tmp_path, monkeypatch):
    weights = tmp_path / "a.pth"
    torch.save(cifar_resnet(14).state_dict(), weights)
    (tmp_path / "folder").mkdir()
    assert main(["verify", "cifar/14"]) == 0
    assert main(["verify", "cifar/14", "--weights", str(weights)]) == 0
    monkeypatch.setattr(cli, "open_model", lambda *given, **options: cifar_resnet(14))
    assert main(["verify", "cifar/14", "--pretrained"]) == 0
    assert main(["verify", str(tmp_path / "folder")]) == 0
    assert shaken == [True, False, False, False]


@pytest.mark.parametrize(
    ("command", "module", "advice"),
    [
        (["inspect", "cifar/14", "--images", "."], "PIL", "'torch-regulate[inspect]'"),
        (["inspect", "cifar/14", "--images", "."], "torchvision", "'torch-regulate[inspect]'"),
        (["plan", "cifar/14"], "timm", "'torch-regulate[timm]'"),
        (["plan", "cifar/14"], "huggingface_hub", "'torch-regulate[hub]'"),
        (["plan", "cifar/14"], "numpy", "numpy"),
    ],
)
def test_what_is_missing_is_installed_by_its_extra(command, module, advice, monkeypatch, capsys):
    def missing(*given, **options):
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(cli, "open_model", missing)
    assert main(command) == 2
    assert capsys.readouterr().err == f"regulate: this needs {module}, which is not installed; pip install {advice}\n"
