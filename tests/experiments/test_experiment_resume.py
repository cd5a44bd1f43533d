"""A run that is stopped goes on and ends with the numbers of one that was not; a full disk loses nothing."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torchvision.datasets import CIFAR10

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import train
from experiments import batches, checkpoint, data, loop, networks, record, runner, steps
from experiments.options import Options
from experiments.registry import EXPERIMENTS, jobs

from .runs import HERE, ROOT, TINY, cifar_files, figures, run

pytestmark = pytest.mark.gate


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
        patch.setattr(checkpoint.Run, "save", stops_after_one_epoch)
        assert train.main([*TINY, "--out", str(tmp_path / "parts"), *common]) == 130
    torch.rand(7)
    parts = run(tmp_path / "parts", *common, "--resume")
    assert figures(parts) == figures(whole)
    assert same_network(tmp_path / "whole", tmp_path / "parts")


def test_a_resumed_run_repeats_the_dropout(tmp_path, monkeypatch):
    def build(options, _):
        torch.manual_seed(options.seed)
        return nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Dropout(), nn.Linear(64, 10))

    monkeypatch.setattr(loop, "build", build)
    whole = run(tmp_path / "whole", "--epochs", "3")
    run(tmp_path / "parts", "--epochs", "1")
    assert figures(run(tmp_path / "parts", "--epochs", "3", "--resume")) == figures(whole)
    assert same_network(tmp_path / "whole", tmp_path / "parts")


def stops_after_one_epoch(self, path, save=checkpoint.Run.save):
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
    state = checkpoint.Run(model, torch.optim.SGD(model.parameters(), 0.1), [], {})
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
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint.pt",
        "lock",
        "model.safetensors",
        "run.json",
    ]


def test_a_test_that_fails_costs_no_training(tmp_path, monkeypatch, capsys):
    whole = run(tmp_path / "whole", "--epochs", "2")
    parts, asked = tmp_path / "parts", (*TINY, "--out", str(tmp_path / "parts"), "--epochs", "2")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "accuracy", lambda *_: (_ for _ in ()).throw(OSError("an image is gone")))
        for resume, done in (((), 1), (("--resume",), 1)):
            assert train.main([*asked, *resume]) == 2
            assert "an image is gone" in capsys.readouterr().err
            assert len(checkpoint.read(parts / "checkpoint.pt")["history"]) == done
    assert figures(run(parts, "--epochs", "2", "--resume")) == figures(whole)


def test_a_run_that_ends_before_its_test_is_tested(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Run, "save", stops_after_one_epoch)
        assert train.main([*TINY, "--out", str(tmp_path), "--epochs", "5", "--test-every", "5"]) == 130
    report = run(tmp_path, "--epochs", "1", "--test-every", "5", "--resume")
    assert report["top1"] == run(tmp_path / "whole", "--epochs", "1")["top1"]


def test_two_processes_do_not_train_in_one_folder(tmp_path, capsys):
    with checkpoint.alone(tmp_path):
        assert train.main([*TINY, "--out", str(tmp_path), "--epochs", "1"]) == 2
        assert "another process trains in" in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    run(tmp_path, "--epochs", "1")


def test_a_network_that_says_nan_has_no_accuracy(tmp_path, capsys):
    assert train.main([*TINY, "--out", str(tmp_path), "--batch", "64", "--epochs", "1", "--rate", "1e30"]) == 2
    assert "test images is not finite" in capsys.readouterr().err
    assert not (tmp_path / "run.json").exists()


@pytest.mark.parametrize("content", [b"", b"no zip at all", None])
def test_a_damaged_checkpoint_is_one_line(content, tmp_path, capsys):
    run(tmp_path, "--epochs", "1")
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:5000] if content is None else content)
    for options in ((), ("--resume",)):
        assert train.main([*TINY, "--out", str(tmp_path), "--epochs", "2", *options]) == 2
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1
        assert f"{path} is no whole checkpoint" in said and "delete it" in said


def test_a_checkpoint_runs_no_code(tmp_path, capsys):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    run(tmp_path / "run", "--epochs", "1")
    path = tmp_path / "run" / "checkpoint.pt"
    torch.save({**checkpoint.read(path), "parts": [Code()]}, path)
    assert train.main([*TINY, "--out", str(tmp_path / "run"), "--epochs", "2", "--resume"]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "is no whole checkpoint (UnpicklingError); delete it" in said
    assert not (tmp_path / "made").exists()


def test_the_length_of_a_cycle_stays(tmp_path, capsys):
    common = ("--recipe", "short", "--batch", "64")
    run(tmp_path, *common, "--epochs", "1")
    run(tmp_path, *common, "--epochs", "1", "--resume")
    assert train.main([*TINY, "--out", str(tmp_path), *common, "--epochs", "2", "--resume"]) == 2
    assert "a run with other epochs; give another folder" in capsys.readouterr().err


def test_a_run_that_is_there_is_not_begun_anew(tmp_path, capsys):
    run(tmp_path, "--epochs", "2")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert train.main([*TINY, "--out", str(tmp_path), "--epochs", "2", "--seed", "7"]) == 2
    assert "holds 2 epochs of a run; give --resume" in capsys.readouterr().err
    assert train.main([*TINY, "--out", str(tmp_path), "--epochs", "1", "--resume"]) == 2
    assert "holds 2 epochs, and 1 were asked for" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_report_is_of_the_run_that_is_there(tmp_path, monkeypatch):
    run(tmp_path, "--epochs", "1")
    (tmp_path / "checkpoint.pt").unlink()
    monkeypatch.setattr(loop, "_one_epoch", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert train.main([*TINY, "--out", str(tmp_path), "--epochs", "1", "--seed", "1"]) == 130
    assert not (tmp_path / "run.json").exists()


def test_what_a_run_goes_on_with_is_noted(tmp_path, monkeypatch):
    for epochs, commit in ((1, "a"), (2, "b"), (3, "b")):
        monkeypatch.setattr(record, "commit", lambda commit=commit: commit)
        report = run(tmp_path, "--epochs", str(epochs), "--resume")
    assert report["commit"] == "a"
    assert [(part["epoch"], part["commit"]) for part in report["later"]] == [(1, "b")]
    assert report["later"][0]["machine"] == report["machine"]


def test_a_start_that_was_exchanged_is_refused(tmp_path, capsys):
    for seed in ("0", "1"):
        run(tmp_path / seed, "--epochs", "1", "--seed", seed)
    start = tmp_path / "0" / "model.safetensors"
    report = run(tmp_path / "run", "--epochs", "1", "--weights", str(start))
    assert report["weights"] == hashlib.sha256(start.read_bytes()).hexdigest()
    for weights in ((), ("--weights", str(tmp_path / "1" / "model.safetensors"))):
        assert train.main([*TINY, "--out", str(tmp_path / "run"), "--epochs", "2", "--resume", *weights]) == 2
        assert "a run with other weights" in capsys.readouterr().err
    start.write_bytes(start.read_bytes()[:100])
    assert train.main([*TINY, "--out", str(tmp_path / "new"), "--epochs", "1", "--weights", str(start)]) == 2
    assert "no whole safetensors file" in capsys.readouterr().err


def test_a_full_disk_at_the_network_is_one_line(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(loop, "save_file", full)
    assert train.main([*TINY, "--out", str(tmp_path), "--epochs", "1"]) == 2
    assert "model.safetensors cannot be written (I/O error: No space left" in capsys.readouterr().err
    monkeypatch.undo()
    assert len(run(tmp_path, "--epochs", "1", "--resume")["epochs"]) == 1


def test_a_full_disk_as_a_run_diverges_is_one_line(tmp_path, capsys, monkeypatch):
    def full(path, *_):
        raise OSError(28, "No space left on device", str(path))

    def diverges(*_):
        raise steps.DivergedError("the loss is nan; lower the rate")

    job = next(iter(jobs([EXPERIMENTS["smoke"]])))
    folders = runner.Folders(tmp_path / "work", tmp_path / "results")
    monkeypatch.setattr(runner, "run", diverges)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(runner, "_put", full)
        runner._work(job, folders, None)
    assert len(lines := capsys.readouterr().err.splitlines()) == 1 and "No space left" in lines[0]
    with pytest.raises(SystemExit):
        runner._work(job, folders, None)
    assert json.loads(folders.failure(job).read_text())["error"] == "the loss is nan"
