"""torch's own tools on a regulated network: compile, export, trace, re-trace."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from regulate import UnsupportedModelError, regulate, regulator_parameters

from .helpers import network, stirred

NAMES = ["resnet18", "torchvision/resnet50", "legacy_xception", "dpn48b", "regnety_002"]
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


def test_torch_jit_script_does_not_take_it():
    """The day that this fails, README.md says too little."""
    with pytest.raises((ValueError, RuntimeError)):
        torch.jit.script(stirred(network("resnet18")))


def test_data_parallel_wrappers_come_after(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = stirred(network("resnet18")).train()
        for wrap in (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel):
            model.zero_grad()
            wrapped = wrap(model)
            wrapped(X).square().mean().backward()
            assert len(list(regulator_parameters(wrapped))) == len(list(regulator_parameters(model)))
            with pytest.raises(UnsupportedModelError, match=r"regulate model\.module"):
                regulate(wrap(network("resnet18")))
            assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    finally:
        torch.distributed.destroy_process_group()
