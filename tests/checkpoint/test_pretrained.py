"""Folders in the Hugging Face layout: rebuilt exactly, and nothing in them is trusted."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from timm import create_model
from timm.models import save_for_hf
from torch import nn

from regulate import (
    CheckpointError,
    UnsupportedModelError,
    from_pretrained,
    is_regulated,
    regulate,
    regulator_parameters,
    save_pretrained,
)
from regulate.models.by_name import load_model

from ..helpers import network, stirred

pytestmark = pytest.mark.slow

X = torch.randn(2, 3, 64, 64)


@pytest.mark.parametrize("name", ["resnet18", "seresnext26d_32x4d", "legacy_xception", "dpn48b"])
@pytest.mark.use("save, load, switch", "save_pretrained, from_pretrained (Hugging Face layout)")
def test_a_round_trip_is_exact(name, tmp_path):
    model = stirred(network(name), cell="gru").train()
    save_pretrained(model, tmp_path / "new" / "folder")
    again = from_pretrained(tmp_path / "new" / "folder")
    assert is_regulated(again)
    assert not again.training
    with torch.no_grad():
        assert torch.equal(again(X), model.eval()(X))
    files = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    assert files == {"README.md", "config.json", "model.safetensors"}


def test_the_config_is_the_one_that_timm_writes(tmp_path):
    from timm.models._hub import save_config_for_hf

    model = regulate(create_model("resnet18"))
    save_pretrained(model, tmp_path)
    save_config_for_hf(model, tmp_path / "timm.json")
    ours, theirs = (json.loads((tmp_path / name).read_text()) for name in ("config.json", "timm.json"))
    assert ours.pop("architecture") == f"regulated_{theirs.pop('architecture')}"
    options = {"cell": "lstm", "kernel": "light", "fusion": "paper", "init": "identity", "norm": "auto"}
    assert ours.pop("model_args") == {**theirs.pop("model_args", {}), **options}
    assert ours == theirs


def test_a_part_that_was_regulated_alone_is_rebuilt(tmp_path):
    model = create_model("resnet18").eval()
    model.layer3 = stirred(model.layer3)
    save_pretrained(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(from_pretrained(tmp_path)(X), model(X))


def test_a_config_with_the_plain_architecture_is_read_as_well(tmp_path):
    """Folders of 0.1.0 have it."""
    model = stirred(network("resnet18"))
    save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architecture": "resnet18", "model_args": {}}))
    with torch.no_grad():
        assert torch.equal(from_pretrained(tmp_path)(X), model.eval()(X))


OPENED_BY_TIMM = """
import sys, timm, torch
folder, imported = sys.argv[1:]
if imported == "yes":
    import regulate.timm
try:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
except RuntimeError as error:
    sys.exit(str(error))
torch.save(model(torch.load(f"{folder}/x.pt")).detach(), f"{folder}/y.pt")
"""


def opened_by_timm(folder, imported):
    torch.save(X, folder / "x.pt")
    command = [sys.executable, "-W", "ignore", "-c", OPENED_BY_TIMM, str(folder), imported]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_timm_opens_it_or_says_that_it_does_not_know_the_architecture(tmp_path):
    plain = create_model("resnet18", num_classes=7)
    save_for_hf(plain, tmp_path / "plain", safe_serialization=True)
    model = stirred(plain, "gru", fusion="residual", stages=[1, 2])
    save_pretrained(model, tmp_path)
    alone = opened_by_timm(tmp_path, "no")
    assert alone.returncode == 1 and "Unknown model (regulated_resnet18)" in alone.stderr
    if opened_by_timm(tmp_path / "plain", "no").returncode:
        pytest.skip("this timm does not open the folder of a plain network either: it reads no safetensors there")
    together = opened_by_timm(tmp_path, "yes")
    assert together.returncode == 0, together.stderr
    with torch.no_grad():
        assert torch.allclose(torch.load(tmp_path / "y.pt"), model(X), atol=1e-5)


def test_changed_heads_inputs_and_rates(tmp_path):
    model = create_model("resnet18", in_chans=1, drop_path_rate=0.2, drop_rate=0.1, act_layer="silu")
    model.reset_classifier(7, "max")
    model = stirred(model)
    save_pretrained(model, tmp_path, model_args={"in_chans": 1, "act_layer": "silu", "global_pool": "max"})
    again = from_pretrained(tmp_path)
    assert again.num_classes == 7
    x = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_the_data_of_the_card_come_back(tmp_path):
    model = regulate(create_model("resnet18", pretrained_cfg_overlay={"mean": (0.1, 0.2, 0.3), "crop_pct": 0.5}))
    save_pretrained(model, tmp_path)
    again = from_pretrained(tmp_path)
    assert tuple(again.pretrained_cfg["mean"]) == (0.1, 0.2, 0.3)
    assert again.pretrained_cfg["crop_pct"] == 0.5


def test_a_network_that_timm_would_build_otherwise_is_refused(tmp_path):
    model = create_model("resnet18")
    model.fc = nn.Linear(512, 7)
    with pytest.raises(CheckpointError, match=r"another network.*fc is Linear\(.*out_features=7.*reset_classifier"):
        save_pretrained(regulate(model), tmp_path)
    model = create_model("resnet18")
    model.layer1[0].act1 = nn.ReLU6()
    with pytest.raises(CheckpointError, match=r"layer1\.0\.act1 is ReLU6"):
        save_pretrained(regulate(model), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_old_folder(tmp_path):
    save_pretrained(regulate(create_model("resnet18")), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    model = create_model("resnet18")
    model.fc = nn.Linear(512, 7)
    with pytest.raises(CheckpointError):
        save_pretrained(regulate(model), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_networks_of_others_go_by_save(tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"save\(model, path\)"):
        save_pretrained(regulate(load_model("torchvision/resnet18")), tmp_path)


CHANGES = {
    "a path as architecture": {"architecture": "../../resnet18"},
    "an address as architecture": {"architecture": "hf-hub:someone/resnet18"},
    "a folder as architecture": {"architecture": "local-dir:/tmp"},
    "an architecture of a type": {"architecture": ["resnet18"]},
    "no such architecture": {"architecture": "resnet18000"},
    "another architecture": {"architecture": "resnet34"},
    "another number of classes": {"num_classes": 10},
    "classes of a type": {"num_classes": "10"},
    "a checkpoint to unpickle": {"model_args": {"checkpoint_path": "evil.pth"}},
    "weights to download": {"model_args": {"pretrained": True}},
    "a card with an address": {"model_args": {"pretrained_cfg": {"url": "http://localhost/evil.pth"}}},
    "an unknown argument": {"model_args": {"evil": 1}},
    "arguments of a type": {"model_args": [1]},
    "a card of a type": {"pretrained_cfg": 3},
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    save_pretrained(regulate(create_model("resnet18")), folder)
    return folder


def copied(good, folder):
    for path in good.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", CHANGES)
def test_a_hostile_config_is_refused(name, good, tmp_path, monkeypatch):
    config = {**copied(good, tmp_path), **CHANGES[name]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.pth").touch()
    monkeypatch.chdir(tmp_path)
    loaded = []  # not an error, which from_pretrained would take for one of timm's
    for loader in ("torch.load", "socket.getaddrinfo"):
        monkeypatch.setattr(loader, lambda *args, **kwargs: loaded.append(args) or [])
    try:
        with pytest.raises(CheckpointError):
            from_pretrained(tmp_path)
    finally:
        assert loaded == []


@pytest.mark.parametrize(
    "name", ["model_name", "pretrained", "checkpoint_path", "cache_dir", "features_only", "pretrained_x"]
)
def test_an_argument_that_says_what_to_load_is_refused_by_name(name, good, tmp_path):
    config = {**copied(good, tmp_path), "model_args": {name: None}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"describes a network, and \['{name}'\] say what to load; remove them"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["hf-hub:a/b", "local-dir:/tmp", "resnet18.../../a", "../resnet18", ""])
def test_no_address_reaches_timm(name, good, tmp_path, monkeypatch):
    """Whatever timm takes for a model's name, in this version or another."""
    config = {**copied(good, tmp_path), "architecture": name}
    (tmp_path / "config.json").write_text(json.dumps(config))
    asked = []
    monkeypatch.setattr("timm.is_model", lambda name: True)
    monkeypatch.setattr("timm.create_model", lambda *args, **options: asked.append(args))
    with pytest.raises(CheckpointError, match="no architecture"):
        from_pretrained(tmp_path)
    assert asked == []


