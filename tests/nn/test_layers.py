"""The layers of a fusion are called in the ordinary way, and may be wrapped, hooked, converted and replaced."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d
from torch import fx, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import weight_norm

from regulate import ConvGRUCell, ConvLSTMCell, ConvRNNCell, kernels
from regulate.kernels.cpu import native
from regulate.nn.layers import BatchNormReLU2d, Mix2d
from regulate.nn.regulator import Fusion
from regulate.schema.values import Norm

CELLS = (ConvRNNCell, ConvGRUCell, ConvLSTMCell)


def fusion(activation="relu", **options):
    torch.manual_seed(0)
    made = Fusion(3, 4, Norm("batch"), activation=activation, **options)
    with torch.no_grad():
        for norm in (made.hidden_norm, made.mix_norm):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
    return made


def maps():
    """A map that comes out of a ReLU, and a hidden state."""
    torch.manual_seed(1)
    return torch.rand(2, 4, 5, 6, requires_grad=True), torch.randn(2, 3, 5, 6, requires_grad=True)


def plain(part, x, h):
    """The equations with torch's operators and the layers' parameters."""

    def norm(of, x):
        return F.batch_norm(x, of.running_mean, of.running_var, of.weight, of.bias, of.training, 0.0, of.eps)

    h = F.relu(norm(part.hidden_norm, h))
    y = norm(part.mix_norm, F.conv2d(torch.cat([x, h], 1), part.mix.weight))
    return F.relu(y) if part.activation == "relu" else y


def close(a, b):
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("activation", ["relu", "none"])
def test_hooks_see_ordinary_calls(train, activation):
    part, (x, h) = fusion(activation).train(train), maps()
    seen = {}
    for name in ("hidden_norm", "mix", "mix_norm"):
        part.get_submodule(name).register_forward_hook(lambda m, args, out, name=name: seen.update({name: (args, out)}))
    expected = plain(part, x, h)
    y, (hidden,) = part(x, (h,))
    assert close(y, expected)
    assert list(seen) == ["hidden_norm", "mix", "mix_norm"]
    assert seen["hidden_norm"][0] == (h,) and seen["hidden_norm"][1] is hidden
    assert seen["mix"][0] == (x, hidden)
    rectifies = activation == "relu"  # and is told what it must not cut
    assert seen["mix_norm"][0] == ((seen["mix"][1], x) if rectifies else (seen["mix"][1],))
    assert seen["mix_norm"][1] is y
    assert close(seen["mix"][1], F.conv2d(torch.cat([x, hidden], 1), part.mix.weight))


def test_a_hook_may_change_what_passes():
    part, (x, h) = fusion(), maps()
    part.hidden_norm.register_forward_hook(lambda m, args, out: out * 0)
    part.mix.register_forward_pre_hook(lambda m, args: (args[0] * 0, args[1]))
    y, (hidden,) = part(x, (h,))
    assert not hidden.any()
    assert close(y, part.mix_norm.bias.relu()[:, None, None].expand_as(y))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_inference_takes_no_memory_beside_the_norms_result(fused, layout, monkeypatch):
    norm = fusion().eval().mix_norm
    x, unfused = (torch.randn(2, 4, 5, 6).to(memory_format=layout) for _ in range(2))
    before, given = (x.clone(), unfused.clone()), (x, unfused) if fused else (x,)
    expected = norm(*given)  # with gradients
    monkeypatch.setattr(F, "relu", None)
    with torch.no_grad():
        found = norm(*given)
    assert torch.equal(found, expected) and found.is_contiguous(memory_format=layout)
    assert torch.equal(x, before[0]) and torch.equal(unfused, before[1])


@pytest.mark.parametrize("train", [True, False])
def test_gradients_are_those_of_the_equations(train):
    part, found = fusion().train(train), []
    for way in (lambda x, h: part(x, (h,))[0], lambda x, h: plain(part, x, h)):
        x, h = maps()
        part.zero_grad()
        way(x, h).square().sum().backward()
        weights = (part.mix.weight, part.mix_norm.weight, part.mix_norm.bias, part.hidden_norm.weight)
        found.append([x.grad, h.grad, *(weight.grad.clone() for weight in weights)])
    assert all(close(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("cell", CELLS)
def test_a_hook_of_all_modules_costs_no_fast_form(cell, monkeypatch):
    ran, seen = [], []
    forward = native.forward
    monkeypatch.setattr(native, "forward", lambda *a: ran.append("step") or forward(*a))
    part, (x, h) = fusion(cell=cell(3)), maps()
    handle = register_module_forward_hook(lambda m, args, out: seen.append(type(m).__name__))
    try:
        y, (hidden, *_) = part(x, part.cell(h))
    finally:
        handle.remove()
    assert ran == ["step"]
    assert type(hidden.grad_fn).__name__ == type(y.grad_fn).__name__ == "_NormReLUBackward"
    gates = seen.count("GateConv")
    assert gates == (2 if cell is ConvGRUCell else 1)
    assert seen[gates:] == [cell.__name__, "BatchNormReLU2d", "Mix2d", "BatchNormReLU2d", "Fusion"]


@pytest.mark.parametrize("cell", CELLS)
def test_what_somebody_does_to_the_inputs_of_a_gate_convolution_counts(cell, monkeypatch):
    one, (_, x) = cell(3), maps()
    state = one(x * 0.5)
    expected = one(x * 2, state)
    for conv in one.children():
        if conv is one.gates:
            conv.register_forward_pre_hook(lambda m, args: (args[0] * 2, *args[1:]))
    assert all(close(a, b) for a, b in zip(one(x, state), expected, strict=True))


@pytest.mark.parametrize("cell", CELLS)
def test_pruned_gates_take_the_fast_form_and_its_gradients(cell, monkeypatch):
    one, (_, x) = cell(3), maps()
    for conv in one.children():
        prune.l1_unstructured(conv, "weight", 0.5)
    ran = []
    forward = native.forward
    monkeypatch.setattr(native, "forward", lambda *a: ran.append("step") or forward(*a))
    found = []
    for form in ("native", "reference"):
        with kernels.use(form):
            for _ in range(2):  # a stale mask would have lost its graph
                one.zero_grad()
                sum(part.sum() for part in one(x)).backward()
            found.append([p.grad.clone() for p in one.parameters()])
    assert all(close(a, b) for a, b in zip(*found, strict=True))
    assert ran == ["step"] * 2


def norms_converted(part):
    return freeze_batch_norm_2d(part)


def norms_synchronised(part):
    return convert_sync_batchnorm(part)


def norms_of_torch(part):
    """As networks hold them that were pickled by earlier versions."""
    for name in ("hidden_norm", "mix_norm"):
        ours, theirs = part.get_submodule(name), nn.BatchNorm2d(part.get_submodule(name).num_features)
        theirs.load_state_dict(ours.state_dict())
        setattr(part, name, theirs)
    mix = nn.Conv2d(part.mix.in_channels, part.mix.out_channels, 1, bias=False)
    mix.load_state_dict(part.mix.state_dict())
    part.mix = mix
    part.train(part.training)
    return pickle.loads(pickle.dumps(part))


@pytest.mark.parametrize("change", [norms_converted, norms_synchronised, norms_of_torch])
@pytest.mark.parametrize("activation", ["relu", "none"])
def test_other_norms_in_their_places_are_rectified_as_well(change, activation):
    part, (x, h) = fusion(activation).eval(), maps()
    expected = plain(part, x, h)
    changed = change(copy.deepcopy(part))
    assert not any(isinstance(m, BatchNormReLU2d) for m in changed.modules())
    assert close(changed(x, (h,))[0], expected)


def test_a_wrapper_around_the_mix_is_used():
    class Adapter(nn.Module):
        """As LoRA's: the layer, and a small one beside it, of one map."""

        def __init__(self, base):
            super().__init__()
            self.base, self.small = base, nn.Conv2d(base.in_channels, base.out_channels, 1)

        def forward(self, x):
            return self.base(x) + self.small(x)

    part, (x, h) = fusion(), maps()
    part.mix = Adapter(part.mix)
    merged = copy.deepcopy(part)
    merged.mix = copy.deepcopy(part.mix.base)
    with torch.no_grad():
        merged.mix.weight = nn.Parameter(part.mix.base.weight + part.mix.small.weight)
    # The small one's bias is taken out by the norm.
    assert close(part(x, (h,))[0], merged(x, (h,))[0])
    part(x, (h,))[0].sum().backward()
    assert part.mix.small.weight.grad is not None


