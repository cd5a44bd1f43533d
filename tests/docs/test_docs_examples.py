"""README and examples: what they print is what happens."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread, imsave

import regulate
from regulate import plan
from regulate.models.by_name import load_model

from ..zoo.architectures import COUNTS

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import upgrade_backbone

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_the_readme_shows_what_its_first_block_prints():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 120
    code, shown = (re.search(rf"```{kind}\n(.*?)```", readme, re.DOTALL).group(1) for kind in ("python", "text"))
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.stdout == shown, done.stderr


def test_the_readme_counts_the_zoo():
    assert f"{len(COUNTS)} architectures are checked one by one" in " ".join((ROOT / "README.md").read_text().split())


def test_lower_bounds_are_the_same_everywhere():
    found = re.findall(r"^ *(torch|torchvision|timm)>=([\d.]+)$", (ROOT / "setup.cfg").read_text(), re.MULTILINE)
    bounds = dict(found)
    assert len(set(found)) == len(bounds) == 3
    supported = ", ".join(f"{name} {bounds[name]}" for name in ("torch", "torchvision", "timm"))
    assert f"{supported} or newer" in (ROOT / "README.md").read_text()
    row = re.search(r"\| oldest \| \S+ \| (\S+) \| (\S+) \| (\S+) \|", (ROOT / "docs" / "compatibility.md").read_text())
    for name, tried in zip(("torch", "timm", "torchvision"), row.groups(), strict=True):
        assert tried.removesuffix(".0") == bounds[name]


def test_every_public_name_is_in_the_api_page():
    page = (ROOT / "docs" / "reference" / "README.md").read_text()
    names = [name for name in regulate.__all__ if name != "__version__"]
    assert [name for name in names if not re.search(rf"`{name}[`(]", page)] == []


def test_links_between_documents_lead_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_tests_named_in_the_paper_page_exist():
    named = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", (ROOT / "docs" / "paper.md").read_text())
    assert named
    for name in named:
        (path,) = (ROOT / "tests").rglob(name[0])
        text = path.read_text()
        assert not name[1] or f"def {name[1]}(" in text


def example(*arguments, **options):
    command = [sys.executable, str(ROOT / "examples" / "upgrade_backbone.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, **options)


def not_blank(path):
    return len(np.unique(imread(path)[..., :3].reshape(-1, 3), axis=0)) > 10


@pytest.mark.parametrize("arguments", [("--model", "resnet18"), ("--model", "resnet18", "--data", "/nosuch")])
def test_the_example_says_what_is_missing(arguments):
    done = example(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_the_example_upgrades_a_timm_backbone_on_an_image_folder(tmp_path):
    colours = {"dark": 40, "light": 200}
    for split in ("train", "val"):
        for name, level in colours.items():
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for index in range(4):
                noise = np.random.default_rng(index).integers(0, 40, (40, 40, 3))
                imsave(folder / f"{index}.png", (noise + level).astype(np.uint8))
    done = example(
        *("--model", "resnet18", "--data", str(tmp_path / "data"), "--batch", "3", "--epochs", "1"),
        *("--finetune-epochs", "1", "--out", str(tmp_path / "out"), "--size", "64", "--subset", "6", "--seeds", "2"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("predictions that the upgrade changed: 0 of 8") == 2
    assert "seed 1, regulated: epoch   1 of 1" in done.stdout, "progress is lines, as a log file shows them"
    assert re.search(
        r"Regulated minus plain: \S+ points.* 2 seeds.* Of 8 test images, .* number for each seed", done.stdout
    )
    assert re.search(r"regulated\s+[\d,]+\s+[\d.]+%", done.stdout)
    assert not_blank(tmp_path / "out" / "curves.png")


def trials(*pairs, images=100):
    """Trials with so many test images right, regulated and plain."""
    return [
        upgrade_backbone.Trial(
            seed,
            [50.0],
            {"regulated": [100 * a / images], "plain": [100 * b / images]},
            {"regulated": 2.0, "plain": 1.0},
            {"regulated": 20, "plain": 10},
            {"regulated": torch.arange(images) < a, "plain": torch.arange(images) >= images - b},
        )
        for seed, (a, b) in enumerate(pairs)
    ]


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ([(90, 80), (91, 80), (92, 82)], "+10.33 points, 95 % interval +8.90 to +11.77 over 3 seeds: more than chance"),
        ([(80, 90), (80, 91), (82, 92)], "-10.33 points, 95 % interval -11.77 to -8.90 over 3 seeds: more than chance"),
        ([(90, 80), (80, 91), (85, 84)], ": no more than chance"),
        ([(90, 80)], "+10.00 points; one seed cannot be told from chance"),
        ([(90, 80), (90, 80)], "+10.00 points with each of 2 seeds"),
    ],
)
def test_the_example_says_whether_a_difference_is_chance(pairs, words, tmp_path):
    made = trials(*pairs)
    assert words in upgrade_backbone.verdict(made)
    upgrade_backbone.draw(tmp_path / "curves.png", made)
    assert not_blank(tmp_path / "curves.png")


def test_the_example_counts_the_images_that_differ():
    assert "Of 100 test images, regulated alone has 20, 10 right, plain alone 10, 9 " in upgrade_backbone.verdict(
        trials((90, 80), (91, 90))
    )


FAMILIES = (ROOT / "docs" / "families.md").read_text()
PLANS = re.findall(r"`python -m regulate plan (\S+)` prints\n\n```text\n(.*?)```", FAMILIES, re.DOTALL)


@pytest.mark.parametrize(("name", "shown"), PLANS, ids=[name for name, _ in PLANS])
def test_the_plans_of_the_families_page_are_current(name, shown):
    assert shown.strip() == str(plan(load_model(name))).strip()


def test_the_families_page_shows_the_five_of_the_paper():
    assert len(PLANS) == 5
