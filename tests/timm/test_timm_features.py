"""`features_only` of timm: the maps of a regulated network, by whatever class gives them."""

from __future__ import annotations

import pytest
import timm
import torch

from regulate import disabled, is_regulated

from ..compatibility.uses import X, close
from ..helpers import network
from .regulated import build, lively, out

pytestmark = pytest.mark.slow


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
