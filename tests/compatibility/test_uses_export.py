"""Compilers, exporters and quantizers on a regulated network."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.export import Dim

from .uses import ONE, X, close, plain, regulated, use

pytestmark = pytest.mark.gate

SOME = ("resnet18", "torchvision/resnet50", "resnetv2_18", "dpn48b")
SMALL = ("resnet18", "resnetv2_18")
ODD = torch.randn(1, 3, 97, 131, generator=torch.Generator().manual_seed(6))
DYNAMIC = {0: Dim("batch", min=1, max=64), 2: Dim("height", min=33, max=512), 3: Dim("width", min=33, max=512)}


def frames(model, dynamic):
    """How often torch.compile has compiled after one, two and three batch sizes, without a break in the graph."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=dynamic)
    counts = []
    for size in (2, 3, 5):
        x = torch.randn(size, 3, 64, 64)
        with torch.no_grad():
            assert close(compiled(x), model(x))
        counts.append(counter.frame_count)
    return counts


@use("torch", "torch.compile(fullgraph=True): compiles as often as the original when the batch size changes", SOME)
def test_compile(name):
    assert frames(regulated(name), None) == frames(plain(name), None)


@use("torch", "torch.compile(fullgraph=True, dynamic=True): compiles once", (*SMALL, "dpn48b"))
def test_compile_dynamic(name):
    assert frames(regulated(name), True) == [1, 1, 1]


@use("torch", "torch.compile: training, gradients of the eager network", ("resnet18", "dpn48b"))
def test_compile_training(name):
    model = regulated(name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = []
    for run in (model, compiled):
        model.zero_grad()
        run(X).square().mean().backward()
        found.append({key: p.grad.clone() for key, p in model.named_parameters()})
    assert close(found[1], found[0], 1e-3)


@use("torch", "torch.compile with inductor: equal outputs", ONE)
def test_inductor(name):
    model = regulated(name)
    with torch.no_grad():
        assert close(torch.compile(model, fullgraph=True)(X), model(X))


def skip_without_dynamic_sizes(name, strict=False):
    """torch 2.8 and 2.9 find a condition on a plain ResNet's height."""
    try:
        torch.export.export(plain(name), (X,), dynamic_shapes=(DYNAMIC,), strict=strict)
    except torch._dynamo.exc.UserError:
        pytest.skip(f"torch {torch.__version__} does not export the plain network with these dynamic sizes either")


def same_when_exported(name, strict):
    skip_without_dynamic_sizes(name, strict)
    model = regulated(name)
    program = torch.export.export(model, (X,), dynamic_shapes=(DYNAMIC,), strict=strict).module()
    with torch.no_grad():
        for x in (X, ODD):
            assert close(program(x), model(x))


@use("torch", "torch.export with dynamic batch, height and width", SOME)
def test_export(name):
    same_when_exported(name, strict=False)


@use("torch", "torch.export, strict, with dynamic batch, height and width", SMALL)
def test_export_strict(name):
    same_when_exported(name, strict=True)


@use("torch", "ONNX export, equal numbers in onnxruntime, dynamic batch, height and width", SMALL)
def test_onnx(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra `dev`")
    pytest.importorskip("onnxscript", reason="needs the extra `dev`")
    skip_without_dynamic_sizes(name)
    model = regulated(name)
    program = torch.onnx.export(model, (X,), dynamo=True, dynamic_shapes=(DYNAMIC,), verbose=False)
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for x in (X, ODD):
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            assert close(torch.from_numpy(found), model(x))


@pytest.mark.filterwarnings("ignore")
@use("torch", "torch.jit.trace (TorchScript is deprecated in torch)", SOME)
def test_jit_trace(name):
    model = regulated(name)
    traced = torch.jit.trace(model, X)
    with torch.no_grad():
        assert close(traced(X), model(X))
        assert close(traced(X[:1]), model(X[:1]))


SCRIPT = (
    "it compiles the text of a class, and the new code is not in it; TorchScript is deprecated since torch 2.11 "
    "(pytorch/pytorch#27475): torch.export and torch.jit.trace work"
)


@pytest.mark.filterwarnings("ignore")
@use("torch", "torch.jit.script (TorchScript is deprecated in torch)", ("resnet18",), {"resnet18": SCRIPT})
def test_jit_script(name):
    torch.jit.script(regulated(name))


@pytest.mark.filterwarnings("ignore")
@use("torch", "quantization by torchao's pt2e: prepare, calibrate, convert", ("resnet18",))
def test_quantization(name):
    try:
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
    except (ImportError, AttributeError):
        pytest.skip("no torchao that goes with this torch; the extra `dev` has it")

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    model = regulated(name)
    observed = prepare_pt2e(torch.export.export(model, (X,)).module(), quantizer)
    with torch.no_grad():
        observed(X)
        converted = convert_pt2e(observed)
        assert "quantize_per_tensor" in converted.code
        assert close(converted(X), model(X), 0.2)
        assert not close(converted(X), model(X), 1e-4)
