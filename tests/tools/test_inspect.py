"""What a regulator does, against the same worked out by hand; the model is left as found."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from matplotlib.image import imread, imsave

from regulate import disabled, freeze_backbone, kernels, regulate, save
from regulate.inspect import block_accuracy, gate_statistics, hidden_norm, outputs, record, similarity
from regulate.models.by_name import load_model
from regulate.tools import figures
from regulate.tools.cli import main
from regulate.tools.figures import draw
from regulate.training.gradients import GradientWatch

from ..helpers import network, stirred

pytestmark = pytest.mark.gate

X = torch.randn(2, 3, 64, 64)


def everything(model):
    return (
        [(name, m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()],
        {key: value.clone() for key, value in model.state_dict().items()},
    )


@pytest.mark.parametrize("use", [record, similarity, outputs])
def test_the_model_is_left_as_found(use):
    model = stirred(network("resnet18")).train()
    model.layer2.eval()
    hooks, state = everything(model)
    use(model, X)
    after, values = everything(model)
    assert after == hooks
    assert all(torch.equal(values[key], state[key]) for key in state)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_steps_obey_the_cells_equation(cell):
    model = stirred(network("torchvision/resnet50"), cell=cell)
    for stage, steps in record(model, X).items():
        shared = model.get_submodule(stage).regulator.cell
        state = None
        for step in steps:
            fusion = model.get_submodule(step.block).regulator
            # The recording looks into the gates, for which the cell takes its readable form.
            with torch.no_grad(), kernels.use("reference"):
                raw = shared(step.read, state)
                hidden = torch.relu(fusion.hidden_norm(raw[0]))
            assert torch.allclose(step.hidden, hidden, rtol=1e-4, atol=1e-4), step.block
            before = torch.zeros_like(hidden) if state is None else state[0]
            if cell == "rnn":
                expected = step.gates["n"]
            elif cell == "gru":
                expected = torch.lerp(before, step.gates["n"], step.gates["z"])
            else:
                memory = torch.zeros_like(hidden) if state is None else state[1]
                g = step.gates
                expected = g["o"] * torch.tanh(g["f"] * memory + g["i"] * g["g"])
            assert torch.allclose(raw[0], expected, rtol=1e-4, atol=1e-4), step.block
            state = (hidden, *raw[1:])


def test_outputs_are_those_of_the_blocks_and_shares_of_the_halves():
    model = stirred(network("resnet18"))
    with torch.no_grad(), kernels.use("reference"):
        steps = record(model, X)
        assert list(steps) == [f"layer{i}.0" for i in (1, 2, 3, 4)]
        assert torch.equal(model.fc(steps["layer4.0"][1].output.mean((2, 3))), model(X))
    fresh = record(regulate(network("resnet18")), X)
    assert all(step.share == 0 for line in fresh.values() for step in line)
    mix = model.layer1[0].regulator.mix
    with torch.no_grad():
        mix.weight[:, :64] = 0
    assert record(model, X)["layer1.0"][0].share == pytest.approx(1)


def test_statistics():
    step = record(stirred(network("resnet18")), X)["layer1.0"][1]
    found = gate_statistics(step)
    assert found["f"].mean == pytest.approx(step.gates["f"].mean().item())
    assert found["f"].deviation == pytest.approx(step.gates["f"].std().item())
    near = (step.gates["g"].abs() > 0.9).float().mean().item()
    assert found["g"].saturated == pytest.approx(near)
    assert hidden_norm(step) == pytest.approx(step.hidden.flatten(1).norm(dim=1).mean().item())


def test_similarity_with_and_without():
    model = network("resnet18")
    regulated = stirred(model)
    found = similarity(regulated, X)["layer1.0"]

    def cosine(network):
        a, b = (outputs_of(network, name) for name in ("layer1.0", "layer1.1"))
        return torch.cosine_similarity(a.flatten(1), b.flatten(1)).mean().item()

    def outputs_of(network, name):
        seen = []
        handle = network.get_submodule(name).register_forward_hook(lambda m, a, out: seen.append(out.clone()))
        with torch.no_grad():
            network(X)
        handle.remove()
        return seen[0]

    assert found == [pytest.approx((cosine(regulated), cosine(model)))]
    assert found[0][0] != pytest.approx(found[0][1], abs=1e-4)


def test_accuracy_after_each_block():
    model = stirred(network("resnet18"))
    with torch.no_grad():
        labels = model(X).argmax(1)
    found = block_accuracy(model, [(X, labels), (X[:1], labels[:1])])
    assert list(found) == ["layer4.0", "layer4.1"]
    assert found["layer4.1"] == 100
    assert block_accuracy(model, [(X, labels + 1)])["layer4.1"] == 0


def trained(model, steps):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()


def test_a_cell_without_gradient_is_reported_once():
    model = regulate(network("torchvision/resnet18")).train()
    for parameter in model.layer2[0].regulator.cell.parameters():
        parameter.register_hook(torch.zeros_like)
    GradientWatch(model, steps=4)
    with pytest.warns(UserWarning, match=r"layer2\.0\.regulator\.cell in 4 steps") as caught:
        trained(model, 7)
    assert len([w for w in caught if "no gradient" in str(w.message)]) == 1
    assert "layer1" not in str(caught[0].message)
    assert not model._forward_pre_hooks


def test_cells_with_gradient_are_not_reported():
    model = freeze_backbone(regulate(network("torchvision/resnet18"))).train()
    GradientWatch(model, steps=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(model, 7)
    assert not model._forward_pre_hooks


def test_a_switched_off_cell_is_reported():
    model = regulate(network("torchvision/resnet18")).train()
    for p in model.layer3[0].regulator.cell.parameters():
        p.requires_grad_(False)
    GradientWatch(model, steps=2)
    with pytest.warns(UserWarning, match="layer3.0.regulator.cell"):
        trained(model, 4)


def not_blank(path):
    return len(np.unique(imread(path)[..., :3].reshape(-1, 3), axis=0)) > 20


def folder_of_images(root, classes):
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(3):
            noise = np.random.default_rng(10 * number + index).integers(0, 255, (70, 80, 3))
            imsave(root / name / f"{index}.png", noise.astype(np.uint8))
    return root


def test_figures_are_drawn_and_not_blank(tmp_path):
    model = stirred(network("resnet18"))
    labels = torch.tensor([1, 2])
    made = draw(model, X, tmp_path, [(X, labels)])
    names = [*(f"maps-layer{i}.0" for i in (1, 2, 3, 4)), "similarity", "memory", "gates", "accuracy"]
    assert [path.name for path in made] == [f"{name}.{ending}" for name in names for ending in ("png", "svg")]
    assert all(not_blank(path) for path in made if path.suffix == ".png")
    assert all("<svg" in path.read_text() for path in made if path.suffix == ".svg")


def test_scales_of_figures():
    model = stirred(network("torchvision/resnet18"))
    steps = record(model, X)
    shares = figures._memory(steps).axes[1]
    assert shares.get_ylim()[0] == 0 and shares.get_ylim()[1] >= 1
    assert all(float(tick).is_integer() for axis in figures._memory(steps).axes for tick in axis.get_xticks())
    panels = figures._gates(steps).axes
    assert len(panels) == 4 * 4
    assert [round(axis.get_ylim()[0]) for axis in panels[::4]] == [0, 0, -1, 0]
    with disabled(model):
        plain = outputs(model, X[:1])
    maps = figures._maps(steps["layer1.0"], plain, X[0])
    images = [image.get_clim() for axis in maps.axes for image in axis.get_images()]
    assert images[5:7] == images[7:9], "O with and without regulators are on one scale"
    assert len([axis for axis in maps.axes if axis.get_label() == "<colorbar>"]) == 4


def test_the_same_figure_is_the_same_file(tmp_path):
    model = stirred(network("torchvision/resnet18"))
    for name in "ab":
        draw(model, X, tmp_path / name)
    assert (tmp_path / "a" / "gates.png").read_bytes() == (tmp_path / "b" / "gates.png").read_bytes()


@pytest.mark.parametrize("classes", [["a", "b"], [""]])
def test_one_command_draws_them_for_a_folder(classes, tmp_path, capsys):
    model = stirred(load_model("resnet18"))
    save(model, tmp_path / "model.safetensors")
    images = folder_of_images(tmp_path / "images", classes)
    arguments = ["--weights", str(tmp_path / "model.safetensors"), "--images", str(images), "--size", "64"]
    assert main(["inspect", "resnet18", *arguments, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out.split()
    assert len(printed) == (16 if len(classes) > 1 else 14)
    assert all(not_blank(path) for path in printed if path.endswith("png"))


def test_a_folder_without_images_is_one_line(tmp_path, capsys):
    assert main(["inspect", "resnet18", "--images", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "no images" in error
    assert len(error.splitlines()) == 1
