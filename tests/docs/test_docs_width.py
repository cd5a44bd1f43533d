"""Prose of the pages wraps at 100 columns, so that it reads beside code and its changes read by line."""

from __future__ import annotations

import re

import pytest

from ..house import ROOT

PAGES = sorted((ROOT / "docs").rglob("*.md"))
# Blocks of code; tables and pictures that a command writes.
NO_PROSE = re.compile(r"^ *```.*?^ *```$|^<!-- [\w-]+: made by .*?^<!-- end of", re.DOTALL | re.MULTILINE)
# What cannot be wrapped: lines of a table, headings, HTML, options of the reference.
WHOLE = ("|", "#", "<", ":::")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_prose_wraps_at_100_columns(page):
    lines = NO_PROSE.sub("", page.read_text()).splitlines()
    long = [line for line in lines if len(line) > 100 and not line.startswith(WHOLE) and " " in line[:100].strip()]
    assert not long
