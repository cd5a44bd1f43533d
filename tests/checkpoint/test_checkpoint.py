"""save and load: exact round trips, and files that are damaged, foreign, hostile or of another network."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from regulate import (
    AlreadyRegulatedError,
    CheckpointError,
    ConvGRUCell,
    NotRegulatedError,
    UnsupportedModelError,
    freeze_backbone,
    is_regulated,
    load,
    regulate,
    regulator_state_dict,
    save,
    unregulate,
)
from regulate.models.by_name import load_model

from ..helpers import network, stir, stirred

pytestmark = pytest.mark.slow

X = torch.randn(2, 3, 64, 64)
NAMES = ["resnet18", "torchvision/resnet50", "legacy_xception", "dpn48b", "resnet50_gn", "resnetv2_18"]


def same(a, b):
    return list(a.state_dict()) == list(b.state_dict()) and all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("only", [False, True])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.use("save, load, switch", "save, load: bit-exact, whole and regulators alone")
def test_a_round_trip_is_exact(name, only, tmp_path):
    base = network(name)
    model = stirred(base, cell="gru" if only else "lstm", fusion="residual" if only else "paper")
    save(model, tmp_path / "a.safetensors", regulator_only=only)
    again = load(base if only else load_model(name).eval(), tmp_path / "a.safetensors")
    assert same(model, again)
    with torch.no_grad():
        assert torch.equal(model(X), again(X))
    assert is_regulated(again)
    assert not is_regulated(base)


def test_regulators_alone_are_exactly_the_new_tensors(tmp_path):
    model = stirred(network("resnet18"))
    save(model, tmp_path / "a", regulator_only=True)
    stored, new = load_file(tmp_path / "a"), regulator_state_dict(model)
    assert stored.keys() == new.keys()
    assert all(torch.equal(stored[key], new[key]) for key in new)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_and_memory_formats(dtype, tmp_path):
    model = stirred(network("resnet18")).to(dtype).to(memory_format=torch.channels_last)
    save(model, tmp_path / "a")
    again = load(network("resnet18").to(dtype).to(memory_format=torch.channels_last), tmp_path / "a")
    assert same(model, again)
    assert again.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(CheckpointError, match="dtype"):
        load(network("resnet18"), tmp_path / "a")


def test_wrapped_models_are_saved_and_loaded_inside_their_wrapper(tmp_path):
    model = stirred(network("resnet18"))
    save(nn.DataParallel(torch.compile(model, backend="eager")), tmp_path / "a")
    assert same(load(load_model("resnet18"), tmp_path / "a"), model)
    wrapper = nn.DataParallel(load_model("resnet18"))
    assert load(wrapper, tmp_path / "a", inplace=True) is wrapper
    assert same(wrapper.module, model)


def test_tensors_that_share_memory(tmp_path):
    model = stirred(network("resnet18"))
    model.layer1[1].conv1.weight = model.layer1[0].conv1.weight
    save(model, tmp_path / "a")
    assert same(load(load_model("resnet18"), tmp_path / "a"), model)


def test_a_network_without_memory_takes_the_tensors_of_the_file(tmp_path):
    model = stirred(network("resnet18"))
    save(model, tmp_path / "a")
    with torch.device("meta"):
        bare = load_model("resnet18").eval()
    again = load(bare, tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(again(X), model(X))
    save(model, tmp_path / "b", regulator_only=True)
    with pytest.raises(CheckpointError, match="meta device"):
        load(bare, tmp_path / "b")


def test_a_new_classifier_goes_with_the_regulators(tmp_path):
    def build():
        torch.manual_seed(4)
        model = load_model("torchvision/resnet18").eval()
        model.fc = nn.Linear(512, 5)
        return model

    model = freeze_backbone(stir(regulate(build())))
    with torch.no_grad():
        model.fc.weight.add_(1)
    save(model, tmp_path / "a", regulator_only=True, also=["fc"])
    assert same(load(build(), tmp_path / "a"), model)
    other = build()
    other.fc = nn.Linear(512, 6)
    with pytest.raises(CheckpointError, match=r"fc.weight: float32 \(5, 512\) in the file, float32 \(6, 512\)"):
        load(other, tmp_path / "a")
    save(model, tmp_path / "b", regulator_only=True)
    with pytest.raises(CheckpointError, match=r"1 of 102 tensors differ, first fc.weight"):
        load(build(), tmp_path / "b")


@pytest.mark.parametrize(
    ("also", "only", "error"), [(["nosuch"], True, ValueError), (["fc"], False, ValueError), ("fc", True, TypeError)]
)
def test_what_goes_along_must_exist(also, only, error, tmp_path):
    with pytest.raises(error, match="also"):
        save(regulate(load_model("resnet18")), tmp_path / "a", also=also, regulator_only=only)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["conv1.weight", "layer3.1.bn2.running_mean", "layer1.0.bn1.running_var", "fc.bias"])
@pytest.mark.use("save, load, switch", "regulators alone on another backbone: CheckpointError")
def test_another_backbone_is_an_error_that_says_where(key, tmp_path):
    base = network("torchvision/resnet18")
    save(stirred(base), tmp_path / "a", regulator_only=True)
    base.state_dict()[key].view(-1)[0] += 1e-6
    with pytest.raises(CheckpointError, match=rf"1 of 102 tensors differ, first {key}.*freeze_backbone"):
        load(base, tmp_path / "a")


def test_training_with_a_frozen_backbone_keeps_the_fingerprint(tmp_path):
    base = network("torchvision/resnet18")
    kept, loose = freeze_backbone(regulate(base)).train(), regulate(base).train()
    for model in (kept, loose):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        model(X).square().mean().backward()
        optimizer.step()
    save(kept, tmp_path / "a", regulator_only=True)
    assert same(load(base, tmp_path / "a"), kept)
    save(loose, tmp_path / "b", regulator_only=True)
    with pytest.raises(CheckpointError, match="trained along"):
        load(base, tmp_path / "b")


@pytest.mark.parametrize(
    ("saved", "given", "says"),
    [
        ("resnet18", "torchvision/mobilenet_v2", "MobileNetV2"),
        ("resnet18", "resnet50", "timm's resnet18"),
        ("torchvision/resnet50", "torchvision/wide_resnet50_2", "block layer1.0 was regulated with read_width 64"),
        ("torchvision/resnet18", "torchvision/resnet34", "stages"),
        ("torchvision/resnet18", "torchvision/vgg11", "VGG"),
    ],
)
def test_another_architecture_is_an_error_that_says_where(saved, given, says, tmp_path):
    save(regulate(load_model(saved)), tmp_path / "a")
    with pytest.raises(CheckpointError, match=says):
        load(load_model(given), tmp_path / "a")


def test_another_activation_is_an_error(tmp_path):
    from timm import create_model

    save(regulate(create_model("resnet18")), tmp_path / "a")
    with pytest.raises(CheckpointError, match="activation 'relu', here 'none'"):
        load(create_model("resnet18", act_layer="silu"), tmp_path / "a")


def test_another_number_of_classes_is_an_error(tmp_path):
    from timm import create_model

    save(regulate(create_model("resnet18", num_classes=7)), tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"fc.weight: float32 \(7, 512\)"):
        load(create_model("resnet18"), tmp_path / "a")


def test_the_wrong_call_order(tmp_path):
    model = regulate(load_model("resnet18"))
    with pytest.raises(NotRegulatedError):
        save(load_model("resnet18"), tmp_path / "a")
    save(model, tmp_path / "a")
    with pytest.raises(AlreadyRegulatedError):
        load(model, tmp_path / "a")
    with pytest.raises(UnsupportedModelError):
        load(model.state_dict(), tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="no file"):
        load(load_model("resnet18"), tmp_path / "nosuch")
    with pytest.raises(FileNotFoundError, match="no folder"):
        save(model, tmp_path / "nosuch" / "a")


def test_what_cannot_be_stored_says_so(tmp_path):
    class Cell(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.mix = nn.Conv2d(channels, channels, 1)

        def forward(self, x, state):
            return (self.mix(x),)

    Cell.__name__ = "lstm"
    with pytest.raises(CheckpointError, match="cell of your own"):
        save(regulate(load_model("resnet18"), Cell), tmp_path / "a")
    with pytest.raises(CheckpointError, match="cell of your own"):
        save(regulate(load_model("resnet18"), ConvGRUCell), tmp_path / "a")
    with torch.device("meta"):
        bare = load_model("resnet18")
    with pytest.raises(CheckpointError, match="meta device"):
        save(regulate(bare), tmp_path / "a")
    pair = nn.Sequential(regulate(load_model("resnet18")), regulate(load_model("resnet18"), "gru"))
    with pytest.raises(CheckpointError, match="different"):
        save(pair, tmp_path / "a")
    odd = regulate(load_model("resnet18"))
    odd.register_buffer("extra", torch.ones(2).as_subclass(type("Sharded", (torch.Tensor,), {})))
    with pytest.raises(CheckpointError, match="extra is a Sharded; gather"):
        save(odd, tmp_path / "a")
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
import safetensors.torch
from regulate import regulate, save
from regulate.checkpoint import archive
from regulate.models.by_name import load_model

def half(tensors, path, metadata):
    safetensors.torch.save_file(tensors, path, metadata=metadata)
    with open(path, "r+b") as file:
        file.truncate(1000)
    print("writing", flush=True)
    signal.pause()

archive.save_file = half
save(regulate(load_model("resnet18"), "rnn"), sys.argv[1])
"""


