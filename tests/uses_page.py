"""Makes docs/compatibility.md from the results of the tests, or checks that the committed page is current.

REGULATE_USES_RESULTS=runs/uses python -m pytest -n 2 tests
python -m tests.uses_page runs/uses            # writes docs/compatibility.md
python -m tests.uses_page runs/uses --check    # exit code 1 if the page says something else
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

from .uses import TIMM

PAGE = Path(__file__).parent.parent / "docs" / "compatibility.md"
TABLES = Path(__file__).parent / "uses_page_head.md"
GROUPS = ("timm", "torchvision", "torch", "distributed", "regulate on wrapped models", "save, load, switch")
ORDER = (*TIMM, "torchvision/resnet18", "torchvision/resnet50", "torchvision/wide_resnet50_2")


def read(folder: Path) -> dict[str, dict[str, dict[str, set[str]]]]:
    """group -> title -> model -> what its tests said."""
    results: dict[str, dict[str, dict[str, set[str]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(set)))
    for path in sorted(folder.glob("*.json")):
        cell = json.loads(path.read_text())
        results[cell["group"]][cell["title"]][cell["model"]].add(cell["said"])
    return results


def row(title: str, cells: dict[str, set[str]]) -> str:
    """One line: the use, the models that it works on, and for the others why not."""
    names = sorted(cells, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
    works = [name for name in names if cells[name] == {"yes"}]
    known = "timm's six" if set(works) == set(TIMM) else ", ".join(works)
    causes = [f"{name}: {'; '.join(sorted(cells[name] - {'yes'}))}" for name in names if name not in works]
    return f"| {title} | {'yes' if works == [''] else known or 'no'} | {'<br>'.join(causes)} |"


def page(folder: Path) -> str:
    """The whole page."""
    results = read(folder)
    missing = [group for group in GROUPS if group not in results]
    if missing or set(results) - set(GROUPS):
        raise SystemExit(f"{folder} lacks the results of {missing}; run all tests with REGULATE_USES_RESULTS={folder}")
    parts = [TABLES.read_text().rstrip()]
    for group in GROUPS:
        lines = [row(title, results[group][title]) for title in sorted(results[group])]
        parts.append("\n".join([f"## {group}", "", "| use | works on | does not |", "|---|---|---|", *lines]))
    return "\n\n".join(parts) + "\n"


def main(folder: str, *options: str) -> None:
    text = page(Path(folder))
    if "--check" not in options:
        PAGE.write_text(text)
    elif text != PAGE.read_text():
        raise SystemExit(f"{PAGE} is not current; run python -m tests.uses_page {folder}")


if __name__ == "__main__":
    main(*sys.argv[1:])
