"""What a command cannot do is a line and exit code 2."""

from __future__ import annotations

import pytest

from regulate.kernels import choose
from regulate.tools import bench
from regulate.tools.cli import main


def line(capsys):
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error.strip()


@pytest.mark.parametrize("option", ["--batch", "--rounds", "--size"])
@pytest.mark.parametrize("number", ["0", "-1", "many"])
def test_numbers_start_at_one(option, number, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "cifar/14", f"{option}={number}"])
    assert stopped.value.code == 2
    assert f"a whole number of 1 or more, got '{number}'" in capsys.readouterr().err


def test_no_images_cannot_be_drawn(capsys):
    with pytest.raises(SystemExit):
        main(["inspect", "cifar/14", "--images", ".", "--count", "0"])
    assert "--count: a whole number of 1 or more, got '0'" in capsys.readouterr().err


def test_a_wrong_setting_of_the_kernels(monkeypatch, capsys):
    monkeypatch.setattr(choose, "_DEFAULT", "quick")
    for command in (["doctor"], ["plan", "cifar/14"]):
        assert main(command) == 2
        assert line(capsys).startswith("regulate: REGULATE_KERNELS must be one of auto, ")


def test_what_torch_asserts_is_told_and_what_this_package_asserts_is_not_hidden(monkeypatch, capsys):
    def fails(error):
        def measure(setting):
            raise error

        monkeypatch.setattr(bench, "measure", measure)
        return main(["bench", "cifar/14", "--device", "cuda"])

    assert fails(AssertionError("Torch not compiled with CUDA enabled")) == 2
    assert line(capsys) == "regulate: Torch not compiled with CUDA enabled"
    with pytest.raises(AssertionError):
        fails(AssertionError())
