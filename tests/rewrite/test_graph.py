"""A torch.fx.GraphModule is regulated as a graph: the plan is spliced in as nodes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import fx, nn

from regulate import (
    UnsupportedModelError,
    disabled,
    inspect,
    is_regulated,
    load,
    plan,
    regulate,
    regulator_parameters,
    regulator_state_dict,
    save,
    unregulate,
)
from regulate.models.cifar import CifarBlock
from regulate.rewrite.lookup import containers
from regulate.testing import distance

from ..helpers import network, stir

pytestmark = pytest.mark.slow

X = torch.randn(2, 3, 64, 64)
NAMES = ["resnet18", "torchvision/resnet50", "seresnext26d_32x4d"]


def graph(name):
    return fx.symbolic_trace(network(name))


@pytest.mark.parametrize("name", NAMES)
def test_it_starts_as_the_same_function_and_has_the_same_plan(name):
    model, made = network(name), graph(name)
    regulated = regulate(made)
    assert isinstance(regulated, fx.GraphModule)
    assert is_regulated(regulated)
    assert not is_regulated(made)
    blocks = [b.name for b in plan(model).blocks]
    assert [b.name for b in plan(made).blocks] == blocks
    assert set(regulator_state_dict(regulated)) == set(regulator_state_dict(regulate(model)))
    with torch.no_grad():
        assert torch.equal(regulated(X), made(X))
        odd = torch.randn(1, 3, 97, 75)
        assert torch.equal(regulated(odd), made(odd))


@pytest.mark.use("torch", "regulate a torch.fx.GraphModule")
@pytest.mark.parametrize("name", NAMES)
def test_it_computes_what_the_regulated_network_of_modules_computes(name):
    model = stir(regulate(network(name), seed=1)).eval()
    made = stir(regulate(graph(name), seed=1)).eval()
    made.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = model(X)
        assert distance(made(X), expected) < 1e-5
        for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), fx.symbolic_trace(made)):
            assert distance(other(X), expected) < 1e-4  # traced anew, cells are the readable form
    made(X).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in regulator_parameters(made))


def test_it_can_be_switched_off_changed_and_given_back():
    plain = graph("resnet18")
    code = plain.code
    model = stir(regulate(plain)).eval()
    other = copy.deepcopy(model)
    with torch.no_grad():
        on, off = model(X), plain(X)
        assert not torch.allclose(on, off, rtol=1e-3)
        with disabled(model):
            assert torch.equal(model(X), off)
            assert torch.equal(other(X), on)
        model.recompile()
        with disabled(model):
            assert torch.equal(model(X), off)
        with disabled(other):
            assert torch.equal(other(X), off)
        back = unregulate(model)
        assert back.code == code
        assert not is_regulated(back)
        assert [k for k in back.state_dict() if "regulator" in k] == []
        assert torch.equal(back(X), off)
        assert is_regulated(regulate(back))


def test_what_was_done_to_the_graph_since_stays():
    plain = graph("resnet18")
    model = regulate(plain)
    (output,) = model.graph.find_nodes(op="output")
    with model.graph.inserting_before(output):
        output.args = (model.graph.call_function(torch.neg, (output.args[0],)),)
    model.recompile()
    with torch.no_grad():
        assert torch.equal(unregulate(model)(X), -plain(X))


def test_a_pickle_and_a_transform_are_given_back_as_well(tmp_path):
    plain = graph("resnet18")
    model = stir(regulate(plain)).eval()
    for other in (pickle.loads(pickle.dumps(model)), fx.Transformer(model).transform(), copy.deepcopy(model)):
        save(other, tmp_path / "model.safetensors")
        with torch.no_grad():
            assert torch.equal(load(graph("resnet18"), tmp_path / "model.safetensors").eval()(X), model(X))
            back = unregulate(other)
            assert not is_regulated(back) and [k for k in back.state_dict() if "regulator" in k] == []
            assert torch.equal(back(X), plain(X))


def test_a_graph_within_a_graph_is_given_back():
    plain = graph("resnet18")
    inner = stir(regulate(plain, stages=[1]))
    traced = fx.Graph()
    traced.output(traced.call_module("inner", (traced.placeholder("x"),)))
    outer = fx.GraphModule({"inner": inner}, traced)
    assert [path for path, _, _ in containers(outer)] == ["inner"]
    with torch.no_grad():
        assert not torch.equal(outer(X), plain(X))
        assert torch.equal(unregulate(outer)(X), plain(X))
    assert not is_regulated(outer.inner)


def test_inplace_save_and_load(tmp_path):
    made = graph("resnet18")
    assert regulate(made, "gru", inplace=True) is made
    stir(made).eval()
    save(made, tmp_path / "model.safetensors")
    again = load(graph("resnet18"), tmp_path / "model.safetensors").eval()
    with torch.no_grad():
        assert torch.equal(again(X), made(X))


def test_compile_and_export():
    model = stir(regulate(graph("resnet18"))).eval()
    with torch.no_grad():
        expected = model(X)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.allclose(compiled(X), expected, rtol=1e-4, atol=1e-4)
        exported = torch.export.export(model, (X,)).module()
        assert torch.allclose(exported(X), expected, rtol=1e-4, atol=1e-4)


def test_a_failure_leaves_the_graph_as_it_was():
    made = fx.symbolic_trace(
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sequential(*(CifarBlock(8, 8, 1, "B", 0) for _ in range(2))))
    )
    made.get_submodule("1.1").regulator = nn.Identity()
    before = made.graph, made.code, list(made.state_dict())
    with pytest.raises(TypeError, match="something of that name"):
        regulate(made, inplace=True)
    assert (made.graph, made.code, list(made.state_dict())) == before


def test_what_follows_calls_of_blocks_says_that_there_are_none():
    with pytest.raises(UnsupportedModelError, match="blocks are nodes"):
        inspect.record(regulate(graph("resnet18")), X)
