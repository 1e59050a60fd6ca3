"""Identity that is looked up: CR011."""

import threading
from contextvars import ContextVar, copy_context

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


slot = ContextVar("slot")
other_slot = ContextVar("other_slot")
number = ContextVar("number")

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


def sets(user_id, run, number_of):
    slot.set(user_id)
    other_slot.set(run.user_id)
    number.set(number_of)


def looks_up_what_was_set():
    return slot.get(), other_slot.get()  # -> CR011 CR011


def looks_up_by_other_means():
    get = current.get  # -> CR011
    by_item = copy_context()[current]  # -> CR011
    return get(), by_item, copy_context().get(run_id)  # -> CR011


def of_a_number():
    return number.get(), copy_context()[number], {}.get(depth)


def of_the_tree():
    current.set(UserId("a"))
    return depth.get()


def in_a_query():
    return request.args.get("page")
