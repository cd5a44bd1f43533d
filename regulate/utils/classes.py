"""Making subclasses of the user's own classes, for objects that change their class and nothing else.

As `torch.nn.utils.parametrize` does. A subclass has the name of its original, wraps its `forward` where its role
says so, and pickles as the original class.
"""

from __future__ import annotations

import abc
import copy
import copyreg
import functools
from collections.abc import Callable
from typing import Any, cast

from torch import fx, nn

Forward = Callable[..., Any]

# Of a parametrized class that roles were put below: what it was before.
_PARAMETRIZED = "_regulate_parametrized"

# By role and original; the classes live as long as the process, as any class does.
_made: dict[tuple[type, type], type] = {}


class Part(nn.Module):
    """Base of the roles that a module can be given. A role is mixed into the module's own class.

    Attributes:
        _regulate_run: wraps the module's forward, `run(module, forward, args, kwargs)`; None leaves it alone.
    """

    _regulate_run: Callable[..., Any] | None = None

    @classmethod
    def _regulate_members(cls, own: type) -> dict[str, Any]:
        """Return what the subclass of a class gets besides."""
        return {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keep the user's own `__init_subclass__` out, which may count or refuse subclasses."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle the original class and the roles; classes made here have no importable name."""
        make, args, *rest = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        roles, own = _lineage(type(self))
        make, *args = (own if part is type(self) else part for part in (make, *args))
        return (_rebuilt, (roles, make, *args), *rest)


def become(module: nn.Module, role: type[Part]) -> None:
    """Give a module a role: its class becomes the subclass for it. In place."""
    own = type(module)
    made = _over(own, subclass(role, core(own))) if _is_parametrized(own) else subclass(role, own)
    # Not by the user's own __setattr__.
    object.__setattr__(module, "__class__", made)


def leave(module: nn.Module, role: type[Part]) -> None:
    """Take a role from a module, if it has it and no other tool has changed its class since. In place."""
    found = type(module)
    inner = core(found) if _PARAMETRIZED in vars(found) else found
    roles, own = _lineage(inner)
    if role in roles:
        left = _with_roles(own, [one for one in roles if one is not role])
        object.__setattr__(module, "__class__", left if inner is found else _over(found, left))


def is_plain(module: nn.Module) -> bool:
    """Check whether no other tool has changed a module's class on top of its roles."""
    return not isinstance(module, Part) or bool({"_regulate_role", _PARAMETRIZED} & vars(type(module)).keys())


def core(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the class that `torch.nn.utils.parametrize` made a module's class from, or the class itself."""
    return cls.__bases__[0] if _is_parametrized(cls) else cls


def _is_parametrized(cls: type) -> bool:
    base = cls.__bases__[0]
    return len(cls.__bases__) == 1 and cls.__name__ == f"Parametrized{base.__name__}" and "__getstate__" in vars(cls)


def _over(parametrized: type[nn.Module], inner: type[nn.Module]) -> type[nn.Module]:
    """Return a module's parametrized class over another one.

    Roles go below it: when the last parametrization is removed, torch deletes its property from the module's class and
    gives the module that class's first base.
    """
    first: type[nn.Module] = vars(parametrized).get(_PARAMETRIZED, parametrized)
    members = {k: v for k, v in vars(parametrized).items() if k not in ("__dict__", "__weakref__", _PARAMETRIZED)}
    if inner is core(first) and members.keys() == vars(first).keys() - {"__dict__", "__weakref__"}:
        return first
    marked = {_PARAMETRIZED: first} if issubclass(inner, Part) else {}
    return type(parametrized.__name__, (inner,), {**members, **marked})


def original(cls: type[nn.Module]) -> type[nn.Module]:
    """Return a class without roles."""
    return _lineage(cls)[1]


def subclass(role: type[Part], own: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of a class for a role, one for each pair."""
    if (role, own) not in _made:
        members: dict[str, Any] = {name: getattr(own, name) for name in ("__module__", "__qualname__", "__doc__")}
        members |= {"_regulate_role": role, "_regulate_own": own}
        if role._regulate_run is not None:
            members["forward"] = _wrapping(own, role._regulate_run)
        members.update(role._regulate_members(own))
        if issubclass(own, fx.GraphModule):
            members.update(_of_graphs(original(own)))
        # Of own's metaclass, but without the code of a metaclass of the user's, which may keep a register.
        kind = abc.ABCMeta if isinstance(own, abc.ABCMeta) else type
        _made[role, own] = kind.__new__(type(own), own.__name__, (role, own), members)
    return _made[role, own]


def _wrapping(own: type[nn.Module], run: Callable[..., Any]) -> Forward:
    @functools.wraps(own.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Looked up in each call: a class may get another forward later.
        return run(self, own.forward, args, kwargs)

    return forward


def _of_graphs(own: type[nn.Module]) -> dict[str, Any]:
    """Return what a role keeps of a GraphModule, which makes a class for each object and writes its code into that."""

    def bare(self: nn.Module) -> Any:
        """Return the object without roles: another one with the same attributes."""
        twin = object.__new__(own)
        twin.__dict__ = self.__dict__
        return twin

    def recompile(self: nn.Module) -> Any:
        return bare(self).recompile()

    def __deepcopy__(self: nn.Module, memo: dict[int, Any]) -> Any:
        made = copy.deepcopy(bare(self), memo)
        memo[id(self)] = made
        # A copy of a GraphModule keeps submodules, graph, hooks and meta, and nothing else.
        kept = {name: value for name, value in vars(self).items() if name.startswith("_regulate_")}
        vars(made).update(copy.deepcopy(kept, memo))
        object.__setattr__(made, "__class__", _with_roles(type(made), _lineage(type(self))[0]))
        return made

    return {"recompile": recompile, "__deepcopy__": __deepcopy__}


def _lineage(cls: type) -> tuple[list[type[Part]], type]:
    """Return the roles of a class, the first one first, and the class without them."""
    roles: list[type[Part]] = []
    if _PARAMETRIZED in vars(cls):
        return _lineage(cls.__bases__[0])[0], vars(cls)[_PARAMETRIZED]
    while "_regulate_role" in vars(cls):
        roles.insert(0, vars(cls)["_regulate_role"])
        cls = vars(cls)["_regulate_own"]
    return roles, cls


def _with_roles(own: type[nn.Module], roles: list[type[Part]]) -> type[nn.Module]:
    for role in roles:
        own = subclass(role, own)
    return own


def _rebuilt(roles: list[type[Part]], make: Callable[..., nn.Module], *args: Any) -> nn.Module:
    """Return what a pickle calls: the object as its own class makes it, then in its roles."""
    made: nn.Module = args[0].__new__(*args) if make is copyreg.__newobj__ else make(*args)  # type: ignore[attr-defined]
    object.__setattr__(made, "__class__", _with_roles(type(made), roles))
    return made
