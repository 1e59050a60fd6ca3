"""A user's threads over HTTP: list, make, look at, delete."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, Final
from urllib.parse import quote, urlencode

import msgspec
from pydantic import BaseModel, ConfigDict, Field
from quart import Blueprint, Response, jsonify

from creche import (
    InvalidContextError,
    NewThread,
    RunId,
    ThreadRecord,
    UserId,
    check_id,
    new_id,
)
from creche_server.http import brought
from creche_server.http.finding import Finder
from creche_server.http.identity import current_user
from creche_server.recall import UnknownRunError, history, open_interrupts, recall
from creche_server.services import Services
from creche_server.wire.commands import DEFAULT_RUNS, MOST_RUNS

_MOST_OFFSET: Final = 1_000_000_000  # far more threads than anybody has; a database's integer

_encoder: Final = msgspec.json.Encoder()


class Page(BaseModel):
    """Which part of a list. From the query string, so numbers come as words."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(100, ge=1, le=1000)
    offset: int = Field(0, ge=0, le=_MOST_OFFSET)


class Runs(BaseModel):
    """Which of a thread's runs to tell of: the latest, or the latest before one."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(DEFAULT_RUNS, ge=1, le=MOST_RUNS)
    before: RunId | None = None


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
    routes.get("/threads/<thread_id>/stream")(no_websocket)
    routes.get("/threads/<thread_id>/stream/events", endpoint="events")(no_websocket)
    return routes


async def no_websocket(thread_id: str) -> Any:  # noqa: ARG001  the route's
    """What a chat's address says to a request that is no upgrade (RFC 9110, section 15.5.22)."""
    answer = jsonify(error="upgrade_required", message="connect with a WebSocket")
    answer.headers["Upgrade"] = "websocket"
    return answer, HTTPStatus.UPGRADE_REQUIRED


class _Threads:
    def __init__(self, services: Services) -> None:
        self._auth = services.auth
        self._store = services.store
        self._supervisor = services.supervisor
        self._finder = Finder(services)

    async def listing(self) -> Any:
        user_id = current_user(self._auth)
        page = brought.query(Page)
        threads = await self._store.threads(user_id, limit=page.limit, offset=page.offset)
        return jsonify([self._summary(thread) for thread in threads])

    async def make(self) -> Any:
        user_id = current_user(self._auth)
        body = await brought.body(ThreadRequest)
        try:
            thread_id = await self._finder.thread_id(user_id, body.thread_id or new_id())
        except InvalidContextError as error:
            raise brought.UnfitError([("thread_id", str(error))], part="body") from error
        existing = await self._store.thread(user_id, thread_id)
        if existing is not None and (existing.title or not body.title):
            return jsonify(self._summary(existing)), 200  # and nothing of it has changed
        async with self._supervisor.journals.attached(user_id, thread_id) as journal:
            await journal.propose(NewThread(title=body.title, epoch=journal.epoch))
        thread = await self._finder.thread(user_id, thread_id)
        return jsonify(self._summary(thread)), 200 if existing else 201

    async def look(self, thread_id: str) -> Any:
        return jsonify(
            self._summary(await self._finder.thread(current_user(self._auth), thread_id))
        )

    async def remove(self, thread_id: str) -> Any:
        user_id = current_user(self._auth)
        checked = await self._finder.thread_id(user_id, thread_id)
        if not await self._supervisor.delete_thread(user_id, checked):
            raise self._finder.no_such_thread(user_id, checked)
        return "", 204

    async def state(self, thread_id: str) -> Any:
        user_id = current_user(self._auth)
        thread = await self._finder.thread(user_id, thread_id)
        runs = await self._asked(user_id)
        try:
            recalled = await recall(
                self._store, user_id, thread.thread_id, limit=runs.limit, before=runs.before
            )
        except UnknownRunError:
            self._finder.look_up("run", runs.before or "", user_id)
            raise
        active = self._supervisor.runs(user_id, thread.thread_id)
        return _json(
            {
                **recalled.to_dict(),
                **await open_interrupts(self._store, user_id, thread.thread_id),
                "thread": self._summary(thread),
                "active_run": active[0].run_id if active else None,
                "queued_runs": [run.run_id for run in active[1:]],
            },
        )

    async def history(self, thread_id: str) -> Any:
        user_id = current_user(self._auth)
        thread = await self._finder.thread(user_id, thread_id)
        runs = await self._asked(user_id)
        try:
            states, cut_at = await history(
                self._store, user_id, thread.thread_id, limit=runs.limit, before=runs.before
            )
        except UnknownRunError:
            self._finder.look_up("run", runs.before or "", user_id)
            raise
        answer = _json(states)
        if cut_at is not None:
            # Beside the list, not in it: stock clients take the body for the states alone.
            rest = urlencode({"limit": runs.limit, "before": cut_at})
            answer.headers["Link"] = (
                f'</threads/{quote(thread_id, safe="")}/history?{rest}>; rel="next"'
            )
        return answer

    async def _asked(self, user_id: UserId) -> Runs:
        """Which runs are asked for. Raises UnfitError."""
        runs = brought.query(Runs)
        if runs.before is not None:
            try:
                check_id("before", runs.before)
            except InvalidContextError as error:
                await self._finder.note_invalid(user_id, f"run {runs.before}")
                raise brought.UnfitError([("before", str(error))], part="query") from error
        return runs

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


def _json(value: Any) -> Response:
    return Response(_encoder.encode(value), content_type="application/json")
