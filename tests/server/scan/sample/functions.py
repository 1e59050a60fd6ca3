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

# --- CR006


def appends(item, into=[]):  # -> CR006
    into.append(item)


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


class Anew:
    def __new__(cls, *args):
        made = super().__new__(cls)
        return made


class Model(type):
    def __call__(cls, *args):
        made = super().__call__(*args)
        made.ready = True
        return made
