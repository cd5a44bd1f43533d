"""Every architecture of architectures.py, one by one. The sample runs always, the others with `-m zoo`.

With REGULATE_ZOO_RESULTS=DIR each case leaves its figures in DIR; models_page.py makes docs/models.md of them.
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest
import timm
import torch
from torchvision import models

from regulate import NoBlocksError, Plan, plan, regulate
from regulate.analysis.candidates import survey
from regulate.analysis.inputs import sizes
from regulate.analysis.meta_copy import skeleton
from regulate.config import RegulatorConfig
from regulate.models.by_name import load_model
from regulate.testing import distance, example_inputs, perturb, verify_pair
from regulate.utils.modes import private_rng

from . import models_page
from .architectures import BY_HAND, COUNTS, SAMPLE, TIMM_FILES, TOO_LARGE
from .count_blocks import names

pytestmark = pytest.mark.gate

# What a small input is: 64 pixels, or what the architecture needs.
SIZES = {"inception_resnet_v2": (3, 128, 128), "torchvision/r3d_18": (3, 8, 32, 32)}
SIZES |= {f"torchvision/{name}": (3, 8, 32, 32) for name in ("mc3_18", "r2plus1d_18")}
# Attention over blocks of the map: their sizes must divide it, so the configured input is taken.
BLOCKWISE = {*timm.list_models(module="byoanet"), "bat_resnext26ts"}


def small_size(name, model):
    config = getattr(model, "pretrained_cfg", {})
    if name in SIZES:
        return SIZES[name]
    if name in BLOCKWISE or config.get("fixed_input_size"):
        return config["input_size"]
    return (3, 64, 64)


def odd_size(size):
    return (3, 9, 49, 65) if len(size) == 4 else (3, 97, 131)


def run(model, inputs, training=False, seed=0):
    with private_rng(seed, 0), torch.no_grad():
        return model.train(training)(*inputs)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in SAMPLE else pytest.mark.zoo) for n in COUNTS])
def test_architecture(name):
    model = load_model(name)
    if hasattr(model, "transform"):  # a detector enlarges its images
        model.transform.min_size, model.transform.max_size = (96,), 160
    seen = survey(skeleton(model), RegulatorConfig(), sizes(model))
    assert sorted(site.block.name for site in seen.sites) == sorted(names(model))
    assert len(seen.sites) == COUNTS[name]
    figures = {"name": name, "expected": COUNTS[name], "found": len(seen.sites)}
    try:
        drawn = plan(model)
    except NoBlocksError as error:
        assert not COUNTS[name] or "a stage of one block" in str(error)
        figures["reason"] = "no residual block" if not COUNTS[name] else "every stage has one block"
        return record(figures)
    assert Plan.from_dict(json.loads(json.dumps(drawn.to_dict()))) == drawn
    alone = [entry.name for entry in drawn.skipped if "a stage of one block" in entry.reason]
    assert len(drawn.blocks) + len(alone) == COUNTS[name]

    size = small_size(name, model)
    perturb(model, [example_inputs(model, size, batch=4, seed=seed) for seed in (1, 2)]).eval()
    original = copy.deepcopy(model.state_dict())
    regulated = regulate(model)
    state = regulated.state_dict()
    assert [key for key in state if ".regulator." not in key] == list(original)
    assert all(torch.equal(state[key], value) for key, value in original.items())
    assert isinstance(regulated, type(model))

    check_odd_size(model, regulated, odd_size(size))
    check_dropout(model, regulated, example_inputs(model, size))
    verdict = verify_pair(model, regulated, example_inputs(model, size), len(drawn.blocks))
    assert verdict.lost == ()
    assert verdict.eval_error < 1e-5 or verdict.eval_error < own_rounding(model, example_inputs(model, size))
    figures.update(
        regulated=len(drawn.blocks),
        stages=len(drawn.stages),
        parameters=drawn.parameters,
        growth=drawn.parameters / drawn.base_parameters,
        macs=drawn.macs,
        macs_growth=drawn.macs / drawn.base_macs,
        norm=drawn.blocks[0].norm.kind,
        error=verdict.eval_error,
        train_difference=verdict.train_difference,
    )
    return record(figures)


def own_rounding(model, inputs):
    """How far the network itself is from float64."""
    exact = copy.deepcopy(model).double()
    return distance(run(exact, tuple(x.double() for x in inputs)), run(model, inputs))


def check_odd_size(model, regulated, size):
    inputs = example_inputs(model, size, batch=1)
    try:
        expected = run(model, inputs)
    except (RuntimeError, AssertionError, ValueError):
        return  # the original itself refuses it
    error = distance(expected, run(regulated, inputs))
    assert error < 1e-5 or error < own_rounding(model, inputs)


def check_dropout(model, regulated, inputs):
    """What is random in train mode in the original is so in the regulated network, and nothing else."""
    varies = []
    for network in (model, regulated):
        a, b = (run(copy.deepcopy(network), inputs, True, seed) for seed in (1, 2))
        varies.append(distance(a, b) > 0)
    assert varies[0] == varies[1]


def record(figures):
    folder = os.environ.get("REGULATE_ZOO_RESULTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{figures['name'].replace('/', '-')}.json").write_text(json.dumps(figures))


def test_counts_by_hand_are_the_counts():
    assert len(BY_HAND) >= 20
    assert {name: COUNTS[name] for name in BY_HAND} == BY_HAND


def test_the_zoo_holds_every_architecture_of_the_files_it_claims():
    listed = {name for file in TIMM_FILES for name in timm.list_models(module=file)}
    assert listed == {n for n in (*COUNTS, *TOO_LARGE) if n in listed}
    prefixes = ("resnet", "resnext", "wide_resnet", "regnet")
    vision = {f"torchvision/{n}" for n in models.list_models(models) if n.startswith(prefixes)}
    assert vision <= {*COUNTS, *TOO_LARGE}


def test_the_sample_has_an_architecture_of_every_file():
    assert set(SAMPLE) <= set(COUNTS)
    assert all(set(SAMPLE) & set(timm.list_models(module=file)) for file in TIMM_FILES)


def test_the_page_is_compared_with_the_sample():
    results = {name: {"name": name, "found": 8, "expected": 8, "reason": "no residual block"} for name in SAMPLE}
    text = "\n".join(models_page.row(figures) for figures in results.values())
    assert models_page.differing(results, text) == []
    assert models_page.differing({**results, "resnet18": {**results["resnet18"], "found": 7}}, text) == ["resnet18"]
    with pytest.raises(SystemExit, match="resnet18"):
        models_page.differing({name: results[name] for name in SAMPLE[1:]}, text)


@pytest.mark.zoo
@pytest.mark.parametrize("name", TOO_LARGE)
def test_too_large_is_true(name):
    from .count_blocks import load_weightless

    assert sum(p.numel() for p in load_weightless(name).parameters()) > 100e6


@pytest.mark.parametrize("name", ["resnet34", "resnest26d", "regnety_002", "dm_nfnet_f0"])
def test_drop_path_still_switches(name):
    try:
        model = timm.create_model(name, drop_path_rate=0.5, drop_rate=0.0)
    except AssertionError:
        pytest.skip(f"timm {timm.__version__} has no drop path in {name}")
    size = (3, 64, 64)
    perturb(model, [example_inputs(model, size, batch=4, seed=seed) for seed in (1, 2)])
    regulated = regulate(model)
    inputs = example_inputs(model, size)
    assert distance(run(regulated, inputs, True, 1), run(regulated, inputs, True, 2)) > 1e-3
    assert distance(run(regulated, inputs, False, 1), run(regulated, inputs, False, 2)) == 0
