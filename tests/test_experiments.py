"""The experiments' runner: presets, resuming, two processes, errors in one line, comparisons on two seeds."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imsave
from torchvision.datasets import CIFAR10, CIFAR100

from regulate import kernels

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import data  # noqa: E402
import train  # noqa: E402
from options import RECIPES, Options, options_of  # noqa: E402

TINY = ("--subset", "64", "--quiet", "--model", "resnet20")


def run(folder, *arguments):
    assert train.main([*TINY, "--out", str(folder), *arguments]) == 0
    return json.loads((folder / "run.json").read_text())


def figures(report):
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in report["epochs"]]


def cifar_files(root, kind):
    """A CIFAR folder with a handful of images."""
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    key = "labels" if kind is CIFAR10 else "fine_labels"
    names = [name for name, _ in (*kind.train_list, *kind.test_list)]
    for name in names:
        pixels = np.random.default_rng(0).integers(0, 255, (80, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, key: [i % 10 for i in range(80)]}))
    meta = folder / kind.meta["filename"]
    meta.write_bytes(pickle.dumps({kind.meta["key"]: [str(i) for i in range(10)]}))
    return root


def image_folder(root):
    for split in ("train", "val"):
        for name in ("a", "b", "c"):
            (root / split / name).mkdir(parents=True)
            for index in range(2):
                imsave(root / split / name / f"{index}.png", np.random.default_rng(index).random((48, 40, 3)))
    return root


def test_the_presets_are_the_papers():
    cifar, imagenet = RECIPES["cifar"], RECIPES["imagenet"]
    assert (cifar.rate, cifar.batch, cifar.epochs, cifar.milestones) == (0.1, 64, 150, (80,))
    assert (imagenet.rate, imagenet.batch, imagenet.epochs, imagenet.milestones) == (0.06, 128, 90, (50, 70))
    assert all((r.momentum, r.decay) == (0.9, 1e-4) for r in RECIPES.values())
    assert [Options(dataset=name).plan() for name in data.NAMES] == [
        RECIPES[name] for name in ("digits", "cifar", "cifar", "imagenet")
    ]


@pytest.mark.parametrize("kind", [CIFAR10, CIFAR100])
def test_the_cifar_preset_runs(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(CIFAR10, "_load_meta", lambda self: setattr(self, "classes", [str(i) for i in range(10)]))
    root = cifar_files(tmp_path / "data", kind)
    name = kind.__name__.lower()
    report = run(tmp_path / "run", "--dataset", name, "--data", str(root), "--cell", "gru", "--epochs", "1")
    assert report["recipe"]["batch"] == 64
    assert report["parameters"] == 272_474 + 37_632
    loaded = data.load(name, str(root))
    image, _ = loaded.train[0]
    assert image.shape == (3, 32, 32)
    assert not torch.equal(image, loaded.train[0][0]), "training images are not augmented"
    assert torch.equal(loaded.test[0][0], loaded.test[0][0])


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
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert [k.split(".")[0] for k in state if k.endswith("cell.gates.bias")] == ["layer1", "layer3"]


@pytest.mark.parametrize("cell", ["none", "gru"])
def test_the_same_seed_is_the_same_run_and_another_is_not(cell, tmp_path):
    a, b, c = (
        figures(run(tmp_path / name, "--epochs", "2", "--cell", cell, "--seed", seed))
        for name, seed in (("a", "1"), ("b", "1"), ("c", "2"))
    )
    assert a == b != c


def test_a_resumed_run_ends_with_the_same_numbers(tmp_path):
    whole = run(tmp_path / "whole", "--epochs", "4", "--cell", "lstm", "--milestones", "1", "3")
    run(tmp_path / "parts", "--epochs", "2", "--cell", "lstm", "--milestones", "1", "3")
    parts = run(tmp_path / "parts", "--epochs", "4", "--cell", "lstm", "--milestones", "1", "3", "--resume")
    assert figures(parts) == figures(whole)
    a, b = (torch.load(tmp_path / name / "model.pt", weights_only=True) for name in ("whole", "parts"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_resumed_run_repeats_the_augmentation(tmp_path, monkeypatch):
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(CIFAR10, "_load_meta", lambda self: setattr(self, "classes", [str(i) for i in range(10)]))
    common = ["--dataset", "cifar10", "--data", str(cifar_files(tmp_path / "data", CIFAR10))]
    whole = run(tmp_path / "whole", *common, "--epochs", "2")
    run(tmp_path / "parts", *common, "--epochs", "1")
    torch.rand(7)
    assert figures(run(tmp_path / "parts", *common, "--epochs", "2", "--resume")) == figures(whole)


def test_every_epoch_has_an_order_of_its_own():
    options = Options(seed=3)
    batches, _ = train.loaders(data.load("digits"), options, options.plan(), train.Place(0, 1, torch.device("cpu")))

    def order(epoch):
        batches.sampler.set_epoch(epoch)
        return list(batches.sampler)

    assert order(0) == order(0) != order(1)
    seen = []
    batches.sampler.set_epoch = seen.append
    model = train.build(options, data.load("digits", subset=64))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1])
    short = [next(iter(batches))]
    loader = type("Loader", (list,), {"sampler": batches.sampler})(short)
    for number in (4, 5):
        train.epoch(
            train.Run(model, optimizer, schedule, []),
            model,
            loader,
            options,
            train.Place(0, 1, torch.device("cpu")),
            number,
        )
    assert seen == [4, 5]


def started(folder, *arguments):
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(ROOT / "examples" / "train.py"),
        "--model",
        "resnet20",
        "--subset",
        "64",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [*command, "--out", str(folder), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT,
        # A job in the background ignores Ctrl-C, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_goes_on(blow, tmp_path):
    arguments = ["--cell", "rnn", "--epochs", "60"]
    with started(tmp_path / "run", *arguments) as process:
        while not (line := process.stdout.readline()).startswith("epoch   2"):
            assert line, process.stderr.read()
        time.sleep(0.3)
        process.send_signal(blow)
        _, error = process.communicate()
    assert process.returncode == (-9 if blow == signal.SIGKILL else 130)
    assert ("--resume" in error) == (blow == signal.SIGINT)
    assert "Traceback" not in error
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    done = len(checkpoint["history"])
    assert done >= 2
    resumed = run(tmp_path / "run", "--cell", "rnn", "--epochs", str(done + 1), "--resume")
    assert figures(resumed) == figures(run(tmp_path / "whole", "--cell", "rnn", "--epochs", str(done + 1)))


def test_two_processes_train_on_the_recipes_batch(tmp_path):
    job = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(ROOT / "examples" / "train.py")]
    arguments = [
        "--model",
        "resnet20",
        "--subset",
        "64",
        "--cell",
        "gru",
        "--epochs",
        "2",
        "--quiet",
        "--out",
        str(tmp_path),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-W", "ignore", *job, *arguments], env=environment, check=True, cwd=ROOT, timeout=300
    )
    report = json.loads((tmp_path / "run.json").read_text())
    assert report["machine"]["processes"] == 2
    assert report["recipe"]["batch"] == 32
    assert len(report["epochs"]) == 2
    assert not [key for key in torch.load(tmp_path / "model.pt", weights_only=True) if key.startswith("module.")]


def test_options_of_speed_run(tmp_path):
    report = run(tmp_path, "--epochs", "1", "--cell", "lstm", "--amp", "--channels-last")
    assert report["options"]["amp"]


def test_starting_from_weights_is_the_identity_start(tmp_path):
    plain = run(tmp_path / "plain", "--epochs", "2")
    options = options_of(["--cell", "lstm", "--weights", str(tmp_path / "plain" / "model.pt"), "--subset", "64"])
    model = train.build(options, data.load("digits")).eval()
    loader = torch.utils.data.DataLoader(data.load("digits").test, 256)
    at = train.Place(0, 1, torch.device("cpu"))
    assert train.accuracy(model, loader, options, at) == (plain["top1"], plain["top5"])


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
        (["--stages", "1"], "give a --cell"),
        (["--cell", "gru", "--stages", "7"], "there is no stage 7"),
        (["--subset", "5000"], "at most"),
        (["--subset", "10"], "smaller --batch"),
        (["--weights", "nosuch.pt"], "nosuch.pt"),
        (["--rate", "1e9", "--subset", "64"], "the loss is"),
    ],
)
def test_errors_are_one_line(arguments, word, capsys, tmp_path):
    assert word in says(capsys, *arguments, "--epochs", "3", "--out", str(tmp_path))


def test_subsets_are_balanced_and_seeded():
    labels = [label for _, label in data.load("digits", subset=95, seed=3).train]
    counts = torch.bincount(torch.tensor(labels), minlength=10)
    assert counts.sum() == 95
    assert counts.max() - counts.min() == 1
    a, b, c = (data.load("digits", subset=50, seed=seed).train.indices for seed in (0, 0, 1))
    assert a == b != c
