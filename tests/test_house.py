"""The structure that docs/contributing.md shows: direction of imports, sizes, and the picture."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import regulate
import regulate.models
from regulate import _moved

from .house import BEGIN, END, PAGE, ROOT, house, with_picture

# Each room may import the rooms of the rows above its own, and none of its own row or below.
ORDER = (
    ("errors", "config", "schema", "utils", "_compat", "_moved", "models"),
    ("kernels",),
    ("nn",),
    ("analysis", "rewrite"),
    ("api", "checkpoint", "inspect", "training"),
    ("__init__", "testing"),
    ("timm", "tools"),
    ("__main__",),
)
# What holds a line for each architecture, and no function.
TABLES = {"tests/zoo/architectures.py"}
FILES = [path for path in (ROOT / "regulate").rglob("*") if path.suffix in (".py", ".cpp", ".h")]


def test_imports_go_one_way():
    row = {name: number for number, names in enumerate(ORDER) for name in names}
    assert set(row) >= set(house().arrows), "a new room needs its place in ORDER"
    wrong = {(name, below) for name, found in house().arrows.items() for below in found if row[below] >= row[name]}
    assert not wrong


def test_the_map_can_be_kept_in_mind():
    found = house()
    assert len(found.arrows) <= 20
    assert len(found.floors()) <= 8
    assert sum(map(len, found.arrows.values())) <= 70


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    assert len(path.read_text().splitlines()) <= (250 if path.suffix == ".py" else 300)
    if path.suffix == ".py":
        functions = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
        long = [f.name for f in functions if _lines(f) > 40]
        assert not long


# What one reads to change behaviour; the rest are kernels, checkpoints, tools and what stands beside the rewrite.
CORE = ("analysis", "nn", "rewrite", "schema", "api.py", "config.py", "errors.py")


def test_there_is_not_more_code_than_can_be_read():
    """Lines of code: without blank lines, comments, docstrings and imports. There are some 2,900 and 6,900."""
    lines = {path: _code(path) for path in FILES}
    core = [path for path in lines if path.relative_to(ROOT / "regulate").parts[0] in CORE]
    assert sum(map(lines.get, core)) <= 3_000
    assert sum(lines.values()) <= 6_950


def _code(path: Path) -> int:
    text = path.read_text()
    if path.suffix != ".py":
        return sum(bool(line.strip()) and not line.strip().startswith("//") for line in text.splitlines())
    tree = ast.parse(text)
    others = {n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)}
    others |= {n.body[0] for n in ast.walk(tree) if isinstance(n, _DOCUMENTED) and ast.get_docstring(n) is not None}
    left_out = {line for node in others for line in range(node.lineno, node.end_lineno + 1)}
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") and number not in left_out
        for number, line in enumerate(text.splitlines(), 1)
    )


_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)


def _lines(function: ast.FunctionDef) -> int:
    """The lines of a function's body; a docstring is as long as it must be."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def test_files_of_tests_are_short():
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in (ROOT / "tests").rglob("*.py")}
    assert len(lines) > 50
    assert {name for name, count in lines.items() if count > 300} <= TABLES


def test_the_picture_is_current():
    text = PAGE.read_text()
    assert BEGIN in text and END in text
    assert with_picture(text) == text, "run python -m tests.house --write"


@pytest.mark.parametrize("script", ["run", "versions"])
def test_the_tests_that_ci_names_are_there(script):
    named = re.findall(r"tests/\S+\.(?:py|sh)", (ROOT / ".ci" / script).read_text())
    assert named and [path for path in named if not (ROOT / path).is_file()] == []


def test_the_map_names_what_is_there():
    rows = re.findall(r"`([\w/]+\.py)`: ((?:`[\w.]+`(?:, )?)+)", PAGE.read_text())
    assert len(rows) > 15
    for path, names in rows:
        text = (ROOT / ("" if path.startswith("tests/") else "regulate") / path).read_text()
        for name in re.findall(r"`([\w.]+)`", names):
            own = re.escape(name.rpartition(".")[2])
            assert re.search(rf"(def|class) {own}\b|^{own}\b", text, re.M), f"{path} has no {name}"


def test_no_module_is_shadowed_by_a_function():
    for info in pkgutil.walk_packages(regulate.__path__, "regulate."):
        if info.name.endswith(("__main__", "triton_kernels")):
            continue
        importlib.import_module(info.name)
        owner, _, name = info.name.rpartition(".")
        assert getattr(sys.modules[owner], name) is sys.modules[info.name]


@pytest.mark.parametrize("old", sorted(_moved.MOVED))
def test_old_names_import_with_a_warning(old):
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=_moved.MOVED[old]):
        moved = importlib.import_module(old)
    new = importlib.import_module(_moved.MOVED[old])
    public = [name for name in vars(new) if not name.startswith("_")]
    assert public and all(getattr(moved, name) is getattr(new, name) for name in public)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.import_module(_moved.MOVED[old])
    sys.modules.pop(old)
    owner, _, name = old.rpartition(".")
    vars(sys.modules[owner]).pop(name, None)
    if owner == "regulate":  # as an attribute, without an import of its own
        with pytest.warns(DeprecationWarning, match=_moved.MOVED[old]):
            assert getattr(regulate, name).__name__ == old


def test_a_function_that_is_gone_says_so_and_computes_the_same():
    model, image = regulate.regulate(regulate.models.cifar_resnet(14)), torch.randn(1, 3, 16, 16)
    with pytest.warns(DeprecationWarning, match=r"brought no speed .* call model\.eval\(\)"):
        copied = regulate.optimize_for_inference(model)
    assert model.training and not copied.training
    assert torch.equal(copied(image), model.eval()(image))
    assert not any(parameter.requires_grad for parameter in copied.parameters())


def test_a_name_that_never_was_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        regulate.nothing_of_that_name  # noqa: B018


def test_nothing_but_the_command_line_imports_the_tools():
    code = "import sys, regulate; print([m for m in sys.modules if m.startswith('regulate.tools')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
