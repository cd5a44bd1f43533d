"""torch's own tools on a regulated network: compile, export, trace, re-trace."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from ..helpers import network, stirred

pytestmark = pytest.mark.gate

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
