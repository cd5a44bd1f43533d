"""The documentation as a site: it builds without a warning, needs no network, and its notebook prints what it shows."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

import regulate

pytestmark = pytest.mark.gate

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def pages(site):
    found = sorted(site.rglob("*.html"))
    assert len(found) > 25
    return found


def test_every_page_of_docs_is_there(site):
    built = {page.relative_to(site).with_suffix("").as_posix() for page in pages(site)}
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").with_suffix("").as_posix()
        assert re.sub(r"(^|/)README$", r"\1index", name) in built


def test_no_page_loads_anything_from_elsewhere(site):
    for page in pages(site):
        tags = re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*>", page.read_text())
        assert [tag for tag in tags if re.search(r"""(src|href)=["']?(https?:)?//""", tag)] == [], page


def test_every_public_name_has_its_docstring(site):
    text = "".join(page.read_text() for page in (site / "reference").glob("*.html"))
    names = {name for name in regulate.__all__ if name != "__version__"}
    # Errors and the functions of modules stand under the names of these.
    assert [name for name in names if not re.search(rf'id="regulate\.(errors\.)?{name}"', text)] == []


def test_reference_shows_arguments_and_examples(site):
    text = (site / "reference" / "regulate.html").read_text()
    for words in ("Parameters:", "Returns:", "Raises:", "Examples:", "paper's grouped 1x1"):
        assert words in text


def test_search_knows_guides_and_reference(site):
    entries = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    for words in ("zero-initialised last norm", "saturated", "Splice regulators"):
        assert any(words in entry["text"] for entry in entries), words


def test_the_map_is_drawn(site):
    drawn = re.search(r'<div class="graph">(.*?)</div>', (site / "contributing.html").read_text(), re.DOTALL)[1]
    assert "<svg" in drawn and "analysis" in drawn


def printed(notebook):
    """What each cell of a notebook prints; the figures of a training are another processor's on another one."""
    texts = (
        "".join(out.text for out in cell.get("outputs", ()) if out.output_type == "stream") for cell in notebook.cells
    )
    return [re.sub(r"accuracy: [\d.]+%", "accuracy: some", text) for text in texts]


def test_the_notebook_prints_what_it_shows(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    shown = nbformat.read(NOTEBOOK, as_version=4)
    ran = nbformat.from_dict(shown)
    for cell in ran.cells:
        cell.update({"outputs": [], "execution_count": None} if cell.cell_type == "code" else {})
    nbclient.NotebookClient(ran, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert "same outputs: True" in "".join(printed(ran))
    assert printed(ran) == printed(shown)
    pictures = [out for cell in ran.cells for out in cell.get("outputs", ()) if "image/png" in out.get("data", {})]
    assert len(pictures) == 1


def test_links_lead_to_pages(site):
    for page in pages(site):
        if page.name == "404.html":  # whose links begin at the site's root
            continue
        for target in re.findall(r'href="(?!https?:|mailto:|#|data:)([^"#?]+)', page.read_text()):
            assert (page.parent / target).exists(), f"{page.relative_to(site)}: {target}"
