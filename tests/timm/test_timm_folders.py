"""Folders, repositories of the hub and files: what timm and `regulate` write opens in either."""

from __future__ import annotations

import json

import pytest
import torch
from timm.models._hub import save_for_hf

from regulate import from_pretrained, load, regulate, save, save_pretrained, unregulate
from regulate.rewrite.guard import regulators

from ..helpers import stir
from .regulated import NAME, build, lively, out

pytestmark = pytest.mark.slow


def test_a_folder_that_timm_writes_opens_in_timm(original, tmp_path):
    model = lively(original, cell="gru", stages=["layer2", "layer4"], num_classes=7)
    save_for_hf(model, tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == NAME
    own = {"cell": "gru", "stages": ["layer2", "layer4"], "num_classes": 7}
    assert config["model_args"].items() >= own.items()
    again = build(f"local-dir:{tmp_path}", pretrained=True)
    assert torch.equal(out(again), out(model))
    assert again.pretrained_cfg["source"] == "local-dir"


def test_a_repository_of_the_hub_opens_in_timm(original, tmp_path, monkeypatch):
    """From the hub's cache, as there is no network here."""
    hub = pytest.importorskip("huggingface_hub")
    model = lively(original, num_classes=7)
    commit = "0" * 40
    folder = tmp_path / "models--someone--regulated"
    save_for_hf(model, folder / "snapshots" / commit, safe_serialization=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    again = build("hf-hub:someone/regulated", pretrained=True, cache_dir=str(tmp_path))
    assert torch.equal(out(again), out(model))
    assert again.pretrained_cfg["hf_hub_id"] == "someone/regulated"


def test_files_and_folders_of_regulate_come_and_go(original, tmp_path):
    model = lively(original, cell="rnn", num_classes=7)
    save(model, tmp_path / "model.safetensors")
    assert torch.equal(out(load(build("resnet18", num_classes=7), tmp_path / "model.safetensors")), out(model))
    filled = build(cell="rnn", num_classes=7, checkpoint_path=str(tmp_path / "model.safetensors"))
    assert torch.equal(out(filled), out(model))
    save_pretrained(model, tmp_path / "folder")
    assert torch.equal(out(from_pretrained(tmp_path / "folder")), out(model))
    assert torch.equal(out(build(f"local-dir:{tmp_path / 'folder'}", pretrained=True)), out(model))


def test_the_options_are_those_of_the_last_regulate(tmp_path):
    model = regulate(unregulate(build(cell="gru", stages=[1, 2])), "rnn", norm="none")
    save_pretrained(model, tmp_path)
    arguments = json.loads((tmp_path / "config.json").read_text())["model_args"]
    assert (arguments["cell"], arguments["norm"]) == ("rnn", "none") and "stages" not in arguments
    assert torch.equal(out(build(f"local-dir:{tmp_path}", pretrained=True)), out(model))


def test_a_folder_of_a_part_that_was_regulated_alone_opens_in_timm(tmp_path):
    model = build("resnet18")
    model.layer3 = stir(regulate(model.layer3)).eval()
    save_pretrained(model, tmp_path)
    again = build(f"local-dir:{tmp_path}", pretrained=True)
    assert torch.equal(out(again), out(model))
    assert [path.split(".")[0] for path, _ in regulators(again)] == ["layer3", "layer3"]
