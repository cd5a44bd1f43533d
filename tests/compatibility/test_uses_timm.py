"""timm's tools on a regulated network."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d
from timm.models._features import FeatureGetterNet, FeatureHookNet, FeatureListNet
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.utils import ModelEmaV3, freeze, unfreeze
from timm.utils.model import reparameterize_model
from torch import nn
from torch.torch_version import TorchVersion

from regulate import is_regulated, regulate, regulator_parameters
from regulate.rewrite.guard import regulators
from regulate.testing import example_inputs, perturb

from ..helpers import stir
from .uses import TIMM, X, close, gradients, passing, plain, regulated, use

pytestmark = pytest.mark.gate

# Where timm's feature taps of the last three stages lie.
TAPS = {
    "resnetv2_18": ["stages.1", "stages.2", "stages.3"],
    "dpn48b": ["features.conv3_4", "features.conv4_6", "features.conv5_3"],
}


def taps(name):
    return TAPS.get(name, ["layer2", "layer3", "layer4"])


def skip_where_timm_cannot(name, call):
    """Skip on versions of timm before 1.0.31 that cannot do a thing with the plain network either."""
    if TorchVersion(timm.__version__) >= "1.0.31":
        return
    try:
        with torch.no_grad():
            call(plain(name))
    except Exception as error:
        pytest.skip(f"timm {timm.__version__} cannot do it with the plain network either: {error}")


@use("timm", "forward_features, forward_head", TIMM)
def test_features_and_head(name):
    model = regulated(name)
    with torch.no_grad():
        features = model.forward_features(X)
        assert close(model.forward_head(features), model(X))
        assert not close(features, plain(name).forward_features(X), 1e-2)
        assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)


@use("timm", "forward_intermediates", TIMM)
def test_intermediates(name):
    skip_where_timm_cannot(name, lambda model: model.forward_intermediates(X, indices=[2, 3, 4], norm=False))
    model = regulated(name)
    with torch.no_grad():
        last, found = model.forward_intermediates(X, indices=[2, 3, 4], norm=False)
        assert close(found, passing(model, taps(name)))
        assert close(model.forward_head(last), model(X))


@use("timm", "prune_intermediate_layers", TIMM)
def test_prune(name):
    skip_where_timm_cannot(name, lambda model: [model.prune_intermediate_layers([2, 3], prune_head=True), model(X)])
    if name == "dpn48b":
        skip_where_timm_cannot(name, lambda model: passing(model, taps(name)))
    model = regulated(name)
    expected = passing(model, taps(name)[:2])
    model.prune_intermediate_layers([2, 3], prune_head=True)
    assert is_regulated(model)
    with torch.no_grad():
        assert close(model(X), expected[1])


@use("timm", "create_model(features_only=True), then regulate", TIMM)
def test_features_only_before(name):
    blocks = len(list(regulators(regulated(name))))
    model = timm.create_model(name, features_only=True)
    perturb(model, [example_inputs(model, (3, 64, 64), batch=8, seed=seed) for seed in (1, 2)]).eval()
    new = regulate(model)
    assert len(list(regulators(new))) == blocks
    assert isinstance(new, type(model))
    with torch.no_grad():
        expected = model(X)
        assert close(new(X), expected, 1e-5)
        changed = stir(new)(X)
        assert [a.shape for a in changed] == [a.shape for a in expected]
        assert not close(changed[-1], expected[-1], 1e-2)
    assert new.feature_info.channels() == model.feature_info.channels()


@use("timm", "regulate, then FeatureListNet", TIMM)
def test_feature_list_net(name):
    skip_where_timm_cannot(name, lambda model: passing(model, taps(name)))
    model = regulated(name)
    expected = passing(model, taps(name))
    flatten = name in ("resnetv2_18", "dpn48b")  # as timm itself does for these families
    net = FeatureListNet(model, out_indices=(2, 3, 4), flatten_sequential=flatten)
    with torch.no_grad():
        assert close(net(X), expected)


@use("timm", "regulate, then FeatureHookNet", TIMM)
def test_feature_hook_net(name):
    skip_where_timm_cannot(name, lambda model: passing(model, taps(name)))
    model = regulated(name)
    expected = passing(model, taps(name))
    net = FeatureHookNet(model, out_indices=(2, 3, 4))
    with torch.no_grad():
        assert close(net(X), expected)


@use("timm", "regulate, then FeatureGetterNet", TIMM)
def test_feature_getter_net(name):
    skip_where_timm_cannot(name, lambda model: passing(model, taps(name)))
    model = regulated(name)
    expected = passing(model, taps(name))
    net = FeatureGetterNet(model, out_indices=(2, 3, 4), norm=False)
    with torch.no_grad():
        assert close(net(X), expected)


@use("timm", "reset_classifier, get_classifier", TIMM)
def test_classifier(name):
    model = regulated(name)
    assert model.get_classifier() is model.get_submodule(model.pretrained_cfg["classifier"])
    features = model.forward_features(X)
    model.reset_classifier(7)
    assert model(X).shape == (2, 7)
    assert torch.equal(model.forward_features(X), features)
    model.reset_classifier(0)
    assert model(X).shape == (2, model.num_features)


@use("timm", "other pooling: reset_classifier(n, 'avgmax') and 'catavgmax'", TIMM[:5])
def test_pooling(name):
    model = regulated(name)
    features = model.forward_features(X)
    for pool, width in (("avgmax", 1), ("catavgmax", 2)):
        model.reset_classifier(0, pool)
        both = features.mean((2, 3)), features.amax((2, 3))
        expected = (both[0] + both[1]) / 2 if width == 1 else torch.cat(both, 1)
        assert close(model(X), expected)


def saved_bytes(model, x):
    """Memory that the backward pass keeps after the forward pass, parameters left out."""
    kept = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x)
    assert out.requires_grad
    return sum(kept.values())


@use("timm", "set_grad_checkpointing: equal gradients, less memory", TIMM)
def test_checkpointing(name):
    model = regulated(name)
    try:
        plain(name).set_grad_checkpointing(True)
    except AssertionError:
        pytest.skip(f"timm {timm.__version__} has no gradient checkpointing in {name}")
    expected, memory = gradients(model), saved_bytes(model, X)
    model.set_grad_checkpointing(True)
    found = gradients(model)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[key], expected[key], rtol=1e-4, atol=1e-6) for key in expected)
    assert saved_bytes(model, X) < 0.5 * memory


@use("timm", "param groups with layer_decay: each new parameter in its own block's group", TIMM)
def test_layer_decay(name):
    model = regulated(name)
    scale = {}
    for group in param_groups_layer_decay(model, layer_decay=0.5):
        scale.update({id(p): group["lr_scale"] for p in group["params"]})
    assert all(id(p) in scale for p in model.parameters())
    scales = set()
    for path, regulator in regulators(model):
        block = model.get_submodule(path.removesuffix(".regulator"))
        own = {scale[id(p)] for n, p in block.named_parameters() if not n.startswith("regulator")}
        assert {scale[id(p)] for p in regulator.parameters()} == own, path
        scales |= own
    assert len(scales) >= 4
    assert max(scales) < scale[id(next(model.get_classifier().parameters()))]


@use("timm", "optimizer factory: create_optimizer_v2", TIMM)
def test_optimizer_factory(name):
    model = regulated(name).train()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    assert all((id(p) in decayed) == (p.dim() > 1) for p in regulator_parameters(model))
    before = [p.detach().clone() for p in regulator_parameters(model)]
    gradients(model)
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, regulator_parameters(model), strict=True))


@use("timm", "ModelEmaV3", TIMM)
def test_ema(name):
    model = regulated(name)
    ema = ModelEmaV3(model, decay=0.5, use_warmup=False)
    with torch.no_grad():
        assert torch.equal(ema.module(X), model(X))
        fusion = next(iter(regulators(model)))[1]
        weight = fusion.mix.weight.clone()
        fusion.mix.weight.add_(1)
        ema.update(model)
    averaged = next(iter(regulators(ema.module)))[1].mix.weight
    assert torch.allclose(averaged, weight + 0.5, atol=1e-6)


@use("timm", "freeze, unfreeze", TIMM)
def test_freeze(name):
    model = regulated(name).train()
    freeze(model)
    assert not any(p.requires_grad for p in model.parameters())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model(X)
    moved = [key for key in before if not torch.equal(before[key], model.state_dict()[key])]
    assert moved == []
    unfreeze(model)
    assert all(p.requires_grad for p in model.parameters())
    assert is_regulated(model)
    found = gradients(model)
    assert all(found[n].any() for n, p in model.named_parameters() if ".regulator.mix.weight" in n)


@use("timm", "freeze_batch_norm_2d", TIMM)
def test_freeze_norms(name):
    model = regulated(name)
    with torch.no_grad():
        expected = model(X)
        frozen = freeze_batch_norm_2d(copy.deepcopy(model)).train()
        assert not any(isinstance(m, nn.BatchNorm2d) for m in frozen.modules())
        assert close(frozen(X), expected)


@use("timm", "convert_sync_batchnorm", TIMM)
def test_sync(name):
    model = regulated(name)
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    converted = convert_sync_batchnorm(copy.deepcopy(model))
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in converted.modules()) == norms
    with torch.no_grad():
        assert close(converted.eval()(X), model(X))


@use("timm", "reparameterize_model", TIMM)
def test_reparameterize(name):
    model = regulated(name)
    with torch.no_grad():
        assert close(reparameterize_model(model)(X), model(X))


@use("timm", "init_weights: runs, and overwrites the start", ("resnet18", "resnetv2_18"))
def test_init_weights(name):
    model = regulate(plain(name))
    start = next(iter(regulators(model)))[1].mix.weight.clone()
    model.init_weights() if name == "resnet18" else model.init_weights(zero_init_last=False)
    assert not torch.equal(next(iter(regulators(model)))[1].mix.weight, start)
    found = gradients(model.train())
    assert {name for name, _ in model.named_parameters() if ".regulator." in name} <= set(found)
    assert all(grad.isfinite().all() for grad in found.values())
