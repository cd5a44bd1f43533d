"""Every code block of README.md and docs/ runs as it stands; recipes.md and the notebook have tests of their own.

What a page reads from files, its earlier blocks have written. Commands are those that their programs take.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gate

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Libraries that a block needs and that are tried, but not supported.
OPTIONAL = ("diffusers",)

# Runs the blocks of a page one after the other, each in a namespace of its own.
RUN = """
import json, sys
for line, code in json.loads(sys.stdin.read()):
    exec(compile(chr(10) * line + code, sys.argv[1], "exec"), {"__name__": "__main__"})
"""

# Parses each command's arguments by its own program, and goes no further.
PARSE = """
import argparse, contextlib, io, json, runpy, sys
parse = argparse.ArgumentParser.parse_args

def stop(self, args=None, namespace=None):
    parse(self, args, namespace)
    raise SystemExit(0)

argparse.ArgumentParser.parse_args = stop
for where, program, arguments in json.loads(sys.stdin.read()):
    sys.argv = [program, *arguments]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            if program.endswith(".py"):
                sys.path.insert(0, program.rpartition("/")[0])
                runpy.run_path(program, run_name="__main__")
            else:
                if program == "pytest":  # it parses in its own way, and would run the whole of them
                    sys.argv += ["--collect-only", "-n0", "tests/test_names.py"]
                runpy.run_module(program, run_name="__main__", alter_sys=False)
        code = "it took no arguments"
    except SystemExit as end:
        code = end.code
    if code:
        sys.exit(f"{where}: {program} {' '.join(arguments)}: {code} {said.getvalue()[-500:]}")
"""


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """The page's code in one language, each block with the number of the line above it."""
    text = page.read_text()
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text[: block.start(1)].count("\n"), block[1]) for block in found]


WITH_PYTHON = [page for page in PAGES if page.name != "recipes.md" and blocks(page, "python")]


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def test_pages_with_code_are_found():
    assert {"README.md", "docs/timm.md", "docs/guides/fine-tune.md"} <= set(map(named, WITH_PYTHON))


@pytest.mark.parametrize("page", WITH_PYTHON, ids=named)
def test_the_python_of_a_page_runs(page, tmp_path):
    for library in OPTIONAL:
        if any(re.search(rf"^(from|import) {library}\b", code, re.MULTILINE) for _, code in blocks(page, "python")):
            pytest.importorskip(library)
    source = json.dumps(blocks(page, "python"))
    command = [sys.executable, "-c", RUN, named(page)]
    done = subprocess.run(command, input=source, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """The shell lines of a page as words, without what is set before a command."""
    found = []
    for above, code in blocks(page, "sh"):
        for index, line in enumerate(code.replace("\\\n", " ").splitlines()):
            for part in re.split(r"\s&&\s", line):
                words = shlex.split(part, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    del words[0]
                if words:
                    found.append((f"{named(page)}:{above + index + 1}", words))
    return found


SHELL = [command for page in PAGES for command in commands(page)]
# What this repository has no program of its own for.
OTHERS = ("pip", "git", "cd", "ruff", "mypy", "mkdocs")


def program(words: list[str]) -> tuple[str, list[str]] | None:
    """The script or module that parses a command's arguments, and these."""
    name, *rest = words
    if name == "torchrun":
        assert rest[0] == "--nproc-per-node"
        name, rest = "python", rest[2:]
    if name == "regulate":
        name, rest = "python", ["-m", "regulate", *rest]
    if Path(name).name != "python" or rest[0] == "-c":
        return None
    return (rest[1], rest[2:]) if rest[0] == "-m" else (str(ROOT / rest[0]), rest[1:])


def test_the_arguments_in_the_shells_lines_are_taken():
    parsed = [(where, *found) for where, words in SHELL if (found := program(words)) is not None]
    # `regulate timm` takes a script of timm's repository, which is not here: tests/timm/test_timm_training.py has one.
    ours = [entry for entry in parsed if entry[2][:1] != ["timm"] and not entry[1].startswith("tests.")]
    assert len(ours) > 10
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PARSE],
        input=json.dumps(ours),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(("where", "words"), SHELL, ids=[where for where, _ in SHELL])
def test_the_program_of_a_shells_line_is_there(where, words):
    if program(words) is None and Path(words[0]).name not in (*OTHERS, "python"):
        assert words[0] == "sh", f"{where}: {words[0]}"
        assert (ROOT / words[1]).is_file()
