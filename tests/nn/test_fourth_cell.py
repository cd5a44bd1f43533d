"""A fourth built-in cell is a row of `CELL_GATES`, a class and its equations: everything else follows."""

import pytest
import torch
from safetensors.torch import save_file

from regulate import RegulateError, RegulatorConfig, load, plan, regulate, save
from regulate.config import CELL_GATES
from regulate.inspect import record
from regulate.kernels import reference
from regulate.models import cifar_resnet
from regulate.nn import cells
from regulate.testing import verify
from regulate.tools.cli import main


def minimal(x, state, gates, candidate):
    """The minimal gated unit (Zhou et al. 2016): `f = sigmoid(W * [X, H'])`, `H = (1 - f).H' + f.tanh(...)`."""
    (h,) = state or (torch.zeros_like(x),)
    (f,) = (torch.sigmoid(gate) for gate in gates(x, h))
    (n,) = candidate(x, f * h)
    return (torch.lerp(h, torch.tanh(n), f),)


@pytest.fixture
def fourth(monkeypatch):
    """The name of a cell that is there for one test."""
    monkeypatch.setitem(CELL_GATES, "mgu", {"gates": "f", "candidate": "n"})
    monkeypatch.setattr(reference, "mgu", minimal, raising=False)
    made = type("ConvMGUCell", (cells._Cell,), {"_name": "mgu"})
    monkeypatch.setitem(cells.CELLS, "mgu", made)
    return "mgu"


def test_the_table_and_the_classes_are_the_same_cells():
    assert list(cells.CELLS) == list(CELL_GATES)
    for name, row in CELL_GATES.items():
        assert name in reference.GATES and sum(map(len, row.values())) == reference.GATES[name]


@pytest.mark.parametrize("kernel", ["light", "dense"])
def test_it_is_regulated_verified_and_planned(fourth, kernel):
    model, config = cifar_resnet(14), RegulatorConfig(fourth, kernel)
    assert verify(model, config, size=(3, 16, 16)).passed
    assert plan(model, config=config).options["cell"] == fourth


def test_it_is_stored_and_recognised(fourth, tmp_path):
    model, image = regulate(cifar_resnet(14), fourth).eval(), torch.randn(1, 3, 16, 16)
    save(model, tmp_path / "whole.safetensors")
    save_file(model.state_dict(), tmp_path / "state.safetensors")
    for file in ("whole.safetensors", "state.safetensors"):
        again = load(cifar_resnet(14), tmp_path / file).eval()
        assert torch.equal(again(image), model(image))


def test_its_gates_are_recorded(fourth):
    steps = record(regulate(cifar_resnet(14), fourth), torch.randn(1, 3, 16, 16))
    assert all(set(step.gates) == {"f", "n"} for stage in steps.values() for step in stage)


def test_the_command_line_takes_it(fourth, capsys):
    assert main(["plan", "cifar/14", "--cell", fourth]) == 0
    assert fourth in capsys.readouterr().out


def test_gates_of_a_cell_of_ones_own_are_not_guessed():
    class Own(torch.nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.gates = cells.GateConv(channels, 2)

        def forward(self, x, state):
            return (self.gates(x, x if state is None else state[0])[1],)

    steps = record(regulate(cifar_resnet(14), Own), torch.randn(1, 3, 16, 16))
    assert all(step.gates == {} for stage in steps.values() for step in stage)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_gate_convolutions_of_other_widths_are_no_cell_of_this_library(rows, tmp_path):
    state = regulate(cifar_resnet(14), "lstm").state_dict()
    cut = {k: v[: rows * len(v) // 4] if ".cell." in k else v for k, v in state.items()}
    if rows == 1:
        cut = {k.replace(".gates.", ".candidate.") if ".cell." in k else k: v for k, v in cut.items()}
    save_file(cut, tmp_path / "state.safetensors")
    with pytest.raises(RegulateError, match="of no cell of this library"):
        load(cifar_resnet(14), tmp_path / "state.safetensors")
