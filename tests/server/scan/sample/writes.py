"""Writes that reach beyond the run: CR003, CR004, CR005, CR009."""

import contextlib
import locale
import os
import os as system
import random
import signal
import sys
import asyncio
import atexit
import builtins
import decimal
import gc
import importlib
import logging
import logging.config
import warnings
from json import JSONEncoder
from os import environ

import acme
import acme.settings
import httpx2
from acme import settings

from . import functions, module_state, other
from .functions import Service, fetch
from .other import Other, current

count = 0

# --- CR003


def rebinds():
    global count, total  # -> CR003
    count += 1
    total = count


def by_name():
    globals()["count"] = 1  # -> CR003
    globals().update(count=2)  # -> CR003


def by_own_module(name, value):
    setattr(sys.modules[__name__], name, value)  # -> CR003
    sys.modules[__name__].count = 1  # -> CR003
    sys.modules[__name__].__dict__["count"] = 1  # -> CR003
    vars(sys.modules[__name__])[name] = 1  # -> CR003
    me = sys.modules[__name__]
    me.count = 1  # -> CR003
    names = globals()
    names["count"] = 1  # -> CR003
    names = vars()
    vars()["count"] = value
    return names, sys.modules[__name__].count, globals()["count"]


known_elsewhere = acme.load()
SETTINGS = acme.Settings()
PLAIN = module_state.Plain("a")
TABLE = acme.Table("users")
COUNTER = acme.counter()


def in_place(user_id, value):
    known_elsewhere[user_id] = value  # -> CR003
    del known_elsewhere[user_id]["a"]  # -> CR003
    known_elsewhere.setdefault(user_id, value)  # -> CR003
    known_elsewhere.update({user_id: value})  # -> CR003
    SETTINGS.user = value  # -> CR003
    PLAIN.name = value  # -> CR003
    other.state.last = value  # -> CR005
    alias = known_elsewhere
    alias[user_id] = value  # -> CR003
    COUNTER.add(1)
    return TABLE.insert().values(a=1), TABLE.update(), SETTINGS.user, known_elsewhere.get(user_id)


def in_place_here(known_elsewhere, user_id):
    known_elsewhere[user_id] = 1
    mine = acme.load()
    mine[user_id] = 1
    mine.append(user_id)


def closes_over():
    inner = 0

    def add():
        nonlocal inner
        inner += 1

    count = 1
    return add, count


# --- CR004


class Agent:
    runs = 0
    last = None
    table = acme.table()

    def run(self, user):
        type(self).runs += 1  # -> CR004
        self.__class__.last = user  # -> CR004
        Agent.last = user  # -> CR004
        self.last = user

    @classmethod
    def reset(cls):
        cls.runs = 0  # -> CR004
        setattr(cls, "last", None)  # -> CR004
        del cls.last  # -> CR004
        cls.runs, other = 1, 2  # -> CR004

    def deep(self):
        def later():
            Agent.runs = 2  # -> CR004

        return later

    def through_an_alias(self, user, other):
        kind = type(self)
        kind.last = user  # -> CR004
        also = self.__class__
        also.runs += 1  # -> CR004
        table = type(self).table
        table[user] = 1  # -> CR004
        __class__.last = user  # -> CR004
        type(other).last = user  # -> CR004
        mine = self
        mine.last = user
        self.table[user] = 1
        name = type(self).__name__
        name = name.lower()

    def by_other_means(self, name, user):
        type.__setattr__(type(self), name, user)  # -> CR004
        object.__setattr__(Agent, "last", user)  # -> CR004
        setattr(type(self), name, user)  # -> CR004
        setattr(self.__class__, "last", user)  # -> CR004
        delattr(type(self), "last")  # -> CR004
        vars(type(self))[name] = user  # -> CR004
        type(self).__dict__[name] = user  # -> CR004
        type(self).table.append(user)  # -> CR004
        Agent.table.setdefault(name, user)  # -> CR004
        self.run.__func__.last = user  # -> CR004
        object.__setattr__(self, "last", user)
        setattr(self, name, user)
        vars(self)[name] = user
        self.__dict__[name] = user
        self.table.append(user)
        return type(self)(), vars(type(self))[name], type("Made", (), {})

    def __init_subclass__(cls, **kwargs):
        cls.registered = True
        cls.table.append(1)


class Meta(type):
    def __init__(cls, name, bases, namespace):
        cls.fields = ()


def decorate(cls):
    cls.decorated = True
    return cls


def classes_of_others(thing):
    type(thing).last = 1  # -> CR004
    thing.__class__.last = 1  # -> CR004
    thing.__class__ = Agent
    thing.last = type(thing)


