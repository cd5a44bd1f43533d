"""The structure of the package as a graph: rooms, floors, arrows, and the picture of them in docs/contributing.md.

    python -m tests.house            # prints rooms by floor
    python -m tests.house --write    # writes the picture

A *room* is a package or a top-level file of `regulate/`; an *arrow* an import from one room to another.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "contributing.md"
BEGIN, END = "<!-- map: made by python -m tests.house --write -->", "<!-- end of map -->"


@dataclass(frozen=True)
class House:
    """Which room imports which.

    Args:
        arrows: for each room the rooms that it imports.
    """

    arrows: dict[str, frozenset[str]]

    def floor(self, room: str) -> int:
        """Return 1 for a room that imports none, otherwise one more than the highest that it imports."""
        return 1 + max((self.floor(below) for below in self.arrows[room]), default=0)

    def floors(self) -> list[list[str]]:
        """Return the rooms by floor, the lowest first."""
        heights = {room: self.floor(room) for room in self.arrows}
        return [sorted(r for r in heights if heights[r] == n) for n in range(1, max(heights.values()) + 1)]


def _imports(path: Path, modules: frozenset[str]) -> Iterator[str]:
    """Yield the modules of the package that a file imports, also inside of functions."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    package = list(parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            for name in node.names:
                longer = ".".join([*base, name.name])
                yield longer if longer in modules else ".".join(base)


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room(module: str) -> str:
    """Return the room of a module by its dotted name."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


@cache
def house() -> House:
    """Read the package's imports."""
    files = sorted((ROOT / "regulate").rglob("*.py"))
    modules = frozenset(map(_module, files))
    arrows: dict[str, set[str]] = {room(module): set() for module in modules}
    for path in files:
        here = room(_module(path))
        arrows[here] |= {room(found) for found in _imports(path, modules)} - {here}
    return House({name: frozenset(below) for name, below in arrows.items()})


def picture() -> str:
    """Return the mermaid graph of the rooms, without arrows that a longer way implies."""
    found = house()

    @cache
    def reached(name: str) -> frozenset[str]:
        below = found.arrows[name]
        return below.union(*(reached(one) for one in below))

    lines = ["```mermaid", "graph BT"]
    for floor in found.floors():
        for name in floor:
            below = found.arrows[name]
            direct = [one for one in sorted(below) if not any(one in reached(other) for other in below)]
            lines += [f"    {_label(one)} --> {_label(name)}" for one in direct]
    return "\n".join([*lines, "```"])


def _label(name: str) -> str:
    return "regulate" if name == "__init__" else "command_line" if name == "__main__" else name


def with_picture(text: str) -> str:
    """Return the page with a current picture."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{picture()}\n\n{END}{after}"


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(with_picture(PAGE.read_text()))
    for number, names in enumerate(house().floors(), 1):
        print(number, *names)
    print(len(house().arrows), "rooms,", sum(map(len, house().arrows.values())), "arrows")
