"""A user's threads over HTTP: list, make, look at, delete."""

from __future__ import annotations

import functools
from typing import Any, Final

import msgspec
from pydantic import BaseModel, ConfigDict, Field
from quart import Blueprint, Response, jsonify, request
from werkzeug.exceptions import NotFound

from creche import (
    InvalidContextError,
    NewThread,
    RunRecord,
    StoredMessage,
    ThreadId,
    ThreadRecord,
    UserId,
    check_id,
    new_id,
)
from creche_server.http.afterwards import after_reply
from creche_server.http.identity import current_user, operation
from creche_server.services import Services

_encoder: Final = msgspec.json.Encoder()


class Page(BaseModel):
    """Which part of a list. From the query string, so numbers come as words."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(100, ge=1, le=1000)
    offset: int = Field(0, ge=0)


class ThreadRequest(BaseModel):
    """What a thread is made with; clients may name it themselves."""

    model_config = ConfigDict(extra="forbid", strict=True)

    thread_id: str | None = None
    title: str = Field("", max_length=200)


def thread_routes(services: Services) -> Blueprint:
    """`/threads` and what is below it; a thread that is another's is absent."""
    threads = _Threads(services)
    routes = Blueprint("threads", __name__)
    routes.get("/threads")(threads.listing)
    routes.post("/threads")(threads.make)
    routes.get("/threads/<thread_id>")(threads.look)
    routes.delete("/threads/<thread_id>")(threads.remove)
    routes.get("/threads/<thread_id>/state")(threads.state)
    routes.get("/threads/<thread_id>/history")(threads.history)
    return routes


class _Threads:
    def __init__(self, services: Services) -> None:
        self._auth = services.auth
        self._store = services.store
        self._supervisor = services.supervisor
        self._audit = services.audit
        self._lookups = services.lookups

    async def listing(self) -> Any:
        user_id = current_user(self._auth)
        page = Page.model_validate(request.args.to_dict())
        threads = await self._store.threads(user_id, limit=page.limit, offset=page.offset)
        return jsonify([self._summary(thread) for thread in threads])

    async def make(self) -> Any:
        user_id = current_user(self._auth)
        body = ThreadRequest.model_validate_json(await request.get_data() or b"{}")
        thread_id = await self._checked(user_id, body.thread_id or new_id())
        existed = await self._store.thread(user_id, thread_id) is not None
        async with self._supervisor.journals.attached(user_id, thread_id) as journal:
            await journal.propose(NewThread(title=body.title, epoch=journal.epoch))
        thread = await self._found(user_id, thread_id)
        return jsonify(self._summary(thread)), 200 if existed else 201

    async def look(self, thread_id: str) -> Any:
        return jsonify(self._summary(await self._found(current_user(self._auth), thread_id)))

    async def remove(self, thread_id: str) -> Any:
        user_id = current_user(self._auth)
        checked = await self._checked(user_id, thread_id)
        if not await self._supervisor.delete_thread(user_id, checked):
            raise self._no_such_thread(user_id, checked)
        return "", 204

    async def state(self, thread_id: str) -> Any:
        user_id = current_user(self._auth)
        thread = await self._found(user_id, thread_id)
        messages = await self._store.messages(user_id, thread.thread_id)
        active = self._supervisor.runs(user_id, thread.thread_id)
        return _json(
            {
                "values": {"messages": [item.message for item in messages]},
                "thread": self._summary(thread),
                "active_run": active[0].run_id if active else None,
                "queued_runs": [run.run_id for run in active[1:]],
            },
        )

    async def history(self, thread_id: str) -> Any:
        user_id = current_user(self._auth)
        thread = await self._found(user_id, thread_id)
        page = Page.model_validate(request.args.to_dict())
        runs = await self._store.runs(user_id, thread.thread_id)
        messages = await self._store.messages(user_id, thread.thread_id)
        states = states_of(runs, messages)
        return _json(states[page.offset : page.offset + page.limit])

    async def _found(self, user_id: UserId, thread_id: str) -> ThreadRecord:
        checked = await self._checked(user_id, thread_id)
        thread = await self._store.thread(user_id, checked)
        if thread is None:
            raise self._no_such_thread(user_id, checked)
        return thread

    async def _checked(self, user_id: UserId, thread_id: str) -> ThreadId:
        try:
            return ThreadId(check_id("thread_id", thread_id))
        except InvalidContextError:
            await self._audit.record(
                "invalid_context",
                user=user_id,
                resource=f"thread {thread_id}",
                operation=operation(),
            )
            raise

    def _no_such_thread(self, user_id: UserId, thread_id: ThreadId) -> NotFound:
        after_reply(
            functools.partial(self._lookups.ask, "thread", thread_id, user_id, operation()),
        )
        # The same words for what is absent and for what is another's.
        return NotFound("there is no such thread")

    def _summary(self, thread: ThreadRecord) -> dict[str, Any]:
        active = self._supervisor.runs(thread.user_id, thread.thread_id)
        return {
            "thread_id": thread.thread_id,
            "title": thread.title,
            "status": "busy" if active else "idle",
            "epoch": thread.epoch,
            "last_seq": thread.last_seq,
            "runs": thread.runs,
            "created_at": thread.created_at.isoformat(),
            "updated_at": thread.updated_at.isoformat(),
        }


def states_of(runs: list[RunRecord], messages: list[StoredMessage]) -> list[dict[str, Any]]:
    """The thread as it was after each of its runs, the latest first."""
    so_far: list[StoredMessage] = []
    states: list[dict[str, Any]] = []
    for run in runs:
        so_far = so_far + [item for item in messages if item.run_id == run.run_id]
        states.append(
            {
                "values": {"messages": [item.message for item in so_far]},
                "metadata": {
                    "run_id": run.run_id,
                    "assistant_id": run.agent,
                    "status": run.status,
                    "reason": run.reason,
                    "first_seq": run.first_seq,
                    "last_seq": run.last_seq,
                    "receipt": run.receipt,
                },
                "created_at": run.created_at.isoformat(),
                "ended_at": run.ended_at.isoformat() if run.ended_at else None,
            },
        )
    return states[::-1]


def _json(value: Any) -> Response:
    return Response(_encoder.encode(value), content_type="application/json")
