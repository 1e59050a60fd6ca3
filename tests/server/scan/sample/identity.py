"""Identity that is looked up: CR011."""

import threading
from contextvars import ContextVar

from flask import g
from quart import request

from creche import RunContext, UserId

current: ContextVar[UserId] = ContextVar("current")
run_id: ContextVar[str] = ContextVar("run_id")
holder = ContextVar[RunContext]("holder")
depth: ContextVar[int] = ContextVar("depth", default=0)
local = threading.local()  # -> CR008
user = None


class Vars:
    tenant = ContextVar("tenant")


AT_IMPORT = current.get(None)


def looks_up():
    return current.get()  # -> CR011


def looks_up_by_name():
    return run_id.get(None)  # -> CR011


def looks_up_in_a_class():
    return Vars.tenant.get()  # -> CR011


def looks_up_by_type():
    return holder.get()  # -> CR011


def of_the_thread():
    return local.user_id  # -> CR011


def of_the_module():
    return user.name  # -> CR011


def of_the_framework():
    return g.user, request.headers["Authorization"]  # -> CR011 CR011


def is_told(user, run_id, request):
    return user, run_id, request.headers


def of_the_tree():
    current.set(UserId("a"))
    return depth.get()


def in_a_query():
    return request.args.get("page")