def test_addresses_in_a_card_are_not_kept(good, tmp_path):
    config = copied(good, tmp_path)
    config["pretrained_cfg"].update(url="http://localhost/evil.pth", file="evil.pth", hf_hub_id="evil/evil")
    (tmp_path / "config.json").write_text(json.dumps(config))
    card = from_pretrained(tmp_path).pretrained_cfg
    assert "evil" not in json.dumps({key: str(value) for key, value in card.items()})


@pytest.mark.parametrize("text", ["", "[]", "{}", "nonsense", "[" * 100_000])
def test_a_damaged_config_is_refused(text, good, tmp_path):
    copied(good, tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(lost, good, tmp_path):
    copied(good, tmp_path)
    (tmp_path / lost).unlink()
    with pytest.raises(FileNotFoundError, match=lost):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("source", ["/nosuch/folder", "nosuch", "../a/b", "./a", "a/b/c"])
def test_what_is_neither_folder_nor_repository(source):
    with pytest.raises(FileNotFoundError, match="owner/name"):
        from_pretrained(source)


def test_the_hub_is_reached_through_huggingface_hub_only(good, monkeypatch):
    asked = []

    def download(repository, name, **options):
        asked.append((repository, name, options))
        return str(good / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    model = from_pretrained("someone/network", revision="main", cache_dir="kept", token="secret")
    assert is_regulated(model)
    options = {"revision": "main", "cache_dir": "kept", "token": "secret"}
    assert asked == [("someone/network", name, options) for name in ("config.json", "model.safetensors")]


def test_the_card_says_what_was_regulated_and_how_to_load_it(tmp_path):
    model = regulate(create_model("resnet18", num_classes=7), cell="gru", stages=["layer2", "layer3"])
    save_pretrained(model, tmp_path, metrics={"top-1 (%)": 91.25})
    card = (tmp_path / "README.md").read_text()
    new = sum(p.numel() for p in regulator_parameters(model))
    assert card.startswith("---\nlibrary_name: timm\n")
    assert "# resnet18 with gru regulators" in card
    assert "| regulated | 4 blocks in 2 stages |" in card
    assert f"| parameters | {sum(p.numel() for p in model.parameters()):,}, {new:,} of them in regulators |" in card
    assert "None" not in card and "| cell | gru |" in card and "| top-1 (%) | 91.25 |" in card
    code = card.partition("```python\n")[2].partition("```")[0].replace("FOLDER", str(tmp_path))
    space = {}
    exec(code, space)
    assert is_regulated(space["model"])
    with pytest.raises(RuntimeError, match="regulator"):  # timm alone, as the card says
        create_model("resnet18", num_classes=7, checkpoint_path=str(tmp_path / "model.safetensors"))


def test_a_card_of_the_users_own_stays(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    save_pretrained(regulate(create_model("resnet18")), tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_card_without_metrics_has_no_table_of_them(tmp_path):
    save_pretrained(regulate(create_model("resnet18")), tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "Measured" not in card and "\n\n\n" not in card
