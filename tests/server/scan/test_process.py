"""What modules hold is counted in a running process, object by object."""

from __future__ import annotations

import textwrap
import types
from typing import Any

import pytest

from creche_server.scan import ProcessState, count_global_state

NO_STATE = """\
    import dataclasses, enum, functools, logging, re, types, typing, pathlib, msgspec, pydantic
    import collections.abc, datetime, uuid
    from urllib.parse import urlsplit
    urlsplit("https://example.com/")  # keeps it, in a cache of its own
    A = 1; B = "a"; C = (1, ("a",)); D = frozenset({1}); E = None; F = b"a"; G = 1.5
    H = types.MappingProxyType({"a": (1,)})
    I = re.compile("a"); J = logging.getLogger("a"); K = typing.TypeVar("K"); L = dict[str, int]
    M = typing.NewType("M", str); N = pathlib.Path("a"); O = datetime.timezone.utc
    P = msgspec.json.Encoder(); Q = int | None; R = functools.partial(max, 1); S = uuid.UUID(int=1)
    __all__ = ["A"]
    def function(a=(), *, b=None): pass
    @functools.cache
    def unused(): return []
    class Plain:
        __slots__ = ("x",)
        a = 1
        def method(self, a=1): pass
        @classmethod
        def of(cls): pass
        @staticmethod
        def alone(): pass
        @property
        def prop(self): return 1
    class Colour(enum.Enum):
        RED = 1
    class Row(typing.NamedTuple):
        a: int = 1
    @dataclasses.dataclass(frozen=True)
    class Frozen:
        a: int = 1
    class Struct(msgspec.Struct, frozen=True):
        a: int = 1
    class Model(pydantic.BaseModel):
        model_config = {"extra": "forbid"}
        a: list[int] = []
    class Proto(typing.Protocol):
        a: int
    T = Colour.RED; U = Row(); V = Frozen(); W = Struct()
"""
STATE = """\
    import collections, functools, threading, io, dataclasses, random, types, msgspec
    class Kept:
        def __init__(self): self.a = 1
    class Slotted:
        __slots__ = ("a",)
    class Loose(msgspec.Struct):
        a: int = 1
    @dataclasses.dataclass
    class Data:
        a: int = 1
    cases = {
        "dict": {}, "list": [], "set": set(), "bytearray": bytearray(), "defaultdict":
        collections.defaultdict(list), "deque": collections.deque(), "Kept": Kept(),
        "Slotted": Slotted(), "Loose": Loose(), "Data": Data(), "lock": threading.Lock(),
        "_local": threading.local(), "StringIO": io.StringIO(), "Random": random.Random(),
        "tuple": (1, ("a", [])), "mappingproxy": types.MappingProxyType({"a": {}}),
    }
"""


def module(name: str, text: str) -> types.ModuleType:
    made = types.ModuleType(name)
    exec(compile(textwrap.dedent(text), name, "exec", dont_inherit=True), vars(made))
    return made


def counted(text: str) -> ProcessState:
    return count_global_state({"creche.x": module("creche.x", text)})


def test_what_cannot_change_is_no_state() -> None:
    assert counted(NO_STATE).names == ()


CASES = vars(module("creche.x", STATE))["cases"]


@pytest.mark.parametrize("kind", CASES)
def test_what_can_change_is_state(kind: str) -> None:
    made = module("creche.x", "")
    vars(made)["value"] = CASES[kind]
    found = count_global_state({"creche.x": made})
    assert found.names == ("creche.x.value",)
    assert dict(found.by_type) == {kind: 1}


def test_class_attributes_defaults_and_used_caches_are_state() -> None:
    found = counted(
        """\
        import functools
        @functools.cache
        def used(a): return a
        used(1)
        def default(a=[]): pass
        class Outer:
            items = []
            def method(self, *, a={}): pass
            @classmethod
            def of(cls, a=[]): pass
            @staticmethod
            def alone(a=[]): pass
            class Inner:
                deep = {}
        """,
    )
    assert found.names == (
        "creche.x.Outer.Inner.deep",
        "creche.x.Outer.alone",
        "creche.x.Outer.items",
        "creche.x.Outer.method",
        "creche.x.Outer.of",
        "creche.x.default",
        "creche.x.used",
    )
    assert found.count == 7


def test_an_object_of_many_names_counts_once() -> None:
    first = module("creche.a", "kept = {}\nalias = kept\nclass Mine:\n    shared = []\n")
    second = module("creche.b", "")
    vars(second).update(kept=vars(first)["kept"], Mine=vars(first)["Mine"])
    found = count_global_state({"creche.b": second, "creche.a": first})
    assert found.names == ("creche.a.Mine.shared", "creche.a.kept")


def test_only_the_given_packages_count() -> None:
    modules = {
        name: module(name, "kept = {}\n")
        for name in ("creche", "creche.a", "creched", "other.creche")
    }
    assert count_global_state(modules).names == ("creche.a.kept", "creche.kept")
    assert count_global_state(modules, ("other",)).names == ("other.creche.kept",)


def test_each_package_is_told_with_or_without_state() -> None:
    modules = {
        "a": module("a", "kept = {}"),
        "a.b": module("a.b", "kept = []"),
        "c": module("c", "A = 1"),
    }
    found = count_global_state(modules, ("a", "c", "not_loaded"))
    assert dict(found.by_package) == {"a": 2, "c": 0, "not_loaded": 0}


def test_proxies_are_not_asked_whom_they_stand_for() -> None:
    """Such as a framework's `request`, outside a request; and what is no module is passed over."""
    made = module(
        "creche.x",
        """\
        class Proxy:
            __slots__ = ()
            @property
            def __class__(self): raise RuntimeError("outside of a request")
        proxy = Proxy()
        """,
    )
    modules: dict[str, Any] = {"creche.x": made, "creche.y": None, "creche.z": object()}
    assert count_global_state(modules).names == ()
