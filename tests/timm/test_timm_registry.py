"""`import regulate.timm`: regulated architectures by timm's own functions."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import get_pretrained_cfg, model_entrypoint, resolve_pretrained_cfg

import regulate.timm
from regulate import plan, regulator_state_dict, unregulate
from regulate.rewrite.guard import regulators

from ..zoo.architectures import TIMM_FILES
from .regulated import NAME, build

pytestmark = pytest.mark.slow


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


def test_the_network_is_the_one_that_regulate_makes():
    torch.manual_seed(5)
    model = build(cell="lstm")
    torch.manual_seed(5)
    other = regulate.regulate(timm.create_model("resnet18"))
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in other.state_dict().items()}
    assert all(map(torch.equal, regulator_state_dict(model).values(), regulator_state_dict(other).values()))
    assert plan(unregulate(model)) == plan(timm.create_model("resnet18"))
