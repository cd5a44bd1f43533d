"""The kernels compiled quickly."""

from __future__ import annotations

import shlex

import pytest

from regulate.kernels.cpu import build

from .compilers import compiler


@pytest.fixture(scope="module")
def quickly_compiled(tmp_path_factory):
    """Compiling without optimisation takes a quarter of the time."""
    command = shlex.join(build.compiler())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", compiler(tmp_path_factory.mktemp("quick"), f'exec {command} "$@" -O0'))
        yield
