"""The experiments' runner: presets, seeds, two processes, options of speed, errors in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imsave
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torchvision.datasets import CIFAR10, CIFAR100

from regulate import kernels

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import train
from experiments import batches, data, loop, networks
from experiments.options import RECIPES, Options, options_of

from .runs import HERE, cifar_files, figures, run

pytestmark = pytest.mark.gate


def image_folder(root):
    for split in ("train", "val"):
        for name in ("a", "b", "c"):
            (root / split / name).mkdir(parents=True)
            for index in range(2):
                imsave(root / split / name / f"{index}.png", np.random.default_rng(index).random((48, 40, 3)))
    return root


def test_the_presets_are_the_papers():
    cifar, imagenet = RECIPES["paper"], RECIPES["imagenet"]
    assert (cifar.rate, cifar.batch, cifar.epochs, cifar.milestones) == (0.1, 64, 150, (80,))
    assert (imagenet.rate, imagenet.batch, imagenet.epochs, imagenet.milestones) == (0.06, 128, 90, (50, 70))
    assert all((r.momentum, r.decay) == (0.9, 1e-4) for name, r in RECIPES.items() if name not in ("short", "upgrade"))
    assert [Options(dataset=name).plan() for name in data.NAMES] == [
        RECIPES[name] for name in ("digits", "paper", "paper", "paper", "imagenet")
    ]


@pytest.mark.parametrize("kind", [CIFAR10, CIFAR100])
def test_the_cifar_preset_runs(kind, tmp_path, fake_cifar):
    root = cifar_files(tmp_path / "data", kind)
    name = kind.__name__.lower()
    report = run(tmp_path / "run", "--dataset", name, "--data", str(root), "--cell", "gru", "--epochs", "1")
    assert report["recipe"]["batch"] == 64
    assert report["parameters"] == 272_474 + 37_632 + (90 * 65 if kind is CIFAR100 else 0)


def test_the_imagenet_preset_runs(tmp_path):
    root = image_folder(tmp_path / "data")
    arguments = ["--dataset", "imagefolder", "--data", str(root), "--model", "timm/resnet10t", "--size", "64"]
    code = train.main([*arguments, "--epochs", "1", "--batch", "4", "--quiet", "--out", str(tmp_path / "run")])
    assert code == 0
    report = json.loads((tmp_path / "run" / "run.json").read_text())
    assert report["recipe"]["rate"] == 0.06
    assert report["top5"] >= report["top1"]


def test_a_run_says_everything(tmp_path):
    report = run(tmp_path, "--epochs", "2", "--cell", "lstm", "--stages", "0", "layer3")
    assert report["options"]["stages"] == [0, "layer3"]
    assert report["versions"]["torch"] == torch.__version__
    assert report["machine"]["instruction set"] == kernels.instruction_set()
    assert len(report["epochs"]) == 2
    assert report["top1"] == report["epochs"][-1]["top1"]
    assert report["peak_bytes"] > 10**7
    assert report["seconds"] > 0
    state = load_file(tmp_path / "model.safetensors")
    assert [k.split(".")[0] for k in state if k.endswith("cell.gates.bias")] == ["layer1", "layer3"]


@pytest.mark.parametrize("cell", ["none", "gru"])
def test_the_same_seed_is_the_same_run_and_another_is_not(cell, tmp_path):
    a, b, c = (
        figures(run(tmp_path / name, "--epochs", "2", "--cell", cell, "--seed", seed))
        for name, seed in (("a", "1"), ("b", "1"), ("c", "2"))
    )
    assert a == b != c


def test_options_of_speed_run(tmp_path):
    seen = set()

    def watch(module, args, out):
        if isinstance(module, nn.Conv2d) and module.training:
            seen.add((out.dtype, out.is_contiguous(memory_format=torch.channels_last)))

    for options, expected in (((), (torch.float32, False)), (("--amp", "--channels-last"), (torch.bfloat16, True))):
        seen.clear()
        with nn.modules.module.register_module_forward_hook(watch):
            run(tmp_path / str(len(options)), "--epochs", "1", "--cell", "lstm", *options)
        assert {dtype for dtype, _ in seen} == {expected[0]}
        # Narrow maps may be of both layouts at once.
        assert expected in seen and (not expected[1] or seen == {expected})


@pytest.mark.parametrize("clip", [None, 0.5])
def test_gradients_are_clipped_where_asked(clip, tmp_path):
    seen = []

    def watch(optimizer, args, kwargs):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        seen.append(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).item())

    handle = register_optimizer_step_pre_hook(watch)
    try:
        report = run(tmp_path, "--epochs", "1", "--cell", "gru", *(("--clip", str(clip)) if clip else ()))
    finally:
        handle.remove()
    assert report["options"]["clip"] == clip
    assert max(seen) > 1 if clip is None else max(seen) == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize("last", [False, True])
def test_images_have_the_layout_of_the_weights(last, tmp_path):
    options = Options(channels_last=last)
    images = loop.Job(options, options.plan(), HERE, tmp_path).input(torch.zeros(2, 3, 4, 5))
    assert images.is_contiguous(memory_format=torch.channels_last) == last


def test_starting_from_weights_is_the_identity_start(tmp_path):
    plain = run(tmp_path / "plain", "--epochs", "2")
    options = options_of(
        ["--cell", "lstm", "--weights", str(tmp_path / "plain" / "model.safetensors"), "--subset", "64"]
    )
    model = networks.build(options, data.load("digits")).eval()
    tests = batches.testing(data.load("digits"), options, HERE)
    assert loop.accuracy(model, tests, loop.Job(options, options.plan(), HERE, tmp_path)) == (
        plain["top1"],
        plain["top5"],
    )


@pytest.mark.parametrize("model", ["timm/resnetv2_50x1_bit", "timm/resnet10t", "resnet20"])
def test_a_new_head_is_the_classifier(model, tmp_path):
    asked = ["--model", model, "--seed", "0", "--new-head", "--subset", "64"]
    images = data.load("digits")
    old = networks.build(options_of(["--model", model, "--seed", "1"]), images)
    save_file(old.state_dict(), tmp_path / "start.safetensors")
    made = networks.build(options_of([*asked, "--weights", str(tmp_path / "start.safetensors")]), images)
    fresh = networks.build(options_of(["--model", model]), images)
    other = {key for key, value in made.state_dict().items() if not torch.equal(value, old.state_dict()[key])}
    head = {"timm/resnetv2_50x1_bit": "head.fc", "timm/resnet10t": "fc", "resnet20": "fc"}[model]
    assert f"{head}.weight" in other <= {f"{head}.weight", f"{head}.bias"}
    assert torch.equal(made.state_dict()[f"{head}.weight"], fresh.state_dict()[f"{head}.weight"])


def says(capsys, *arguments):
    try:
        code = train.main([*arguments, "--quiet"])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2
    assert "Traceback" not in error
    return error.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--dataset", "cifar10", "--data", "nowhere"], "download=True"),
        (["--dataset", "imagefolder", "--data", "nowhere"], "train/CLASS"),
        (["--model", "resnet21"], "resnet20"),
        (["--model", "timm/nosuch"], "nosuch"),
        (["--cell", "transformer"], "invalid choice"),
        (["--stages", "1"], "--stages would do nothing without a regulator; give a --cell"),
        (["--kernel", "dense", "--frozen"], "--kernel, --frozen would do nothing without a regulator; give a --cell"),
        (["--new-head"], "--new-head would do nothing without a network to start from; give --weights"),
        (["--recipe", "short", "--milestones", "3"], "--milestones would do nothing in one cycle; give a --recipe of"),
        (["--model", "timm/resnet18", "--width", "8"], "--width would do nothing to a network of timm; give a CIFAR"),
        (["--model", "timm/resnet18", "--shortcut", "A"], "--shortcut would do nothing to a network of timm"),
        (["--size", "64"], "--size would do nothing to images of a fixed size; give --dataset imagefolder"),
        (["--cell", "gru", "--stages", "7"], "there is no stage 7"),
        (["--subset", "5000"], "at most"),
        (["--subset", "10"], "smaller --batch"),
        (["--weights", "nosuch.pt"], "nosuch.pt"),
        (["--rate", "1e9", "--subset", "64"], "is not finite; lower the rate"),
        (["--rate", "1e9", "--batch", "16"], "the loss is"),
        (["--subset", "-8"], "takes 1 or more, got -8"),
        (["--epochs", "0"], "takes 1 or more"),
        (["--batch", "0"], "takes 1 or more"),
        (["--test-every", "0"], "takes 1 or more"),
        (["--workers", "-1"], "takes 0 or more"),
        (["--seed", "99999999999999"], "takes less than 4294967296"),
        (["--pretrained"], "give --model timm/NAME"),
        (["--weights", "."], "--weights takes the model.safetensors of a run"),
        (["--clip", "0"], "takes a number above 0"),
        (["--clip", "nan"], "takes a number above 0"),
    ],
)
def test_errors_are_one_line(arguments, word, capsys, tmp_path):
    assert word in says(capsys, "--epochs", "3", "--out", str(tmp_path), *arguments)


def test_subsets_are_balanced_and_seeded():
    counts = torch.bincount(data.load("digits", subset=95, seed=3).train.labels, minlength=10)
    assert counts.sum() == 95
    assert counts.max() - counts.min() == 1
    a, b, c = (data.load("digits", subset=50, seed=seed).train.pixels for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
