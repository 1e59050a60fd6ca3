"""Tasks and threads that nothing waits for, nurseries that are kept: CR012, CR014."""

import asyncio
import functools
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


async def loose_by_alias(work, service, nurseries):
    running = asyncio.get_running_loop()
    running.create_task(work())  # -> CR012
    running.call_later(1, work)  # -> CR012
    service._n.start_soon(work)  # -> CR012
    found = service.tasks
    found.start_soon(work)  # -> CR012
    service.all["x"].start_soon(work)  # -> CR012
    Worker().start()  # -> CR012
    service.server.start(work)
    trio.lowlevel.start_thread_soon(work, print)  # -> CR012
    running.time()
    nurseries[0].start_soon(work)


async def of_the_block(work, open_service):
    async with open_service() as service:
        service.tasks.start_soon(work)
        service.nursery.start_soon(work)


class Worker(Thread):
    pass


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
        self.background.start_soon(work)
        self.name.start_soon(work)  # -> CR012
        self.name.start(work)

    async def serve(self):
        async with trio.open_nursery() as self.own:  # -> CR014
            pass
        async with anyio.create_task_group() as group:
            self.groups = {}
            self.groups["x"] = group  # -> CR014


class Quiet:
    def __init__(self, n, name):
        self._n = n
        self.name = name

    async def serve(self, n: trio.Nursery, service):
        self.all = [n]  # -> CR014
        self.all.append(n)  # -> CR014
        KEPT.append(n)  # -> CR014
        setattr(self, "tasks", n)  # -> CR014
        self.spawn = n.start_soon  # -> CR014
        self.spawn_work = functools.partial(n.start_soon, self.serve)  # -> CR014
        self.theirs = service.nursery  # -> CR014
        mine = [n]
        mine.append(n)
        return mine

    def go(self, work):
        self._n.start_soon(work)  # -> CR012


class Uses:
    def __init__(self, n):
        n.start_soon(trio.sleep_forever)


KEPT = []  # -> CR001


async def hands_on():
    async with trio.open_nursery() as nursery:
        quiet = Quiet(nursery, "a")  # -> CR014
        by_name = Quiet(name="a", n=nursery)  # -> CR014
        told = Runner(nursery, nursery, "a")
        used = Uses(nursery)
        await serve(nursery)
        return quiet, by_name, told, used


async def serve(nursery):
    nursery.start_soon(trio.sleep_forever)


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
