"""A new file is on the disk before it takes the old one's place."""

from __future__ import annotations

import os

import pytest
import torch

from regulate.checkpoint.archive import write


@pytest.mark.skipif(os.name != "posix", reason="elsewhere a folder cannot be opened")
def test_the_file_is_flushed_before_it_takes_its_place_and_its_folder_after(tmp_path, monkeypatch):
    path, happened = tmp_path / "a", []
    path.write_bytes(b"old")
    sync, move = os.fsync, os.replace
    monkeypatch.setattr("os.fsync", lambda handle: (happened.append(os.fstat(handle)), sync(handle))[1])
    monkeypatch.setattr("os.replace", lambda *paths: (happened.append(paths[1]), move(*paths))[1])
    write(path, {"x": torch.ones(1000)}, {})
    file, moved, folder = happened
    assert moved == path.resolve()
    assert (file.st_ino, file.st_size) == (path.stat().st_ino, path.stat().st_size)
    assert folder.st_ino == tmp_path.stat().st_ino
