"""Writes that reach beyond the run: CR003, CR004, CR005, CR009."""

import contextlib
import locale
import os
import os as system
import random
import signal
import sys
from json import JSONEncoder
from os import environ

import acme.settings
import httpx2

from . import functions
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

    def __init_subclass__(cls, **kwargs):
        cls.registered = True


class Meta(type):
    def __init__(cls, name, bases, namespace):
        cls.fields = ()


def decorate(cls):
    cls.decorated = True
    return cls


def counts():
    fetches.count = 1  # -> CR004


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
    acme.settings.values.debug = True  # -> CR005
    current.name = name
    made = Service()
    made.load = None
    setattr(made, name, None)


# --- CR009

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
    with contextlib.chdir(path):  # -> CR009
        pass
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # -> CR009
    return os.environ["A"], os.environ.get("A"), environ.copy(), sys.path[0], random.Random(1)


def main():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def other_environ(environ):
    environ["A"] = "b"
