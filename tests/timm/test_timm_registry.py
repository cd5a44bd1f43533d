"""`import regulate.timm`: regulated architectures by timm's own functions."""

from __future__ import annotations

import copy
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.data import Mixup, resolve_model_data_config
from timm.loss import SoftTargetCrossEntropy
from timm.models import (
    get_pretrained_cfg,
    load_checkpoint,
    model_entrypoint,
    resolve_pretrained_cfg,
    resume_checkpoint,
)
from timm.models._hub import save_for_hf
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn

import regulate.timm
from regulate import (
    CheckpointError,
    disabled,
    from_pretrained,
    is_regulated,
    load,
    plan,
    regulator_parameters,
    regulator_state_dict,
    save,
    save_pretrained,
    unregulate,
)
from regulate.rewrite.guard import regulators

from ..compatibility.uses import X, close
from ..helpers import network, stir
from ..zoo.architectures import TIMM_FILES

pytestmark = pytest.mark.slow

NAME = "regulated_resnet18"


@pytest.fixture(scope="module")
def plain():
    """A network of timm's that looks trained, with its weights as a file."""
    return network("resnet18")


@pytest.fixture(scope="module")
def original(plain, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(plain.state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def trained(original, tmp_path_factory):
    """A regulated network whose regulators do something, and its state as a file."""
    model = stir(build(pretrained=True, pretrained_cfg_overlay={"file": original}))
    path = tmp_path_factory.mktemp("trained") / "checkpoint.pth.tar"
    torch.save({"state_dict": model.state_dict()}, path)
    return model, str(path)


def build(name=NAME, **options):
    return timm.create_model(name, **options).eval()


def lively(path, name=NAME, **options):
    """A regulated network with weights of a file below a new classifier, whose regulators do something."""
    overlay = {"file": str(path), "num_classes": -1}
    return stir(build(name, pretrained=True, pretrained_cfg_overlay=overlay, **options))


def out(model):
    with torch.no_grad():
        return model(X)


def at_its_start(model):
    """Whether the regulators say something about the maps, and change nothing yet."""
    with torch.no_grad(), disabled(model):
        alone = model(X)
    norm = next(iter(regulators(model)))[1].mix_norm
    return torch.equal(out(model), alone) and bool((norm.running_var != 1).any())


def test_what_the_page_of_models_lists_is_registered_and_nothing_that_it_lists_as_not():
    page = Path(__file__).parents[2] / "docs" / "models.md"
    rows = re.findall(r"^\| (\w+) \| [^|]+ \| (none)?", page.read_text(), re.MULTILINE)
    there = {name for name in timm.list_models(module=TIMM_FILES)}
    expected = {name: not none for name, none in rows if name in there}
    assert len(expected) > 200
    assert {name: timm.is_model(f"regulated_{name}") for name in expected} == expected


def test_the_registry_knows_tags_cards_and_data():
    assert f"{NAME}.a1_in1k" in timm.list_models("regulated_*", pretrained=True)
    assert timm.list_pretrained("regulated_resnet18*")[0].startswith(NAME)
    assert timm.is_model(f"{NAME}.a1_in1k")
    assert model_entrypoint(f"{NAME}.a2_in1k").__name__ == NAME
    for tag in ("a1_in1k", "a3_in1k", "tv_in1k", ""):
        name = f"resnet18.{tag}" if tag else "resnet18"
        was, now = get_pretrained_cfg(name).to_dict(), get_pretrained_cfg(f"regulated_{name}").to_dict()
        assert now.pop("architecture") == NAME
        assert was.pop("architecture") == "resnet18"
        assert now == was
    assert resolve_pretrained_cfg(NAME, "a3_in1k").crop_pct == resolve_pretrained_cfg("resnet18", "a3_in1k").crop_pct
    same = resolve_model_data_config(timm.create_model("resnet18.a3_in1k"))
    assert resolve_model_data_config(build(f"{NAME}.a3_in1k")) == same


def test_importing_it_builds_nothing_and_regulate_alone_imports_no_timm():
    code = (
        "import sys, torch; from torch import nn; made = []; init = nn.Module.__init__; "
        "nn.Module.__init__ = lambda self, *a, **k: (made.append(type(self)), init(self, *a, **k))[1]; "
        "import regulate; assert 'timm' not in sys.modules; import timm; before = len(made); "
        "import regulate.timm; assert 'regulated_resnet50' in timm.list_models(); print(len(made) - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "0\n", done.stderr


def test_options_of_timm_and_of_regulate_pass_side_by_side():
    model = build(
        f"{NAME}.a1_in1k", cell="gru", stages=["layer3"], num_classes=7, in_chans=1, drop_path_rate=0.1, seed=3
    )
    assert [path for path, _ in regulators(model)] == ["layer3.0.regulator", "layer3.1.regulator"]
    assert type(model.layer3[0].regulator.cell).__name__ == "ConvGRUCell"
    assert model.num_classes == 7
    assert model.layer4[1].drop_path.drop_prob == pytest.approx(0.1)
    assert model(torch.ones(2, 1, 64, 64)).shape == (2, 7)
    again = build(NAME, cell="gru", stages=[2], in_chans=1, seed=3)
    assert torch.equal(model.layer3[0].regulator.cell.gates.mix, again.layer3[0].regulator.cell.gates.mix)
    with pytest.raises(ValueError, match="cell must be one of"):
        build(cell="grue")
    with pytest.raises(TypeError, match="write stages=\\[2\\]"):
        build(stages=2)


def test_pretrained_weights_are_the_originals_and_the_start_is_drawn_from_them(plain, original):
    model = build(f"{NAME}.a1_in1k", pretrained=True, pretrained_cfg_overlay={"file": original})
    assert torch.equal(out(model), out(plain))
    assert at_its_start(model)
    assert model.pretrained_cfg["file"] == original
    assert model.pretrained_cfg["tag"] == "a1_in1k"
    assert model.default_cfg is model.pretrained_cfg
    assert "state_dict" not in model.pretrained_cfg
    fewer = build(pretrained=True, pretrained_cfg_overlay={"file": original}, num_classes=5, in_chans=1)
    assert torch.equal(fewer.layer3[0].conv1.weight, plain.layer3[0].conv1.weight)
    assert torch.allclose(fewer.conv1.weight, plain.conv1.weight.sum(1, keepdim=True), atol=1e-6)


def test_pretrained_weights_of_a_regulated_network_fill_it(trained):
    model, path = trained
    filled = build(pretrained=True, pretrained_cfg_overlay={"file": path})
    assert torch.equal(out(filled), out(model))
    assert not at_its_start(filled)
    fewer = build(pretrained=True, pretrained_cfg_overlay={"file": path}, num_classes=5)
    assert torch.equal(fewer.layer1[0].regulator.mix.weight, model.layer1[0].regulator.mix.weight)
    given = {"state_dict": model.state_dict()}
    assert torch.equal(out(build(pretrained=True, pretrained_cfg_overlay=given)), out(model))
    for other in ({"cell": "gru"}, {"stages": [1]}):
        with pytest.raises(CheckpointError, match="pass the options that theirs was made with"):
            build(pretrained=True, pretrained_cfg_overlay={"file": path}, **other)


def test_checkpoint_path_takes_a_regulated_checkpoint_and_a_plain_one(plain, original, trained):
    assert torch.equal(out(build(checkpoint_path=trained[1])), out(trained[0]))
    model = build(checkpoint_path=original)
    assert torch.equal(out(model), out(plain))
    assert at_its_start(model)
    moved = copy.deepcopy(trained[0])
    load_checkpoint(moved, original)
    assert at_its_start(moved)


def test_a_state_that_does_not_hold_all_blocks_leaves_the_regulators_alone(trained):
    model = copy.deepcopy(trained[0])
    before = out(model)
    model.load_state_dict({}, strict=False)
    model.load_state_dict({"layer1.0.conv1.weight": model.layer1[0].conv1.weight}, strict=False)
    assert torch.equal(out(model), before)
    state = model.state_dict()
    del state["layer1.0.regulator.mix.weight"]
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(state)
    unregulate(model)
    model.load_state_dict(build("resnet18").state_dict())
    assert not is_regulated(model)


@pytest.mark.parametrize("form", ["list", "dict", "hook", "getter"])
def test_features_only(form, plain, original, trained):
    options = {"features_only": True, "feature_cls": form, "out_indices": (1, 3), "pretrained": True}
    expected = timm.create_model("resnet18", pretrained_cfg_overlay={"file": original}, **options).eval()
    model = build(pretrained_cfg_overlay={"file": original}, **options)
    assert is_regulated(model)
    assert all(map(torch.equal, features(model), features(expected)))
    assert model.feature_info.channels() == [64, 256]
    taps, hooks = [], []
    for layer in (trained[0].layer1, trained[0].layer3):
        hooks.append(layer.register_forward_hook(lambda _, __, result: taps.append(result)))
    out(trained[0])
    for hook in hooks:
        hook.remove()
    filled = build(pretrained_cfg_overlay={"file": trained[1]}, **options)
    assert all(map(torch.equal, features(filled), taps))


def features(model):
    found = out(model)
    return list(found.values()) if isinstance(found, dict) else found


def test_features_only_of_a_network_whose_stages_get_other_names(tmp_path):
    torch.save(network("resnetv2_50").state_dict(), tmp_path / "plain.pth")
    model = lively(tmp_path / "plain.pth", "regulated_resnetv2_50")
    torch.save(model.state_dict(), tmp_path / "x.pth")
    options = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "x.pth")}}
    parts = build("regulated_resnetv2_50", features_only=True, **options)
    expected = model.forward_intermediates(X, intermediates_only=True, norm=False)
    assert close(features(parts)[1:], expected[1:])
    with disabled(parts):
        assert not close(features(parts)[1:], expected[1:], 1e-2)


