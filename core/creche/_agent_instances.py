"""Instances of an agent are made anew for each run: whoever could hand one out twice is refused."""

from __future__ import annotations

import inspect
import sys
from types import BuiltinFunctionType, FunctionType, WrapperDescriptorType
from typing import Final, TypeVar

Instance = TypeVar("Instance")

# Who else may say how instances are made, beside Python's own library. All of them make new ones.
_MAKERS: Final = frozenset({"attr", "attrs", "msgspec", "pydantic", "pydantic_core"})


def check_makes_anew(name: str, agent_class: type) -> None:
    """Raise TypeError if somebody's own code decides what calling the class returns.

    That is a `__new__` in the class or its bases, or a `__call__` of its metaclass, unless Python
    or a library that makes classes wrote it: it may return one object again and again, and what
    one run keeps on `self` would be the next one's.
    """
    for owners, method in (
        (inspect.getmro(agent_class), "__new__"),
        (inspect.getmro(type(agent_class)), "__call__"),
    ):
        for owner in owners:
            if method in vars(owner) and not _is_trusted(owner, vars(owner)[method]):
                msg = (
                    f"agent {name!r}: {owner.__name__}.{method} could hand one instance to two "
                    "runs; remove it and make what a run needs in `__init__` (what all runs share "
                    "on purpose is named in `shared`)"
                )
                raise TypeError(msg)


def make_instance(agent_class: type[Instance]) -> Instance:
    """An instance for one run. Raises TypeError if what was made is none of exactly this class."""
    made = agent_class()
    if type(made) is not agent_class:
        msg = (
            f"calling {agent_class.__name__} made a {type(made).__name__}; an agent's class must "
            "make an instance of itself, so that each run has its own"
        )
        raise TypeError(msg)
    return made


def _is_trusted(owner: type, found: object) -> bool:
    """Whether Python or a maker of classes wrote it, by where its code comes from."""
    is_bound = issubclass(type(found), (staticmethod, classmethod))
    function: object = getattr(found, "__func__", None) if is_bound else found
    if isinstance(function, (BuiltinFunctionType, WrapperDescriptorType)):
        return True  # that of `object` or of another type that is written in C
    if not isinstance(function, FunctionType) or hasattr(function, "__wrapped__"):
        return False  # a cache, or another wrapper: it may do anything
    module = str(function.__globals__.get("__name__", "")).partition(".")[0]
    return (
        module in sys.stdlib_module_names
        or module in _MAKERS
        or module == f"namedtuple_{owner.__name__}"  # in which Python writes that one's
    )
