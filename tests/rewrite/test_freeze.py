"""freeze_backbone: undone by itself and by unregulate, through wrappers and on parts, as often as one likes."""

from __future__ import annotations

import copy
import pickle
import sys
import warnings

import pytest
import torch
from timm import create_model
from torch import nn

from regulate import NotRegulatedError, freeze_backbone, regulate, regulator_parameters, unregulate
from regulate.models.cifar import cifar_resnet


def state_of(model):
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    return flags, {name: (m.training, set(vars(m))) for name, m in model.named_modules()}


def trained(model):
    return {id(p) for p in model.parameters() if p.requires_grad}


def some_of_everything():
    """A network with a frozen weight and a norm in a mode of its own."""
    model = cifar_resnet(14).train()
    model.fc.weight.requires_grad_(False)
    model.layer2[0].bn1.eval()
    return model


def test_unregulate_undoes_it():
    model = some_of_everything()
    before = state_of(model)
    regulated = regulate(model, inplace=True)
    freeze_backbone(regulated)
    assert trained(regulated) == {id(p) for p in regulator_parameters(regulated)}
    assert state_of(unregulate(regulated)) == before


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, lambda m: nn.DataParallel(nn.DataParallel(m))])
@pytest.mark.parametrize(("outer", "inner"), [(True, False), (False, True), (True, True)])
def test_a_wrapper_and_what_it_holds_are_the_same(wrap, outer, inner):
    model = regulate(some_of_everything())
    wrapped = wrap(model)
    before = state_of(model)
    freeze_backbone(wrapped if outer else model)
    frozen = state_of(model)
    freeze_backbone(model if outer else wrapped)
    assert state_of(model) == frozen
    assert trained(model) == {id(p) for p in regulator_parameters(model)}
    freeze_backbone(wrapped if inner else model, False)
    assert state_of(model) == before
    freeze_backbone(wrapped, False)
    assert state_of(model) == before


def test_a_second_call_freezes_what_was_unfrozen():
    model = regulate(create_model("resnet18")).train()
    before = state_of(model)
    freeze_backbone(model)
    frozen = state_of(model)
    model.layer4.requires_grad_(True)
    model.layer3[0].bn1.bias.requires_grad_(True)
    model.layer4[0].regulator.requires_grad_(False)
    model.fc = nn.Linear(512, 3)
    freeze_backbone(model)
    assert not model.layer4[1].conv1.weight.requires_grad
    assert not model.fc.weight.requires_grad
    assert not model.layer4[0].regulator.mix.weight.requires_grad
    model.layer4[0].regulator.requires_grad_(True)
    assert state_of(model)[0] == frozen[0]
    freeze_backbone(model, False)
    assert state_of(model) == before