class PlainCell(nn.Module):
    """A cell of a user's own, with a convolution that timm would initialise."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(2 * channels, channels, 3, padding=1)

    def forward(self, x, state):
        before = torch.zeros_like(x) if state is None else state[0]
        return (torch.tanh(self.conv(torch.cat([x, before], 1))),)


@pytest.mark.parametrize("cell", ["lstm", PlainCell])
@pytest.mark.parametrize("name", ["resnet18", "resnetv2_50"])
def test_init_weights_keeps_the_start(name, cell):
    model = stir(build(f"regulated_{name}", cell=cell))
    cell = [p.clone() for _, part in regulators(model) if hasattr(part, "cell") for p in part.cell.parameters()]
    classifier = model.get_classifier().weight.clone()
    stem = next(model.parameters()).clone()
    model.init_weights(zero_init_last=False)
    assert not torch.equal(next(model.parameters()), stem)
    assert classifier.shape == model.get_classifier().weight.shape
    assert at_its_start(model)
    now = [p for _, part in regulators(model) if hasattr(part, "cell") for p in part.cell.parameters()]
    assert all(map(torch.equal, cell, now))
    assert all(p.requires_grad and p.is_leaf for p in regulator_parameters(model))


def test_copies_and_pickles_keep_it(trained, original):
    for copied in (copy.deepcopy(trained[0]), pickle.loads(pickle.dumps(trained[0]))):
        assert type(copied) is type(trained[0])
        assert torch.equal(out(copied), out(trained[0]))
        load_checkpoint(copied, original)
        assert at_its_start(copied)
    assert not at_its_start(trained[0])


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


def test_the_network_is_the_one_that_regulate_makes():
    torch.manual_seed(5)
    model = build(cell="lstm")
    torch.manual_seed(5)
    other = regulate.regulate(timm.create_model("resnet18"))
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in other.state_dict().items()}
    assert all(map(torch.equal, regulator_state_dict(model).values(), regulator_state_dict(other).values()))
    assert plan(unregulate(model)) == plan(timm.create_model("resnet18"))


def test_the_parts_of_timms_training_script(tmp_path, original):
    """Optimizer with layer decay, EMA, mixup, checkpointing by block; saved, resumed, validated from the average."""
    options = {"cell": "gru", "num_classes": 3, "drop_path_rate": 0.1}
    model = build(pretrained=True, pretrained_cfg_overlay={"file": original, "num_classes": -1}, **options).train()
    model.set_grad_checkpointing(True)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-2, layer_decay=0.75)
    average = ModelEmaV3(model, decay=0.5)
    mixup = Mixup(mixup_alpha=0.2, num_classes=3)
    begun = next(iter(regulators(model)))[1].mix.weight.clone()
    for _ in range(3):
        images, targets = mixup(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]))
        optimizer.zero_grad()
        SoftTargetCrossEntropy()(model(images), targets).backward()
        optimizer.step()
        average.update(model)
    assert not torch.equal(next(iter(regulators(model)))[1].mix.weight, begun)
    saver = CheckpointSaver(model, optimizer, model_ema=average, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(epoch=0, metric=1.0)
    path = str(tmp_path / "last.pth.tar")
    resumed = build(**options)
    again = create_optimizer_v2(resumed, opt="adamw", lr=1e-2, layer_decay=0.75)
    assert resume_checkpoint(resumed, path, optimizer=again) == 1
    assert torch.equal(out(resumed), out(model.eval()))
    assert len(again.state_dict()["state"]) == len(optimizer.state_dict()["state"]) > 0
    assert torch.equal(out(build(checkpoint_path=path, **options)), out(average.module.eval()))
