"""Tensors of strange kinds: they go through, or a clear error comes before anything has changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from regulate import CheckpointError, RegulateError, UnsupportedModelError, load, plan, regulate, save, unregulate
from regulate.models.cifar import cifar_resnet

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
SEED = torch.Generator().manual_seed(2)


def holding(tensor):
    """The same network each time, with a buffer."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = cifar_resnet(14).eval()
    model.layer1.register_buffer("extra", tensor)
    return model


KINDS = {
    "complex": torch.randn(3, dtype=torch.complex64, generator=SEED),
    "conjugate": torch.randn(3, dtype=torch.complex64, generator=SEED).conj(),
    "negative": torch.randn(3, dtype=torch.complex64, generator=SEED).conj().imag,
    "complex128": torch.randn(3, dtype=torch.complex128, generator=SEED),
    "sparse": torch.eye(3).to_sparse(),
    "expanded": torch.full((1,), 0.5).expand(4),
    "strided": torch.arange(10.0).as_strided((4, 4), (2, 1)),
    "uint16": torch.arange(3).to(torch.uint16),
    "empty": torch.empty(0),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inplace", [False, True])
def test_buffers_that_go_through(kind, inplace):
    model = holding(KINDS[kind])
    expected, keys = model(X), list(model.state_dict())
    regulated = regulate(model, inplace=inplace)
    assert torch.equal(regulated(X), expected)
    assert list(unregulate(regulated).state_dict()) == keys
    assert regulated.layer1.extra.layout is KINDS[kind].layout


@pytest.mark.parametrize("only", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("sparse", "complex128")])
def test_files_hold_the_values(kind, only, tmp_path):
    save(regulate(holding(KINDS[kind]), inplace=True), tmp_path / "a", regulator_only=only)
    here = KINDS[kind] if only or kind == "expanded" else torch.zeros_like(KINDS[kind])
    for inplace in (False, True):
        model = load(holding(here), tmp_path / "a", inplace=inplace)
        assert torch.equal(model.layer1.extra.resolve_conj(), KINDS[kind].resolve_conj())


@pytest.mark.parametrize(("kind", "says"), [("sparse", "stored as sparse_coo"), ("complex128", "safetensors does not")])
def test_what_a_file_cannot_hold(kind, says, tmp_path):
    with pytest.raises(CheckpointError, match=rf"layer1\.extra is .*{says}"):
        save(regulate(holding(KINDS[kind])), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def pruned():
    model = holding(None)
    prune.l1_unstructured(model.layer1[0].conv1, "weight", 0.3)
    return model


def with_part(path, part):
    model = holding(None)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, part)
    return model


REFUSED = {
    "quantized": (lambda: holding(torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)), "layer1.extra there"),
    "nested": (lambda: holding(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])), "layer1.extra there"),
    "lazy linear": (lambda: with_part("fc", nn.LazyLinear(10)), "fc.weight has none yet.*run the model once"),
    "lazy convolution": (lambda: with_part("layer1.0.conv2", nn.LazyConv2d(16, 3)), "layer1.0.conv2.weight has none"),
    "lazy norm": (lambda: with_part("bn1", nn.LazyBatchNorm2d()), "bn1.weight has none yet"),
}


@pytest.mark.parametrize("call", [plan, regulate, lambda model: regulate(model, inplace=True)])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(kind, call):
    make, says = REFUSED[kind]
    model = make()
    before = {name: dict(vars(m)) for name, m in model.named_modules()}
    with pytest.raises(UnsupportedModelError, match=says):
        call(model)
    assert {name: dict(vars(m)) for name, m in model.named_modules()} == before


def test_pruned_networks_are_changed_in_place_or_made_permanent_first():
    with pytest.raises(
        UnsupportedModelError, match=r"layer1\.0\.conv1\.weight is, .*prune\.remove.* or pass inplace=True"
    ):
        regulate(pruned())
    model = pruned()
    expected = model(X)
    assert torch.equal(regulate(model, inplace=True)(X), expected)
    model = pruned()
    prune.remove(model.layer1[0].conv1, "weight")
    assert torch.equal(regulate(model)(X), expected)


class Uncopyable(nn.Identity):
    def __deepcopy__(self, memo):
        if any(isinstance(value, torch.Tensor) and value.is_meta for value in memo.values()):
            return nn.Identity()
        raise RuntimeError("holds a socket. Really")


def test_a_model_that_cannot_be_copied():
    model = with_part("fc", Uncopyable())
    with pytest.raises(RegulateError, match="failed: holds a socket; pass inplace=True"):
        regulate(model)
    assert torch.equal(model(X), regulate(model, inplace=True)(X))