@pytest.mark.use("save, load, switch", "a killed process leaves the old file")
def test_a_killed_process_leaves_the_old_file(good, tmp_path):
    path = tmp_path / "a"
    path.write_bytes(good.read_bytes())
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(path)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    ) as process:
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(signal.SIGKILL)
    assert path.read_bytes() == good.read_bytes()
    assert len(list(tmp_path.iterdir())) == 2, "the kill came too late"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(good, tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(good.read_bytes())

    def full(tensors, where, metadata):
        Path(where).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("regulate.checkpoint.archive.save_file", full)
    with pytest.raises(OSError, match="no space"):
        save(regulate(load_model("resnet18")), path)
    assert path.read_bytes() == good.read_bytes()
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_a_link_and_the_mode_is_a_new_files(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_bytes(b"old")
    link.symlink_to(real)
    save(regulate(load_model("resnet18")), link)
    assert link.is_symlink()
    assert is_regulated(load(load_model("resnet18").eval(), real))
    (tmp_path / "plain").touch()
    assert real.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("a folder", Path.mkdir),
        ("no regular file", os.mkfifo),
        ("no regular file", lambda path: path.symlink_to(path)),
        ("no regular file", lambda path: (os.mkfifo(path.parent / "pipe"), path.symlink_to(path.parent / "pipe"))),
    ],
    ids=["folder", "pipe", "loop", "link to a pipe"],
)
def test_save_takes_the_place_of_regular_files_only(kind, make, tmp_path):
    make(tmp_path / "a")
    before = {path.name: path.lstat().st_mode for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match=f"is {kind}; give the path of a file"):
        save(regulate(load_model("cifar/14")), tmp_path / "a")
    assert {path.name: path.lstat().st_mode for path in tmp_path.iterdir()} == before


