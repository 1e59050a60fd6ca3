"""Defaults, caches, singletons and ContextVars: CR006, CR007, CR010, CR013."""

import functools
import functools as f
from contextvars import ContextVar
from functools import cache, lru_cache as memo
from typing import ClassVar

import cachetools
import trio
from async_lru import alru_cache

from creche import RunContext, UserExecutionContext, UserId

KEPT = []  # -> CR001


def made_elsewhere():
    return {}


# --- CR006


def appends(item, into=[]):  # -> CR006
    into.append(item)


def by_function(item, into=made_elsewhere(), kept=KEPT):  # -> CR006 CR006
    return into, item, kept


def by_keyword(*, seen={}, names=()):  # -> CR006
    return seen, names


async def opens(
    first,
    lock=trio.Lock(),  # -> CR006
    tags=set(),  # -> CR006
):
    return first, lock, tags


later = lambda items=[]: items  # -> CR006


class Keeps:
    def add(self, item, items=list()):  # -> CR006
        return [*items, item]

    def fine(self, items=None, names=(), kinds=frozenset()):
        return items or [*names, *kinds]


# --- CR007


@functools.cache  # -> CR007
def profile(user_id):
    return user_id


@memo(maxsize=None)  # -> CR007
def prompt(text, *, ctx):
    return text, ctx


@f.lru_cache  # -> CR007
def limits(of: UserId):
    return of


@alru_cache(maxsize=10)  # -> CR007
async def history(run: "RunContext"):
    return run


@cachetools.cached(cache={})  # -> CR007
def answer(context: UserExecutionContext):
    return context


@cache  # -> CR007
def settings() -> dict[str, str]:
    return {}


@cache  # -> CR007
def client():
    return trio.Lock()


class Service:
    @cache  # -> CR007
    def load(self, name):
        return name

    @functools.lru_cache(maxsize=1)  # -> CR007
    def count(self):
        return 1

    @staticmethod
    @cache  # -> CR007
    def of(user_id):
        return user_id

    @classmethod
    @cache  # -> CR007
    def token_of(cls, token):
        return token

    @staticmethod
    @cache
    def square(n):
        return n * n

    @functools.cached_property
    def own(self):
        return []


class Meta(type):
    @functools.cached_property  # -> CR007
    def kept(cls):
        return cls.__name__


def fetch(session):
    return session


fetch_cached = cache(fetch)  # -> CR007


@cache
def square(n: int) -> int:
    return n * n


@memo(maxsize=10)
def room(context: int) -> int:
    return context


cached_lambda = functools.cache(lambda user_id: user_id)  # -> CR007
by_call = functools.lru_cache(maxsize=None)(fetch)  # -> CR007
by_size = memo(maxsize=3)(lambda *, user: user)  # -> CR007
fetch.cached = cache(lambda session: session)  # -> CR007
keeps_lists = cache(lambda: [])  # -> CR007
cached_square = functools.cache(lambda n: n * n)
squares_cached = functools.lru_cache(maxsize=None)(square)


class Holder:
    cached = functools.lru_cache(lambda user_id: user_id)  # -> CR007
    squares = functools.cache(lambda n: n * n)


Holder.later = functools.cache(fetch)  # -> CR007


def with_cache_inside(user_id):
    @cache
    def inner(request):
        return request, user_id

    return inner


def cached(function):
    return function


@cached
def ours(user_id):
    return user_id


def remember(function):
    answers = {}

    @f.wraps(function)
    def inner(*args):
        if args not in answers:
            answers[args] = function(*args)
        return answers[args]

    return inner


def remember_some(size):
    def decorate(function):
        answers = {}

        async def inner(*args):
            return answers.setdefault(args, await function(*args))

        made = f.update_wrapper(inner, function)
        return made

    return decorate


def remember_on_itself(function):
    def inner(key):
        inner.answers[key] = function(key)
        return inner.answers[key]

    inner.answers = {}
    return inner


def by_library(function):
    return functools.lru_cache(maxsize=None)(function)


def counted(function):
    calls = 0

    def inner(*args):
        nonlocal calls
        calls += 1
        return function(*args)

    return inner


def one_at_a_time(function):
    lock = trio.Lock()

    async def inner(*args):
        async with lock:
            return await function(*args)

    return inner


def gathered(function):
    def inner(*args):
        found = []
        found.append(function(*args))
        return found

    return inner


def logged(function):
    name = function.__name__

    def inner(*args):
        print(name)
        return function(*args)

    return inner


class Remember:
    def __init__(self, function):
        self.function = function
        self.answers = {}

    def __call__(self, *args):
        self.answers[args] = self.function(*args)
        return self.answers[args]


class Passes:
    def __init__(self, function):
        self.function = function

    def __call__(self, *args):
        return self.function(*args)


class Described:
    def __init__(self, function):
        self.function = function

    def setter(self, function):
        self.set = function
        return self

    def __get__(self, instance, owner):
        return self.function


def by_object(function):
    return Remember(function)


@remember  # -> CR007
def remembered(user_id):
    return user_id


@remember_some(3)  # -> CR007
async def remembered_some(ctx):
    return ctx


@remember_on_itself  # -> CR007
def remembered_on_itself(user):
    return user


@by_library  # -> CR007
def remembered_by_library(user):
    return user


@counted  # -> CR008
def counts(n):
    return n


@one_at_a_time  # -> CR008
async def alone(n):
    return n


@Remember  # -> CR008
def remembered_by_class(user_id):
    return user_id


@by_object  # -> CR008
def remembered_by_object(user_id):
    return user_id


class Remembers:
    @remember  # -> CR007
    def load(self, name):
        return name

    @Described
    def described(self):
        return 1

    @staticmethod
    @remember
    def square(n):
        return n * n


remembered_later = remember(fetch)  # -> CR007
remembered_lambda = remember_some(3)(lambda user: user)  # -> CR007
counted_later = counted(square)  # -> CR008


@remember
def cube(n):
    return n * n * n


remembered_square = remember(square)


@gathered
@logged
@Passes
def passed(user_id):
    return user_id


def makes_one(user_id):
    @remember
    def inner(request):
        return request, user_id

    return inner


# --- CR010

seen: ContextVar[list[str]] = ContextVar("seen", default=[])  # -> CR010
cache_of = ContextVar("cache", default={})  # -> CR010
depth: ContextVar[int] = ContextVar("depth", default=0)
names: ContextVar[tuple[str, ...]] = ContextVar("names", default=())

# --- CR013


class Once:
    _instance = None  # -> CR013

    def __new__(cls):  # -> CR013
        if cls._instance is None:
            cls._instance = super().__new__(cls)  # -> CR004
        return cls._instance


class Borg:
    _shared_state: ClassVar[dict[str, object]] = {}  # -> CR013


class SingletonMeta(type):
    _instances = {}  # -> CR013

    def __call__(cls, *args):  # -> CR013
        cls._instances[cls] = super().__call__(*args)  # -> CR004
        return cls._instances[cls]


class ByMeta(metaclass=SingletonMeta):  # -> CR013
    pass


def singleton(cls):
    return cls


@singleton  # -> CR013
class Decorated:
    pass


@functools.cache  # -> CR013
class OnlyOnce:
    pass


@remember  # -> CR013
class OnlyOnceHere:
    pass


@logged
class Logged:
    pass


class Anew:
    def __new__(cls, *args):
        made = super().__new__(cls)
        return made


class Model(type):
    def __call__(cls, *args):
        made = super().__call__(*args)
        made.ready = True
        return made
