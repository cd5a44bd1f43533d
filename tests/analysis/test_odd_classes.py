"""Classes with a metaclass, a pickle or a copy of their own: they are kept, or refused for the true reason."""

from __future__ import annotations

import abc
import pickle

import pytest
import torch

from regulate import UnsupportedModelError, is_regulated, regulate
from regulate.rewrite.lookup import regulated_blocks

from .odd_networks import Listed, Plain, assert_same, of


def test_a_class_that_gets_another_forward_later():
    class Patched(Plain):
        pass

    model = of(Patched)
    regulated = regulate(model, fusion="residual")
    Patched.forward = lambda self, x: Plain.forward(self, x) * 2
    assert_same(model, regulated)


KNOWN: dict[str, type] = {}


class Register(type):
    def __new__(cls, name, bases, members):
        KNOWN[name] = made = super().__new__(cls, name, bases, members)
        return made


class Registered(Plain, metaclass=Register):
    pass


class Abstract(Plain, abc.ABC):
    @abc.abstractmethod
    def middle(self, y): ...


class Concrete(Abstract):
    def middle(self, y):
        return y * 2


@pytest.mark.parametrize("kind", [Registered, Concrete])
def test_metaclasses(kind):
    model = of(kind)
    assert_same(model, regulate(model, fusion="residual"))
    assert KNOWN["Registered"] is Registered
    assert isinstance(regulate(model)[1][0], kind)
    assert not isinstance(Plain(), Abstract)


class Reduced(Plain):
    def __reduce__(self):
        return type(self), (), self.__dict__


class WithArguments(Plain):
    def __getnewargs_ex__(self):
        return (), {}


@pytest.mark.parametrize("kind", [Reduced, WithArguments])
def test_pickles_of_ones_own(kind):
    model = of(kind)
    state = torch.get_rng_state()
    regulated = regulate(model, fusion="residual")
    assert torch.equal(torch.get_rng_state(), state)
    restored = pickle.loads(pickle.dumps(regulated))
    assert len(list(regulated_blocks(restored))) == 2
    assert_same(model, restored)


class Itself(Listed):
    def __deepcopy__(self, memo):
        return self


class Anew(Listed):
    def __deepcopy__(self, memo):
        return type(self)()


def closure():
    model = Listed()
    run = model.forward
    model.forward = lambda x: run(x) * 2
    return model


@pytest.mark.parametrize(("make", "message"), [
    (Itself, "left the model .Itself. as it is"),
    (Anew, "anew with other tensors"),
    (closure, "refers to the original"),
])  # fmt: skip
def test_a_model_that_is_not_copied(make, message):
    model = make()
    handle = model.blocks[0].act.register_forward_hook(lambda module, args, out: out * 2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    with pytest.raises(UnsupportedModelError, match=message):
        regulate(model)
    assert handle.id in model.blocks[0].act._forward_hooks
    assert model.training
    assert not is_regulated(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