def test_norms_that_were_converted_are_frozen_by_a_second_call():
    """A conversion makes new modules, which know nothing of it: the guide has it after the conversion."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(freeze_backbone(regulate(cifar_resnet(14)))).train()
    assert model.bn1.training
    freeze_backbone(model).train()
    assert not model.bn1.training
    assert model.layer1[0].regulator.mix_norm.training


def test_norms_follow_the_mode_that_the_model_was_put_into():
    for first, then in ((True, False), (False, True)):
        model = freeze_backbone(regulate(cifar_resnet(14)).train(first))
        model.train(then)
        assert not model.bn1.training
        freeze_backbone(model, False)
        assert model.bn1.training == then


def test_a_norm_with_a_method_of_its_own_gets_it_back():
    model = regulate(cifar_resnet(14))
    calls = []
    vars(model.bn1)["train"] = method = lambda mode=True: calls.append(mode)
    freeze_backbone(model)
    model.train()
    assert vars(model.bn1)["train"] is not method
    freeze_backbone(model, False)
    assert vars(model.bn1)["train"] is method


def test_copies_of_a_frozen_network_are_let_go_on_their_own():
    model = freeze_backbone(regulate(cifar_resnet(14)))
    other = copy.deepcopy(model)
    unregulate(other)
    assert other.conv1.weight.requires_grad
    assert not model.conv1.weight.requires_grad
    assert model.train().bn1.training is False


@pytest.mark.parametrize("put_on", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_spectral_norms_do_not_iterate(put_on):
    model = cifar_resnet(14)
    for module in list(model.modules()):
        if isinstance(module, nn.Conv2d):
            put_on(module)
    freeze_backbone(regulate(model, input_size=16, inplace=True)).train()
    before = {key: value.clone() for key, value in model.state_dict().items() if ".regulator." not in key}
    model(torch.randn(2, 3, 16, 16)), model(torch.randn(2, 3, 16, 16))
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    freeze_backbone(model, frozen=False)
    model(torch.randn(2, 3, 16, 16))
    assert not all(torch.equal(model.state_dict()[key], value) for key, value in before.items() if key.endswith("_u"))


def test_a_network_without_regulators_is_refused_and_left_alone():
    model = cifar_resnet(14)
    before = state_of(model)
    for frozen in (True, False):
        with pytest.raises(NotRegulatedError, match=r"call regulate\(model\) first"):
            freeze_backbone(model, frozen)
    assert state_of(model) == before


@pytest.mark.parametrize(("net", "options"), [
    ("cifar/14", {}), ("cifar/14", {"fusion": "residual"}), ("norms", {}), ("cifar/14", {"cell": "gru"}),
])  # fmt: skip
def test_regulators_that_are_frozen_at_their_start_are_warned_of(net, options):
    model = cifar_resnet(14)
    if net == "norms":  # without running statistics: the form that adds x
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.BatchNorm2d):
                    setattr(module, name, nn.GroupNorm(2, child.num_features))
    model, x = regulate(model, **options).train(), torch.randn(2, 3, 16, 16)
    backbone = next(p for p in model.parameters())
    silent(model, x)  # they can learn
    for parameter in regulator_parameters(model):
        parameter.requires_grad_(False)
    with torch.no_grad():
        silent(model, x)  # nothing trains
    silent(model.eval(), x)
    with pytest.warns(UserWarning, match=r"frozen at their start.*unregulate\(model\)"):
        model.train()(x)
    silent(model, x)  # once
    assert backbone.requires_grad


def test_regulators_that_are_frozen_after_their_training_are_not():
    model = regulate(cifar_resnet(14)).train()
    with torch.no_grad():
        for parameter in regulator_parameters(model):
            parameter.add_(0.1)
            parameter.requires_grad_(False)
    silent(model, torch.randn(2, 3, 16, 16))


def silent(model, x):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)


def test_a_pickle_of_before_the_move_finds_what_keeps_a_norm_in_eval_mode():
    model = freeze_backbone(regulate(cifar_resnet(14)))
    keeps = vars(model.bn1)["train"].func
    named = pickle.dumps(keeps, protocol=0)
    assert b"regulate.rewrite.freezing" in named
    sys.modules.pop("regulate.training.freezing", None)
    with pytest.warns(DeprecationWarning, match=r"regulate\.rewrite\.freezing"):
        assert pickle.loads(named.replace(b"regulate.rewrite", b"regulate.training")) is keeps


def test_an_ensemble_trains_under_vmap():
    """A batch of weights, which says of itself that it needs no gradients, cannot be asked what it holds."""
    models = [torch.func.replace_all_batch_norm_modules_(regulate(cifar_resnet(14), seed=seed)) for seed in (0, 1)]
    parameters, buffers = torch.func.stack_module_state(models)
    x = torch.randn(2, 3, 16, 16)
    found = torch.vmap(lambda *state: torch.func.functional_call(models[0], state, (x,)), randomness="different")(
        parameters, buffers
    )
    for one, model in zip(found, models, strict=True):
        assert torch.allclose(one, model(x), atol=1e-4)
