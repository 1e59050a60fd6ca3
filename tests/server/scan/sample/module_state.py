"""Mutable objects at module and class level: CR001, CR002, CR006 of a NamedTuple, CR008."""

import asyncio
import collections as c
import contextlib
import dataclasses
import enum
import functools
import itertools
import logging
import re
import sqlite3
import threading
import typing
import weakref
from collections import defaultdict
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Final, NamedTuple, NewType, TypedDict, TypeVar

import acme
import httpx2
import msgspec
import openai as ai
import pydantic
import sqlalchemy as sa
import trio

from . import writes
from .writes import makes as makes_elsewhere

if TYPE_CHECKING:
    SHAPES = {}

# --- CR001

CACHE = {}  # -> CR001
SEEN: set[str] = set()  # -> CR001
ANNOTATED_FINAL: Final = {"a": 1}  # -> CR001
LISTED = [1, 2]  # -> CR001
SQUARES = [n * n for n in range(3)]  # -> CR001
BY_NAME = {n: n for n in "ab"}  # -> CR001
UNIQUE = {n for n in "ab"}  # -> CR001
LAZY = (n for n in "ab")  # -> CR001
MADE = dict(a=1)  # -> CR001
GROUPED = defaultdict(list)  # -> CR001
QUEUED = c.deque(maxlen=3)  # -> CR001
COUNTED = c.Counter()  # -> CR001
BYTES = bytearray(3)  # -> CR001
NUMBERS = itertools.count()  # -> CR001
WORDS = "a b".split()  # -> CR001
REPEATED = [0] * 3  # -> CR001
KEYED = dict.fromkeys("ab")  # -> CR001
TRANSLATED = str.maketrans("a", "b")  # -> CR001
COPIED = {"a": 1}.copy()  # -> CR001
SMALLEST, LARGEST = sorted((1, 2))
HELD = (1, [2])  # -> CR001
PROXIED = MappingProxyType({"a": []})  # -> CR001
CHOSEN = {} if CACHE else None  # -> CR001
DEFAULTED = None or []  # -> CR001
FIRST, (SECOND, THIRD) = 1, ({}, ())  # -> CR001
HEAD, *REST = (1, 2, 3)  # -> CR001
ALIAS = OTHER_ALIAS = []  # -> CR001
LOADED: dict[str, str] = acme.load()  # -> CR001
PRINT = print(FOUND := [])  # -> CR001
LONG = {  # -> CR001
    "a": 1,
}

if CACHE:
    IN_IF = []  # -> CR001
else:
    IN_ELSE = {}  # -> CR001
try:
    IN_TRY = {}  # -> CR001
except ValueError:
    IN_EXCEPT = []  # -> CR001
finally:
    IN_FINALLY = set()  # -> CR001
with contextlib.suppress(ValueError):
    IN_WITH = []  # -> CR001
for _n in range(3):
    IN_FOR = []  # -> CR001
match 1:
    case _:
        IN_MATCH = []  # -> CR001


def listed() -> list[str]:
    return []


@acme.frozen
def frozen() -> list[str]:
    return []


FROM_FUNCTION = listed()  # -> CR001
FROM_DECORATED = frozen()


def bare():
    return {}


def built(names):
    made = {}
    made["a"] = names
    return made


def through():
    return built(1)


def generates():
    yield 1


def tupled():
    made = []
    made = tuple(made)
    return made


def copied(given):
    return given


def sums():
    numbers = [1, 2]
    return sum(numbers)


def again():
    return again()


def shared():
    return CACHE


def closing():
    kept = {}

    def add(name):
        kept[name] = 1

    return add


def counting():
    count = 0

    def add():
        nonlocal count
        count += 1
        return count

    return lambda: add()


def limited(given):
    lock = trio.Lock()

    async def wait():
        async with lock:
            return given

    return wait


def adding(given):
    def add(number):
        total = []
        total.append(number)
        return given + sum(total)

    return add


def filling(registry):
    def add(name):
        registry[name] = 1

    return add


class Factory:
    @staticmethod
    def make():
        return []


FROM_BARE = bare()  # -> CR001
FROM_BUILT = built(1)  # -> CR001
FROM_THROUGH = through()  # -> CR001
FROM_OTHER_MODULE = writes.makes()  # -> CR001
FROM_ITS_NAME = makes_elsewhere()  # -> CR001
FROM_STATIC = Factory.make()  # -> CR001
FROM_LAMBDA = (lambda: {})()  # -> CR001
FROM_GENERATOR = generates()  # -> CR001
FROM_SHARED = shared()  # -> CR001
FROM_CLOSING = closing()  # -> CR008
FROM_COUNTING = counting()  # -> CR008
FROM_LIMITED = limited(1)  # -> CR008
NEXT_NUMBER = itertools.count().__next__  # -> CR001
BOUND = functools.partial(print, [])  # -> CR001
SECOND_NAME = CACHE  # -> CR001
THIRD_NAME = SECOND_NAME  # -> CR001
OF_OTHER_MODULE = writes.TOTALS  # -> CR001
OF_A_CLASS = Factory.kinds
make_list = list
FROM_ALIAS = make_list()  # -> CR001
GLUED = (CACHE, 1)  # -> CR001
FROM_TUPLED = tupled()
FROM_COPIED = copied(1)
FROM_SUMS = sums()
FROM_AGAIN = again()
FROM_ADDING = adding(1)
FROM_FILLING = filling(CACHE)
FUNCTION = bare
LATER = lambda: {}
HOME = HERE_AGAIN = "a"
SECOND_HOME = HOME
SPREAD = MappingProxyType({**{"a": 1}, "b": 2})
NAMED = "{}".format


