"""Commands say on a terminal what they are doing; in a pipe or a file they print their result alone."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from regulate.tools import bench, progress
from regulate.tools.cli import main

pytestmark = pytest.mark.slow

PLAN = [sys.executable, "-m", "regulate", "plan", "cifar/20"]


class Terminal:
    def __init__(self):
        self.text = ""

    def isatty(self):
        return True

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.fixture
def terminal(monkeypatch):
    stderr = Terminal()
    monkeypatch.setattr(progress, "_PATIENCE", 0.02)
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stderr))  # pytest's own capture sets sys.stderr anew
    return stderr


def shown(text):
    """What is left on the last line."""
    return text.split("\r\033[K")[-1]


def test_work_is_named_with_its_seconds_and_erased(terminal):
    with progress.working("planning resnet152"):
        time.sleep(0.3)
        assert shown(terminal.text) == "planning resnet152, 0 s"
    assert shown(terminal.text) == ""


def test_work_that_fails_leaves_no_line_and_no_thread(terminal):
    with pytest.raises(ValueError, match="it failed"), progress.working("planning"):
        time.sleep(0.1)
        raise ValueError("it failed")
    before = terminal.text
    time.sleep(0.1)
    assert terminal.text == before and shown(before) == ""


def test_rounds_are_counted(terminal):
    bench.in_turn({"one": lambda: None}, rounds=2)
    assert [line for line in terminal.text.split("\r\033[K") if line] == [
        f"measuring, round {number} of 4" for number in (1, 2, 3, 4)
    ]
    assert shown(terminal.text) == ""


def test_an_error_stands_on_a_line_of_its_own(terminal, monkeypatch):
    def fails(*arguments):
        progress.step("measuring, round", 2, 4)
        raise RuntimeError("no memory")

    monkeypatch.setattr(bench, "in_turn", fails)
    assert main(["bench", "cifar/14", "--input-size", "16"]) == 2
    assert shown(terminal.text) == ""


def test_nothing_but_the_result_in_a_pipe():
    done = subprocess.run(PLAN, capture_output=True, text=True, check=True)
    assert "new parameters" in done.stdout
    assert done.stderr == ""


def test_a_terminal_shows_what_a_command_is_doing():
    ours, theirs = pty.openpty()
    slow = "import time; from regulate.tools import cli; plan = cli.plan\n"
    slow += "cli.plan = lambda *a, **k: (time.sleep(1.2), plan(*a, **k))[1]\n"
    command = [sys.executable, "-c", slow + "cli.main(['plan', 'cifar/20'])"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, check=True)
    said = os.read(ours, 10_000).decode()
    os.close(ours), os.close(theirs)
    assert "planning cifar/20, 1 s" in said
    assert shown(said) == ""
    assert b"new parameters" in done.stdout
