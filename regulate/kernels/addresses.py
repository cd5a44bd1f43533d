"""Whether a tensor is nothing but numbers at an address, as a kernel that is handed addresses needs it."""

from __future__ import annotations

from torch import Tensor, nn

PLAIN = (Tensor, nn.Parameter)


def has_address(*maps: Tensor | None) -> bool:
    """Check that these are of no subclass, and have memory that says what they are; None will do. Not for compiling.

    Zeros that nobody has written, and the batched and functional tensors of torch's transforms, have none; others
    are negated when they are read. Gradients may be any of these, whatever the forward pass was given.
    """
    try:
        return all(t is None or (type(t) in PLAIN and not t.is_neg() and (t.data_ptr() or not t.numel())) for t in maps)
    except RuntimeError:
        return False
