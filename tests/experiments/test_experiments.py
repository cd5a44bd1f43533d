"""The experiments' runner: presets, resuming, two processes, errors in one line, comparisons on two seeds."""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imsave
from safetensors.torch import load_file
from torch import nn
from torchvision.datasets import CIFAR10, CIFAR100

from regulate import kernels

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))

import train  # noqa: E402
from experiments import batches, data, loop, networks, store  # noqa: E402
from experiments.options import RECIPES, Options, options_of  # noqa: E402
from experiments.place import Place  # noqa: E402

pytestmark = pytest.mark.gate

HERE = Place(0, 1, torch.device("cpu"))
TINY = ("--subset", "64", "--quiet", "--model", "resnet20")


def run(folder, *arguments):
    assert train.main([*TINY, "--out", str(folder), *arguments]) == 0
    return json.loads((folder / "run.json").read_text())


def figures(report):
    return [{key: value for key, value in entry.items() if not key.endswith("seconds")} for entry in report["epochs"]]


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


@pytest.fixture
def fake_cifar(monkeypatch):
    """A handful of images passes for CIFAR."""
    for kind in (CIFAR10, CIFAR100):
        monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
        monkeypatch.setattr(kind, "_load_meta", lambda self: setattr(self, "classes", []))
    monkeypatch.setattr(store, "DIGESTS", {})


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


def test_a_resumed_run_ends_with_the_same_numbers(tmp_path):
    whole = run(tmp_path / "whole", "--epochs", "4", "--cell", "lstm", "--milestones", "1", "3")
    run(tmp_path / "parts", "--epochs", "2", "--cell", "lstm", "--milestones", "1", "3")
    parts = run(tmp_path / "parts", "--epochs", "4", "--cell", "lstm", "--milestones", "1", "3", "--resume")
    assert figures(parts) == figures(whole)
    assert same_network(tmp_path / "whole", tmp_path / "parts")


def test_a_resumed_run_repeats_the_augmentation(tmp_path, fake_cifar):
    common = ["--dataset", "cifar10", "--data", str(cifar_files(tmp_path / "data", CIFAR10)), "--recipe", "short"]
    common += ["--batch", "32", "--epochs", "2"]
    whole = run(tmp_path / "whole", *common)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Run, "save", stops_after_one_epoch)
        assert train.main([*TINY, "--out", str(tmp_path / "parts"), *common]) == 130
    torch.rand(7)
    parts = run(tmp_path / "parts", *common, "--resume")
    assert figures(parts) == figures(whole)
    assert same_network(tmp_path / "whole", tmp_path / "parts")


def stops_after_one_epoch(self, path, save=loop.Run.save):
    save(self, path)
    if self.history:
        raise KeyboardInterrupt


def same_network(*folders):
    a, b = (load_file(folder / "model.safetensors") for folder in folders)
    return all(torch.equal(a[key], b[key]) for key in a)


def test_every_epoch_has_an_order_of_its_own():
    options = Options(seed=3, subset=64)
    made = batches.training(data.load("digits", subset=64), options, HERE)

    def order(epoch):
        made.epoch = epoch
        return made.order().tolist()

    assert order(0) == order(0) != order(1)
    assert sorted(order(1)) == list(range(64))
    model = networks.build(options, data.load("digits"))
    state = loop.Run(model, torch.optim.SGD(model.parameters(), 0.1), [], {})
    loop.epoch(state, model, made, loop.Job(options, options.plan(), HERE, Path()), 4)
    assert made.epoch == 4


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


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path):
    run(tmp_path, "--epochs", "1")
    before = (tmp_path / "checkpoint.pt").read_bytes()
    command = [sys.executable, "-W", "ignore", "examples/train.py", *TINY, "--resume", "--epochs", "2"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        # No file can grow beyond 64 KiB, as on a disk that is full.
        capture_output=True, text=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16)),
    )  # fmt: skip
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "checkpoint.pt cannot be written" in done.stderr
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "model.safetensors", "run.json"]


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
    assert not [key for key in load_file(tmp_path / "model.safetensors") if key.startswith("module.")]


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
    counts = torch.bincount(data.load("digits", subset=95, seed=3).train.labels, minlength=10)
    assert counts.sum() == 95
    assert counts.max() - counts.min() == 1
    a, b, c = (data.load("digits", subset=50, seed=seed).train.pixels for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
