"""Networks as commands take them: by name, with a head of one's own, from a file, from a folder."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from regulate import CheckpointError, RegulatorConfig, is_regulated, save, save_pretrained
from regulate.tools.cli import main
from regulate.tools.open_model import backbone_and_options, open_model

from ..helpers import stirred

pytestmark = pytest.mark.slow

TEN = {"num_classes": 10, "in_chans": 1}


def ten_classes():
    return timm.create_model("resnet18", **TEN).eval()


def alike(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize(("name", "channels"), [("resnet18", 1), ("cifar/20", 1), ("torchvision/resnet18", 3)])
def test_classes_and_channels(name, channels):
    model = open_model(name, num_classes=7, in_chans=channels).eval()
    assert model(torch.zeros(1, channels, 64, 64)).shape == (1, 7)


def test_a_library_that_takes_no_channels_says_so():
    with pytest.raises(ValueError, match="3 channels, got --in-chans 1"):
        open_model("torchvision/resnet18", in_chans=1)
    with pytest.raises(ValueError, match="come with their own classes"):
        open_model("torchvision/resnet18", pretrained=True, num_classes=7)


@pytest.mark.parametrize("around", [None, "state_dict", "model"])
def test_weights_of_a_plain_network(around, tmp_path):
    model = ten_classes()
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save(state if around is None else {around: state, "epoch": 3}, tmp_path / "a.pth")
    opened = open_model("resnet18", weights=str(tmp_path / "a.pth"), **TEN)
    assert not is_regulated(opened)
    assert alike(opened, model)


def test_weights_of_a_regulated_network(tmp_path):
    model = stirred(ten_classes(), cell="gru")
    save(model, tmp_path / "a.safetensors")
    save_file(model.state_dict(), tmp_path / "b.safetensors")
    options = RegulatorConfig("gru")
    for name in ("a.safetensors", "b.safetensors"):
        opened = open_model("resnet18", weights=str(tmp_path / name), config=options, **TEN)
        assert alike(opened, model)
    backbone, found = backbone_and_options(opened, RegulatorConfig())
    assert is_regulated(opened)
    assert not is_regulated(backbone)
    assert found.cell == "gru"


def test_weights_that_do_not_fit(tmp_path):
    torch.save(ten_classes().state_dict(), tmp_path / "a.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("nothing")
    with pytest.raises(ValueError, match=r"does not fit ResNet: .*give the --num-classes"):
        open_model("resnet18", weights=str(tmp_path / "a.pth"))
    with pytest.raises(CheckpointError, match="holds no state dict"):
        open_model("resnet18", weights=str(tmp_path / "list.pth"))
    with pytest.raises(CheckpointError, match="no weights that can be read"):
        open_model("resnet18", weights=str(tmp_path / "text.pth"))
    with pytest.raises(FileNotFoundError):
        open_model("resnet18", weights=str(tmp_path / "none.pth"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    save_pretrained(stirred(ten_classes(), cell="rnn"), path, model_args={"in_chans": 1})
    return str(path)


def test_every_command_takes_a_folder(folder, capsys):
    assert main(["plan", folder, "--json", "--input-size", "64"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert (planned["options"]["cell"], planned["input_size"]) == ("rnn", [1, 64, 64])
    assert main(["verify", folder, "--json", "--input-size", "64"]) == 0
    assert json.loads(capsys.readouterr().out)["blocks"] == 8
    assert main(["bench", folder, "--json", "--size", "32", "--batch", "1", "--rounds", "1", "--in-chans", "1"]) == 2
    assert "holds its own weights and sizes" in capsys.readouterr().err
    assert main(["bench", folder, "--json", "--size", "32", "--batch", "1", "--rounds", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["setting"]["config"]["cell"] == "rnn"


def test_plan_takes_weights_and_sizes(tmp_path, capsys):
    torch.save(ten_classes().state_dict(), tmp_path / "a.pth")
    arguments = ["--weights", str(tmp_path / "a.pth"), "--num-classes", "10", "--in-chans", "1", "--stages", "layer4"]
    assert main(["plan", "resnet18", *arguments, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["input_size"][0] == 1
    assert [stage["name"] for stage in planned["stages"]] == ["layer4"]
    assert main(["verify", "resnet18", *arguments, "--size", "64", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["eval_error"] < 1e-5


def test_a_size_that_is_no_square(capsys):
    assert main(["bench", "cifar/20", "--size", "32", "64"]) == 2
    assert "square images, got --input-size 32 64" in capsys.readouterr().err