def test_parametrized_and_pruned_layers():
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    part, (x, h) = fusion(), maps()
    parametrize.register_parametrization(part.mix, "weight", Doubled())
    parametrize.register_parametrization(part.mix_norm, "bias", Doubled())
    prune.random_unstructured(part.hidden_norm, "weight", 0.5)
    assert close(part(x, (h,))[0], plain(part, x, h))
    assert isinstance(part.mix, Mix2d)


def test_a_mix_of_another_kind_is_torchs_convolution():
    x, h = torch.randn(2, 4, 6, 6), torch.randn(2, 2, 6, 6)
    for options in ({"stride": 2}, {"padding": 1}, {"groups": 2}):
        mix = Mix2d(6, 4, 1, **options)
        assert torch.equal(mix(x, h), F.conv2d(torch.cat([x, h], 1), mix.weight, mix.bias, **options))


def test_a_graph_of_torch_fx_holds_them_as_calls():
    part, (x, h) = fusion().eval(), maps()
    graph = fx.symbolic_trace(part, concrete_args={"state": (fx.PH,)})
    calls = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert calls == ["hidden_norm", "mix", "mix_norm"]
    train = graph.train()(x, (h,))[0]
    assert close(train, plain(part.train(), x, h))


def test_they_are_pickled_and_copied():
    part, (x, h) = fusion().eval(), maps()
    buffer = io.BytesIO()
    torch.save(part, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(part), torch.load(buffer, weights_only=False)):
        assert isinstance(other.mix_norm, BatchNormReLU2d)
        assert close(other(x, (h,))[0], plain(part, x, h))


@pytest.mark.parametrize(("options", "expected"), [
    ({}, "Fusion(3 into 4, activation='relu', 42 parameters)"),
    ({"skip": True}, "Fusion(3 into 4, activation='relu', skip=True, 42 parameters)"),
    ({"cell": ConvRNNCell(3)}, "Fusion(3 into 4, activation='relu', cell=ConvRNNCell, 78 parameters)"),
])  # fmt: skip
def test_a_regulator_is_one_line_of_a_printed_network(options, expected):
    assert repr(fusion(**options)) == expected


def test_a_printed_regulator_shows_what_was_put_into_it():
    part = fusion()
    part.mix = nn.Sequential(part.mix)
    assert "(mix): Sequential" in repr(part)
    part = fusion(cell=ConvRNNCell(3))
    weight_norm(part.mix)
    assert "_WeightNorm" in repr(part) and "(gates): GateConv" in repr(part)
