"""A file is written whole or not at all, in the place of regular files only."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from regulate import CheckpointError, is_regulated, load, regulate, save
from regulate.models.by_name import load_model

pytestmark = pytest.mark.slow

KILLED = """
import os, signal, sys
import safetensors.torch
from regulate import regulate, save
from regulate.checkpoint import archive
from regulate.models.by_name import load_model

def half(tensors, path, metadata):
    safetensors.torch.save_file(tensors, path, metadata=metadata)
    with open(path, "r+b") as file:
        file.truncate(1000)
    print("writing", flush=True)
    signal.pause()

archive.save_file = half
save(regulate(load_model("resnet18"), "rnn"), sys.argv[1])
"""


@pytest.mark.use("save, load, switch", "a killed process leaves the old file")
def test_a_killed_process_leaves_the_old_file(good, tmp_path):
    path = tmp_path / "a"
    path.write_bytes(good.read_bytes())
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(path)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    ) as process:
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(signal.SIGKILL)
    assert path.read_bytes() == good.read_bytes()
    assert len(list(tmp_path.iterdir())) == 2, "the kill came too late"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(good, tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(good.read_bytes())

    def full(tensors, where, metadata):
        Path(where).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("regulate.checkpoint.archive.save_file", full)
    with pytest.raises(OSError, match="no space"):
        save(regulate(load_model("resnet18")), path)
    assert path.read_bytes() == good.read_bytes()
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_a_link_and_the_mode_is_a_new_files(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_bytes(b"old")
    link.symlink_to(real)
    save(regulate(load_model("resnet18")), link)
    assert link.is_symlink()
    assert is_regulated(load(load_model("resnet18").eval(), real))
    (tmp_path / "plain").touch()
    assert real.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("a folder", Path.mkdir),
        ("no regular file", os.mkfifo),
        ("no regular file", lambda path: path.symlink_to(path)),
        ("no regular file", lambda path: (os.mkfifo(path.parent / "pipe"), path.symlink_to(path.parent / "pipe"))),
    ],
    ids=["folder", "pipe", "loop", "link to a pipe"],
)
def test_save_takes_the_place_of_regular_files_only(kind, make, tmp_path):
    make(tmp_path / "a")
    before = {path.name: path.lstat().st_mode for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match=f"is {kind}; give the path of a file"):
        save(regulate(load_model("cifar/14")), tmp_path / "a")
    assert {path.name: path.lstat().st_mode for path in tmp_path.iterdir()} == before


def test_a_name_may_be_as_long_as_names_can_be(tmp_path):
    save(regulate(load_model("cifar/14")), tmp_path / ("a" * 255))
    assert is_regulated(load(load_model("cifar/14"), tmp_path / ("a" * 255)))


def test_the_file_holds_no_absolute_path(good):
    header = good.read_bytes()[: 8 + struct.unpack("<Q", good.read_bytes()[:8])[0]]
    assert os.fsencode(Path.cwd()) not in header