def test_a_name_may_be_as_long_as_names_can_be(tmp_path):
    save(regulate(load_model("cifar/14")), tmp_path / ("a" * 255))
    assert is_regulated(load(load_model("cifar/14"), tmp_path / ("a" * 255)))


def without_container(model):
    model.layer1 = nn.Sequential(*model.layer1)


def without_any_container(model):
    for name in ("layer1", "layer2", "layer3"):
        setattr(model, name, nn.Sequential(*getattr(model, name)))


def without_a_block(model):
    del model.layer1[1]


def with_another_block(model):
    model.layer1[1] = load_model("cifar/14").layer1[1]


@pytest.mark.parametrize("change", [without_container, without_any_container, without_a_block, with_another_block])
def test_a_stage_that_was_taken_apart_is_not_stored(change, tmp_path):
    """The file could not say how the network is regulated again."""
    model = regulate(load_model("cifar/14"))
    change(model)
    with pytest.raises(CheckpointError, match="of stage layer1 a block, or the module that runs its blocks, was repl"):
        save(model, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_the_file_holds_no_absolute_path(good):
    header = good.read_bytes()[: 8 + struct.unpack("<Q", good.read_bytes()[:8])[0]]
    assert os.fsencode(Path.cwd()) not in header


def test_a_loaded_network_goes_on(tmp_path):
    save(stirred(network("resnet18")), tmp_path / "a")
    model = load(load_model("resnet18"), tmp_path / "a").train()
    model(X).square().mean().backward()
    assert model.layer1[0].regulator.mix.weight.grad.any()
    save(model, tmp_path / "a")
    assert not is_regulated(unregulate(model))
