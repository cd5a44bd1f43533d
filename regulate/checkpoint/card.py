"""The card of a saved network: what was regulated, with which options, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..config import RegulatorConfig
from ..rewrite.lookup import blocks, regulators

_PAGE = """---
library_name: timm
pipeline_tag: image-classification
tags:
- timm
- image-classification
- regulate
---

# {name} with {cell} regulators

A {name} of timm whose residual blocks carry ConvRNN regulators, as in "RegNet: Self-Regulated Network for Image
Classification" ([arXiv 2101.00590](https://arxiv.org/abs/2101.00590)), spliced in by
[regulate](https://pypi.org/project/torch-regulate/).

| | |
|---|---|
| regulated | {blocks} blocks in {stages} stages |
| parameters | {parameters:,}, {new:,} of them in regulators |
{options}
{metrics}
## Load

```sh
pip install "torch-regulate[hub]"
```

```python
from regulate import from_pretrained

model = from_pretrained("FOLDER")  # or the repository, "owner/name"
```

With `import regulate.timm`, `timm.create_model("local-dir:FOLDER", pretrained=True)` opens it, too; timm alone does not
know the architecture.
"""


def model_card(model: nn.Module, config: RegulatorConfig, metrics: Mapping[str, float | str] | None) -> str:
    """Return the card of a regulated timm network, in Markdown.

    Args:
        model: the network, without wrappers; only read.
        config: its options.
        metrics: what was measured, by name.
    """
    stages = blocks(model)
    options = [f"| {name} | {value} |" for name, value in config.to_dict().items() if value is not None]
    rows = [f"| {name} | {value} |" for name, value in (metrics or {}).items()]
    return _PAGE.format(
        name=model.pretrained_cfg["architecture"],  # type: ignore[index]  # timm's
        cell=config.to_dict()["cell"],
        blocks=sum(map(len, stages)),
        stages=len(stages),
        parameters=sum(p.numel() for p in model.parameters()),
        new=sum(p.numel() for _, module in regulators(model) for p in module.parameters()),
        options="\n".join(options),
        metrics="\n".join(["\n## Measured\n\n| | |\n|---|---|", *rows, ""]) if rows else "",
    )