def counts():
    counts.calls += 1  # -> CR004


counts.calls = 0
counts.seen = []  # -> CR001

__all__ = ["CACHE"]
REMOVED = []
del REMOVED
TUPLE: Final = (1, "a")
FROZEN = frozenset({"a"}) | {"b"}
TABLE = MappingProxyType({"a": 1})
NAMES = tuple(n for n in "ab")
NAME = NewType("NAME", str)
T = TypeVar("T")
WORD = re.compile("a")
HERE = Path(__file__).parent
Alias = dict[str, list[int]]
Union = dict[str, str] | None
_log = logging.getLogger(__name__)
NOTHING: dict[str, str] | None = None
declared: list[str]
ENCODER = msgspec.json.Encoder()
COLUMN = sa.Column("id")
STATEMENT = sa.select(COLUMN)
DOUBLE = functools.partial(max, 2)


def makes_its_own():
    local = {}
    held = [local]
    return held


if __name__ == "__main__":
    arguments = []

# --- CR002


FROZEN_EARLY = ()


class Agent:
    history = []  # -> CR002
    memory: dict[str, str] = {}  # -> CR002
    shared: ClassVar[list[str]] = []  # -> CR002
    made = list()  # -> CR002
    pair = (1, {})  # -> CR002
    from_function = bare()  # -> CR002
    second_name = CACHE  # -> CR002
    of_another = FROZEN_EARLY
    from_closing = closing()  # -> CR008
    if history:
        more = []  # -> CR002

    __slots__ = ["mine"]
    __match_args__ = ("mine",)
    names = ("a",)
    own: list[str]

    class Inner:
        deep = []  # -> CR002

    def __init__(self):
        self.mine = []


Agent.later = {}  # -> CR002


@dataclasses.dataclass
class Data:
    items: list[str] = dataclasses.field(default_factory=list)
    held: list[str] = dataclasses.field(default=[])  # -> CR002
    shared: ClassVar[dict[str, str]] = {}  # -> CR002


class Model(pydantic.BaseModel):
    model_config = {"extra": "forbid"}
    items: list[str] = []
    shared: ClassVar[list[str]] = []  # -> CR002


class Struct(msgspec.Struct):
    items: list[str] = []


class SubModel(Model):
    more: list[str] = []


class Row(NamedTuple):
    name: str
    tags: list[str] = []  # -> CR006
    pair: tuple[str, ...] = ()


class Colour(enum.Enum):
    RED = ["r"]


class Typed(TypedDict):
    name: str


def makes_a_class():
    class Local:
        items = []

    return Local


# --- CR008


class Registry:
    def __init__(self):
        self.entries = {}


class Counter:
    def __init__(self):
        self.count = 0

    def add(self):
        self.count += 1


class Child(Counter):
    pass


class Plain:
    def __init__(self, name):
        self.name = name


@dataclasses.dataclass(frozen=True)
class FrozenData:
    name: str


class Threadlike(dict):
    pass


class HoldsOne:
    def __init__(self):
        self.registry = Registry()


class HoldsClient:
    def __init__(self):
        self.client = acme.AcmeClient()


class HoldsItself:
    def __init__(self):
        self.parent = HoldsItself()


def make_quietly():
    return Registry()


def make_plain():
    return Plain("a")


def make_registry() -> "Registry":
    return Registry()


CLIENT = httpx2.AsyncClient()  # -> CR008
MODEL = ai.AsyncOpenAI()  # -> CR008
UNKNOWN = acme.AcmeClient()  # -> CR008
ENGINE = sa.create_engine("sqlite://")  # -> CR008
METADATA = sa.MetaData()  # -> CR008
DATABASE = sqlite3.connect("x")  # -> CR008
FILE = open("x")  # -> CR008
OPENED = Path("x").open()  # -> CR008
LOCK = threading.Lock()  # -> CR008
LOCAL = threading.local()  # -> CR008
EVENT = trio.Event()  # -> CR008
SEND, RECEIVE = trio.open_memory_channel(0)  # -> CR008
CHANNEL = trio.open_memory_channel(0)  # -> CR008
QUEUE = asyncio.Queue()  # -> CR008
REGISTRY = Registry()  # -> CR008
COUNTER = Counter()  # -> CR008
CHILD = Child()  # -> CR008
DATA = Data()  # -> CR008
DICTLIKE = Threadlike()  # -> CR008
RETURNED = make_registry()  # -> CR008
RETURNED_QUIETLY = make_quietly()  # -> CR008
RETURNED_PLAIN = make_plain()
SECOND_REGISTRY = REGISTRY  # -> CR008
HOLDS_ONE = HoldsOne()  # -> CR008
HOLDS_CLIENT = HoldsClient()  # -> CR008
HOLDS_ITSELF = HoldsItself()
TYPED: Registry = acme.find()  # -> CR008
with open("x") as KEPT:  # -> CR008
    pass


class Tool:
    lock = threading.Lock()  # -> CR008
    client: ClassVar[httpx2.Client] = httpx2.Client()  # -> CR008
    registry = typing.cast("Registry", Registry())  # -> CR008


PLAIN = Plain("a")
FROZEN_DATA = FrozenData("a")
MODEL_OF_DATA = Model()
RED = Colour.RED
BY_KEY = weakref.WeakKeyDictionary()  # -> CR001
ROW = Row("a")
