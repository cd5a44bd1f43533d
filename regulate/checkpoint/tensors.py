"""A network's tensors on their way to a file and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..utils.rollback import is_expanded


def fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a regulated network its tensors. An expanded view follows what it is a view of, and is only compared."""
    there = model.state_dict()
    weightless = any(there[key].is_meta for key in tensors)
    views = set() if weightless else {key for key in tensors if is_expanded(there[key])}
    # A tensor that was made in inference mode can be written in no other.
    with torch.inference_mode(any(tensor.is_inference() for tensor in there.values())):
        model.load_state_dict({k: v for k, v in tensors.items() if k not in views}, strict=False, assign=weightless)
    for key in views:
        if not torch.equal(there[key].cpu(), tensors[key]):
            raise CheckpointError(
                f"{key} is an expanded view here, which cannot be written, and holds other values in the file; make "
                "it a tensor of its own (.contiguous())"
            )
    for key in () if weightless else _sharing(there, tensors):
        here = there[key].cpu()
        # One NaN is as good as another, and the file may be of another type.
        if not torch.allclose(here, tensors[key].to(here.dtype), rtol=0, atol=0, equal_nan=True):
            raise CheckpointError(
                f"{key} shares memory with another tensor here, and holds other values in the file; the saved network "
                "did not share them: build this one without tied weights"
            )


def _sharing(there: Mapping[str, Tensor], keys: Iterable[str]) -> list[str]:
    """Return the keys of tensors that lie in one memory with another one."""
    held = {key: there[key].untyped_storage().data_ptr() for key in keys if there[key].numel()}
    count = Counter(held.values())
    return [key for key, address in held.items() if count[address] > 1]


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict as safetensors takes it: on the CPU, contiguous, no two tensors in one memory."""
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, value in model.state_dict().items():
        kind = _kind(value) if type(value) in (Tensor, nn.Parameter) else f"a {type(value).__name__}"
        if kind:
            raise CheckpointError(
                f"a checkpoint holds plain tensors, and {key} is {kind}; gather a sharded model first "
                "(torch.distributed.checkpoint.state_dict.get_model_state_dict), save a quantized one before quantizing"
            )
        # A conjugate is a view until it is resolved; its memory holds other numbers.
        tensor = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
        address = tensor.untyped_storage().data_ptr()
        state[key] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return state


def _kind(value: Tensor) -> str:
    """Return what keeps a tensor out of a file; empty if nothing does."""
    if value.is_meta:
        return "on the meta device"
    if value.layout is not torch.strided:
        return f"stored as {str(value.layout).removeprefix('torch.')}"
    if value.dtype in (torch.complex128, torch.complex32):
        return f"{str(value.dtype).removeprefix('torch.')}, which safetensors does not know"
    return "a quantized tensor" if value.is_quantized else ""
