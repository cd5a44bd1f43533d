"""How two networks' states are compared."""

from __future__ import annotations

import torch


def same(a, b):
    return list(a.state_dict()) == list(b.state_dict()) and all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )
