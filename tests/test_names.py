"""Names are a file format: original keys stay, new ones lie under their own block."""

from __future__ import annotations

import pytest
import torch
from timm import create_model
from timm.optim import param_groups_layer_decay

from regulate import regulate, regulator_parameters, regulator_state_dict
from regulate.models.by_name import load_model
from regulate.rewrite.guard import regulators

MODELS = ["resnet18", "seresnext26d_32x4d", "legacy_seresnet18", "torchvision/resnet50", "resnet50_gn"]


@pytest.mark.parametrize("name", MODELS)
def test_original_keys_and_values_stay_in_order(name):
    model = load_model(name)
    regulated = regulate(model)
    state = regulated.state_dict()
    assert [key for key in state if ".regulator." not in key] == list(model.state_dict())
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert [n for n, _ in regulated.named_parameters() if ".regulator." not in n] == [
        n for n, _ in model.named_parameters()
    ]


@pytest.mark.parametrize("name", MODELS)
def test_an_original_checkpoint_loads_with_only_new_keys_missing(name):
    model = load_model(name)
    regulated = regulate(model)
    missing, unexpected = regulated.load_state_dict(model.state_dict(), strict=False)
    assert unexpected == []
    # torch fills in `num_batches_tracked` where a checkpoint has none.
    new = {key for key in regulator_state_dict(regulated) if not key.endswith("num_batches_tracked")}
    assert set(missing) == new


def test_new_names_and_shapes_are_frozen():
    state = regulator_state_dict(regulate(load_model("resnet18"), "lstm", stages=["layer1"]))
    norm = {"weight": (64,), "bias": (64,), "running_mean": (64,), "running_var": (64,), "num_batches_tracked": ()}
    expected = {
        "layer1.0.regulator.cell.gates.mix": (256, 2, 1, 1),
        "layer1.0.regulator.cell.gates.weight": (256, 1, 3, 3),
        "layer1.0.regulator.cell.gates.bias": (256,),
    }
    for block in ("layer1.0", "layer1.1"):
        expected[f"{block}.regulator.mix.weight"] = (64, 128, 1, 1)
        for part in ("hidden_norm", "mix_norm"):
            expected.update({f"{block}.regulator.{part}.{key}": shape for key, shape in norm.items()})
    assert {key: tuple(value.shape) for key, value in state.items()} == expected


def test_names_of_the_other_cells():
    def cell_keys(cell, kernel):
        state = regulator_state_dict(regulate(load_model("resnet18"), cell, kernel=kernel, stages=[0]))
        prefix = "layer1.0.regulator.cell."
        return {key.removeprefix(prefix): tuple(v.shape) for key, v in state.items() if key.startswith(prefix)}

    light = {"mix": (64, 2, 1, 1), "weight": (64, 1, 3, 3), "bias": (64,)}
    assert cell_keys("rnn", "light") == {f"gates.{k}": v for k, v in light.items()}
    assert cell_keys("gru", "light") == {
        **{f"gates.{k}": (128, *v[1:]) for k, v in light.items()},
        **{f"candidate.{k}": v for k, v in light.items()},
    }
    assert cell_keys("lstm", "dense") == {"gates.weight": (256, 128, 3, 3), "gates.bias": (256,)}


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "legacy_seresnet18"])
def test_layer_decay_puts_new_parameters_into_their_own_blocks_group(name):
    model = regulate(create_model(name))
    new = {id(p) for p in regulator_parameters(model)}
    names = {id(p): n for n, p in model.named_parameters()}
    scale_of = {}
    for group in param_groups_layer_decay(model, layer_decay=0.7):
        for parameter in group["params"]:
            scale_of[names[id(parameter)]] = group["lr_scale"]
    for parameter in new:
        name = names[parameter]
        block = name.split(".regulator.")[0]
        assert scale_of[name] == scale_of[f"{block}.conv1.weight"] < 1


def test_regulator_parameters_are_each_new_parameter_once():
    model = regulate(load_model("resnet18"))
    expected = [p for n, p in model.named_parameters() if ".regulator." in n]
    found = list(regulator_parameters(model))
    assert len(found) == len(expected)
    assert {id(p) for p in found} == {id(p) for p in expected}


def test_no_new_parameter_stops_channels_last():
    model = regulate(load_model("resnet18"), kernel="dense").to(memory_format=torch.channels_last)
    maps = []
    for _, fusion in regulators(model):
        fusion.register_forward_hook(lambda module, args, out: maps.extend([out[0], *out[1]]))
    model(torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last))
    assert len(maps) == 8 * 3
    assert all(each.is_contiguous(memory_format=torch.channels_last) for each in maps)
