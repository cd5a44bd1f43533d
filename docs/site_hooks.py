"""What mkdocs does beside rendering: README.md is the front page, links out of docs/ lead somewhere, maps are drawn."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import merm
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent


def on_files(files: Files, *, config: Any) -> Files:
    """Add README.md as the front page; its links begin in docs/ there."""
    text = (ROOT / "README.md").read_text().replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Draw mermaid graphs here, since a page must show them without a network."""
    return re.sub(r"```mermaid\n(.*?)```", lambda found: _svg(found[1]), markdown, flags=re.DOTALL)


def on_page_content(html: str, *, page: Any, **_: Any) -> str:
    """Turn a notebook's links to pages, which its plugin leaves as they are, into links to where they are built."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html
    html = re.sub(r'href="(?!http)([^"]*?)README\.md', r'href="\1index.html', html)
    return re.sub(r'href="(?!http)([^"]*?)\.md', r'href="\1.html', html)


def _svg(graph: str) -> str:
    # Markdown leaves a block of HTML alone up to its first empty line.
    drawn = "\n".join(line for line in merm.render_diagram(graph).splitlines() if line.strip())
    return f'<div class="graph">\n{drawn}\n</div>'
