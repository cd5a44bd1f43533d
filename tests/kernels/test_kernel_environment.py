"""REGULATE_KERNELS chooses the form of the cells; a wrong value is said where it is asked for."""

from __future__ import annotations

import pytest
import torch

from regulate import ConvLSTMCell
from regulate.kernels import choose

from ..processes import python

pytestmark = pytest.mark.slow

X = torch.randn(2, 4, 5, 5)


def test_the_environment_variable():
    done = python("import regulate; print(regulate.kernels.setting())", REGULATE_KERNELS="aten")
    assert done.stdout == "aten\n"
    command = "import sys; sys.argv[1:] = ['doctor']; import regulate.__main__"
    done = python(command, REGULATE_KERNELS="quick")
    said = "REGULATE_KERNELS must be one of auto, native, triton, aten, reference; it is 'quick'"
    assert (done.returncode, done.stderr) == (2, f"regulate: {said}\n")


def test_a_step_does_not_take_a_wrong_environment_variable(monkeypatch):
    monkeypatch.setattr(choose, "_DEFAULT", "quick")
    with pytest.raises(ValueError, match="REGULATE_KERNELS must be one of auto"):
        ConvLSTMCell(4)(X)
