"""Hooks of every kind on every part: seen as often as before, through copies and back, and removed by their handles."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from regulate import is_regulated, regulate, unregulate

from ..helpers import small, small_block, stirred

X = torch.randn(2, 3, 8, 8)
PARTS = ("1", "1.0", "1.1", "1.1.conv1", "1.1.conv2")
seen = []


class Log:
    """A hook that notes where it ran; of a class of this module, so that it can be pickled."""

    def __init__(self, kind, path):
        self.name = f"{kind} {path}"

    def __call__(self, *_, **__):
        seen.append(self.name)


KINDS = {
    "forward": lambda m, hook: m.register_forward_hook(hook),
    "forward with kwargs": lambda m, hook: m.register_forward_hook(hook, with_kwargs=True),
    "forward, always": lambda m, hook: m.register_forward_hook(hook, always_call=True),
    "pre": lambda m, hook: m.register_forward_pre_hook(hook),
    "pre with kwargs": lambda m, hook: m.register_forward_pre_hook(hook, with_kwargs=True),
    "backward": lambda m, hook: m.register_full_backward_hook(hook),
    "backward pre": lambda m, hook: m.register_full_backward_pre_hook(hook),
    "state": lambda m, hook: m._register_state_dict_hook(hook),
    "state pre": lambda m, hook: m.register_state_dict_pre_hook(hook),
    "load pre": lambda m, hook: m._register_load_state_dict_pre_hook(hook),
    "load": lambda m, hook: m.register_load_state_dict_post_hook(hook),
}


def network():
    """Without operations in place, which torch does not allow behind a backward hook."""
    model = small(*(small_block() for _ in range(2)))
    return nn.Sequential(*model, nn.Identity()).eval()


def fired(model):
    seen.clear()
    with torch.autograd.set_multithreading_enabled(False):
        model(X.clone().requires_grad_()).sum().backward()
    model.load_state_dict(model.state_dict())
    return sorted(seen)


@pytest.mark.parametrize("kind", KINDS)
def test_they_stay_through_everything_and_go_by_their_handles(kind, monkeypatch):
    relu = torch.nn.functional.relu
    monkeypatch.setattr("torch.nn.functional.relu", lambda x, inplace=False: relu(x))
    model = network()
    handles = [KINDS[kind](model.get_submodule(path), Log(kind, path)) for path in PARTS]
    expected = fired(model)
    assert len(expected) >= len(PARTS)
    regulated = regulate(model, inplace=True)
    assert fired(regulated) == expected
    assert fired(copy.deepcopy(regulated)) == expected
    assert fired(pickle.loads(pickle.dumps(regulated))) == expected
    assert fired(regulate(unregulate(regulated), "gru", inplace=True)) == expected
    assert fired(unregulate(model)) == expected
    regulate(model, inplace=True)
    for handle in handles:
        handle.remove()
    assert is_regulated(model)
    assert fired(model) == []


def test_a_hook_that_is_always_called_is_called_where_a_block_fails():
    model = stirred(network())
    with torch.no_grad():
        before = model(X)
    seen.clear()
    for path in PARTS:
        model.get_submodule(path).register_forward_hook(Log("always", path), always_call=True)

    def fail(*_):
        raise ValueError

    handle = model[1][1].conv2.register_forward_pre_hook(fail)
    with pytest.raises(ValueError):
        model(X)
    assert set(seen) == {f"always {path}" for path in PARTS}
    handle.remove()
    with torch.no_grad():
        assert torch.equal(model(X), before)
