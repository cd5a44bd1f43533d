"""Every private symbol of torch and timm that the package uses, with what happens where it is missing.

Only the dictionaries of an `nn.Module` (`_modules`, `_parameters`, `_buffers`), which are in every pickled module, a
state dict's `_metadata` and a tensor's `_version` are used elsewhere, too.
tests/compatibility/test_compat.py takes each of the others away.
"""
