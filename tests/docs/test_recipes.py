"""docs/recipes.md: each recipe trains and saves in one process and comes back, the same function, in another."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gate

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"
LIBRARIES = ("accelerate", "lightning", "transformers", "peft", "segmentation_models_pytorch")

# What a network computes, whatever it returns: behind either block of a recipe.
COMPUTES = """
import torch
from collections.abc import Mapping
from regulate import is_regulated

assert is_regulated(model)

def leaves(out):
    if isinstance(out, torch.Tensor):
        return [out]
    parts = out.values() if isinstance(out, Mapping) else out if isinstance(out, (list, tuple)) else ()
    return [leaf for part in parts for leaf in leaves(part)]

x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    torch.save(leaves(model.eval()(list(x) if "RCNN" in type(model).__name__ else x)), OUT)
"""


@dataclass(frozen=True)
class Recipe:
    """A section of the page: the files that it writes down, and its two blocks."""

    title: str
    files: tuple[tuple[str, str], ...]
    there: str
    back: str

    def library(self) -> str | None:
        """Return what must be installed beside torch and torchvision."""
        return next((name for name in LIBRARIES if re.search(rf"^(from|import) {name}\b", self.there, re.M)), None)


def recipe(section: str) -> Recipe:
    title, blocks = section.splitlines()[0], re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    *files, there, back = blocks
    return Recipe(title, tuple((re.match(r"# (\w+\.py)\n", text)[1], text) for text in files), there, back)


RECIPES = [recipe(section) for section in PAGE.read_text().split("\n## ")[1:]]


def run(code: str, folder: Path, name: str) -> list[torch.Tensor]:
    code = f"{code}\nOUT = {name!r}\n{COMPUTES}"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / name)


@pytest.mark.parametrize("one", RECIPES, ids=lambda one: one.title)
def test_it_trains_saves_and_comes_back_the_same(one, tmp_path):
    if one.library():
        pytest.importorskip(one.library())
    for name, text in one.files:
        (tmp_path / name).write_text(text)
    trained, back = run(one.there, tmp_path, "trained.pt"), run(one.back, tmp_path, "back.pt")
    assert trained and len(trained) == len(back)
    assert all(torch.equal(a, b) for a, b in zip(trained, back, strict=True))


@pytest.mark.parametrize("one", RECIPES, ids=lambda one: one.title)
def test_a_recipe_is_short(one):
    lines = [line for line in one.there.splitlines() if line and not line.startswith(("import ", "from "))]
    assert len(lines) <= 15
