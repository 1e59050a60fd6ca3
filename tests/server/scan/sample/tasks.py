"""Tasks and threads that nothing waits for, nurseries that are kept: CR012, CR014."""

import asyncio
import threading
from asyncio import create_task
from dataclasses import dataclass
from threading import Thread

import anyio
import trio
from trio.lowlevel import spawn_system_task

# --- CR012


async def loose(work, loop, service):
    spawn_system_task(work)  # -> CR012
    create_task(work())  # -> CR012
    asyncio.ensure_future(work())  # -> CR012
    loop.create_task(work())  # -> CR012
    asyncio.get_running_loop().create_task(work())  # -> CR012
    Thread(target=work).start()  # -> CR012
    threading.Timer(1, work).start()  # -> CR012
    service.nursery.start_soon(work)  # -> CR012
    background = service.task_group
    background.start_soon(work)  # -> CR012


def daemon(work):
    thread = Thread(target=work, daemon=True)  # -> CR012
    thread.start()
    thread.join()


def late_daemon(work):
    thread = Thread(target=work)  # -> CR012
    thread.daemon = True
    thread.start()
    thread.join()


def not_joined(work, words):
    thread = Thread(target=work)  # -> CR012
    thread.start()
    return ", ".join(words)


class Starts:
    def start(self, work):
        self.thread = Thread(target=work)  # -> CR012
        self.thread.start()


def joined(work):
    thread = Thread(target=work)
    thread.start()
    thread.join()


def joined_for_a_while(work):
    threads = [Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.join(5)


async def structured(work):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(work)
        await nursery.start(work)
    async with asyncio.TaskGroup() as group:
        group.create_task(work())


async def lent(nursery: trio.Nursery, work):
    nursery.start_soon(work)


# --- CR014

kept = None


class Runner:
    def __init__(self, nursery, tasks: trio.Nursery, name: str):
        self._nursery = nursery  # -> CR014
        self.background = tasks  # -> CR014
        self.name = name

    def go(self, work):
        self._nursery.start_soon(work)

    async def serve(self):
        async with trio.open_nursery() as self.own:  # -> CR014
            pass
        async with anyio.create_task_group() as group:
            self.groups = {}
            self.groups["x"] = group  # -> CR014


@dataclass
class Services:
    nursery: trio.Nursery  # -> CR014
    name: str


async def keeps_globally():
    global kept  # -> CR003
    async with trio.open_nursery() as kept:  # -> CR014
        await trio.sleep(1)


async def by_hand():
    nursery = await trio.open_nursery().__aenter__()  # -> CR014
    nursery.start_soon(trio.sleep_forever)