def counts():
    fetches.count = 1  # -> CR004
    fetches.__defaults__ = ([],)  # -> CR004
    fetches.__kwdefaults__["a"] = 1  # -> CR004
    fetches.__dict__["a"] = 1  # -> CR004
    fetches.seen.append(1)  # -> CR004
    setattr(fetches, "count", 1)  # -> CR004
    counts.cache = {}  # -> CR004

    def inner():
        inner.count = 1

    inner.count = 0
    return fetches.__defaults__, inner


def fetches():
    pass


Agent.name = "agent"


def local_names(Agent):
    Agent.last = 1


# --- CR005

acme.settings.DEBUG = True  # -> CR005
httpx2.Client.timeout = 5  # -> CR005
setattr(httpx2, "get", None)  # -> CR005


def patches(name):
    functions.fetch = None  # -> CR005
    functions.CACHE[name] = 1  # -> CR005
    fetch.calls = 1  # -> CR005
    Service.load = None  # -> CR005
    JSONEncoder.default = None  # -> CR005
    Other.name = name  # -> CR005
    setattr(Service, name, None)  # -> CR005
    del sys.last_value  # -> CR005
    sys.stdout = None  # -> CR005
    vars(acme)[name] = 1  # -> CR005
    acme.__dict__[name] = 1  # -> CR005
    module_state.CACHE.update({name: 1})  # -> CR005
    module_state.Agent.history.append(name)  # -> CR005
    sys.modules["acme"].debug = True  # -> CR005
    importlib.import_module(name).debug = True  # -> CR005
    found = importlib.import_module(name)
    found.debug = True  # -> CR005
    builtins.open = None  # -> CR005
    mine = other.state
    if name:
        mine = acme.make()
    mine.last = name
    acme.append(name)
    acme.numbers.append(name)
    vars(made := Service())[name] = 1
    acme.settings.values.debug = True  # -> CR005
    current.name = name  # -> CR005
    settings.debug = True
    made = Service()
    made.load = None
    setattr(made, name, None)


# --- CR009

HERE = os.environ
os.environ["A"] = "b"  # -> CR009
os.environ |= {"A": "b"}  # -> CR009
signal.signal(signal.SIGINT, signal.SIG_IGN)  # -> CR009


def changes(path):
    environ["A"] = "b"  # -> CR009
    del system.environ["A"]  # -> CR009
    os.environ.update(A="b")  # -> CR009
    environ.pop("A")  # -> CR009
    environ.setdefault("A", "b")  # -> CR009
    os.putenv("A", "b")  # -> CR009
    os.chdir(path)  # -> CR009
    os.umask(0)  # -> CR009
    locale.setlocale(locale.LC_ALL, "")  # -> CR009
    sys.path.insert(0, path)  # -> CR009
    sys.path[0] = path  # -> CR009
    sys.path = [path]  # -> CR009
    sys.path += [path]  # -> CR009
    sys.modules["x"] = None  # -> CR009
    sys.modules.pop("x")  # -> CR009
    random.seed(1)  # -> CR009
    random.setstate(path)  # -> CR009
    there = os.environ
    there["A"] = "b"  # -> CR009
    there.pop("A")  # -> CR009
    HERE["A"] = "b"  # -> CR009
    decimal.getcontext().prec = 3  # -> CR009
    numbers = decimal.getcontext()
    numbers.prec = 3  # -> CR009
    with decimal.localcontext() as numbers_here:
        numbers_here.prec = 3
    warnings.filterwarnings("ignore")  # -> CR009
    logging.basicConfig()  # -> CR009
    logging.config.dictConfig({})  # -> CR009
    logging.disable()  # -> CR009
    atexit.register(changes)  # -> CR009
    gc.disable()  # -> CR009
    asyncio.set_event_loop(None)  # -> CR009
    importlib.reload(acme)  # -> CR009
    sys.meta_path.append(path)  # -> CR009
    copied = dict(os.environ)
    copied["A"] = "b"
    logging.getLogger(__name__).warning("said")
    with contextlib.chdir(path):  # -> CR009
        pass
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # -> CR009
    return os.environ["A"], os.environ.get("A"), environ.copy(), sys.path[0], random.Random(1)


def main():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    logging.basicConfig()
    gc.freeze()
    warnings.simplefilter("ignore")


def quietly(work):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return work()


async def not_quietly(work):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # -> CR009
        return await work()


def other_environ(environ):
    environ["A"] = "b"


# --- for `module_state`

TOTALS = {}  # -> CR001


def makes():
    return {}
