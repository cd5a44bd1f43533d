"""torch's own tools on a regulated network: compile, export, trace, re-trace."""

from __future__ import annotations

import re

import pytest
import torch
from torch import fx

from .helpers import network, small, stirred

# Of the families in docs/compatibility.md the tests of the uses take care.
NAMES = ["legacy_xception", "regnety_002", "cifar/20"]
X = torch.randn(2, 3, 64, 64)


def compiled(model):
    return torch.compile(model, fullgraph=True, backend="eager")


def exported(model):
    batch = torch.export.Dim("batch", min=1, max=8)
    return torch.export.export(model, (X,), dynamic_shapes={"x": {0: batch}}).module()


def traced(model):
    return torch.jit.trace(model, X)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kernel", ["light", "dense"])
@pytest.mark.parametrize("tool", [compiled, exported, traced, fx.symbolic_trace])
@pytest.mark.parametrize("name", NAMES)
def test_the_same_outputs(name, tool, kernel):
    model = stirred(network(name), cell="gru" if kernel == "dense" else "lstm", kernel=kernel, stages=[0])
    with torch.no_grad():
        assert torch.allclose(tool(model)(X), model(X), rtol=1e-4, atol=1e-4)


ALLOCATED = re.compile(r"empty_strided_cpu\(\((\d+), (\d+), (\d+), (\d+)\), \((\d+), (\d+), ")


@pytest.mark.parametrize("train", [False, True])
def test_inductor_lays_no_concatenation_out_twice(train):
    from torch._inductor.utils import run_and_get_code

    model = stirred(small()).train(train)
    x = torch.randn(2, 3, 12, 12)
    with torch.set_grad_enabled(train):
        expected = model(x)
        found, code = run_and_get_code(torch.compile(model, fullgraph=True), x)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert found.stride() == expected.stride()
    # The concatenations of 8 and 8 channels: all in channels last, in which inductor runs convolutions.
    strides = [numbers[5] for numbers in ALLOCATED.findall("".join(code)) if numbers[1:3] == ("16", "12")]
    assert strides
    assert set(strides) == {"1"}
