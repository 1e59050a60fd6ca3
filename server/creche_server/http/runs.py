"""Runs over HTTP: which there are, how they stand, what they do right now, and how to stop one."""

from __future__ import annotations

import functools
import logging
from http import HTTPStatus
from typing import Any, Final, Literal

import trio
from pydantic import BaseModel, ConfigDict, Field, field_validator
from quart import Blueprint, jsonify

from creche import Run, RunId, RunRecord, RunTree, UserId, check_id
from creche_server.http import brought
from creche_server.http.afterwards import after_reply, correlation_id
from creche_server.http.finding import Finder
from creche_server.http.identity import current_user, operation
from creche_server.services import Services
from creche_server.wire.runs import sdk_run

_log: Final = logging.getLogger("creche.http")

_MOST_OFFSET: Final = 1_000_000_000
# Seconds on top of what a cleanup may take. Then the client is told how it stands: a request that
# waits is no place to be in for ever, least of all for a client that went without a word.
WAIT_SLACK: Final = 5.0

SdkStatus = Literal["pending", "running", "error", "success", "timeout", "interrupted"]


class RunPage(BaseModel):
    """Which of a thread's runs, as the LangGraph SDK asks."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(10, ge=1, le=1000)
    offset: int = Field(0, ge=0, le=_MOST_OFFSET)
    status: SdkStatus | None = None


class Cancelling(BaseModel):
    """How a run is to be stopped."""

    model_config = ConfigDict(extra="forbid")

    wait: bool = False
    action: Literal["interrupt", "rollback"] = "interrupt"


class Whose(BaseModel):
    """Whose runs are meant, where they need not be the asker's own."""

    model_config = ConfigDict(extra="forbid")

    user: str | None = None

    @field_validator("user")
    @classmethod
    def _can_be_a_user(cls, value: str | None) -> str | None:
        return None if value is None else check_id("user", value)


class LivePage(Whose):
    """And how many of them to tell of."""

    limit: int = Field(100, ge=1, le=1000)


class Nothing(BaseModel):
    """An address that takes no query."""

    model_config = ConfigDict(extra="forbid")


def run_routes(services: Services) -> Blueprint:
    """`/runs` and `/threads/{id}/runs`; a run that is another's is absent, but to operators."""
    runs = _Runs(services)
    routes = Blueprint("runs", __name__)
    routes.get("/runs")(runs.live)
    routes.get("/runs/<run_id>/tree", endpoint="tree")(runs.tree)
    routes.get("/threads/<thread_id>/runs")(runs.listing)
    routes.get("/threads/<thread_id>/runs/<run_id>")(runs.look)
    routes.get("/threads/<thread_id>/runs/<run_id>/tree")(runs.tree_on_thread)
    routes.post("/threads/<thread_id>/runs/<run_id>/cancel")(runs.cancel)
    return routes


class _Runs:
    def __init__(self, services: Services) -> None:
        self._auth = services.auth
        self._store = services.store
        self._supervisor = services.supervisor
        self._audit = services.audit
        self._operators = frozenset(services.settings.operators)
        self._longest_wait = services.settings.cleanup_timeout + WAIT_SLACK
        self._finder = Finder(services)

    # --- what is live

    async def live(self) -> Any:
        """The asker's live runs; everybody's, where the asker operates the server."""
        user_id = current_user(self._auth)
        page = brought.query(LivePage)
        sees_all = user_id in self._operators
        runs = self._supervisor.all_runs() if sees_all else self._supervisor.runs(user_id)
        if page.user is not None:
            if not sees_all:
                self._note_another(user_id, page.user)
            runs = tuple(run for run in runs if run.user_id == page.user)
        return jsonify(
            everybodys=sees_all,
            total=len(runs),
            runs=[run.tree().summary() for run in runs[: page.limit]],
        )

    async def tree(self, run_id: str) -> Any:
        user_id = current_user(self._auth)
        whose = brought.query(Whose).user
        checked = await self._finder.run_id(user_id, run_id)
        if user_id in self._operators:
            tree = await self._anybodys(user_id, checked, whose)
        else:
            if whose is not None:
                self._note_another(user_id, whose)
            own = whose is None or whose == user_id
            tree = await self._own_tree(user_id, checked) if own else None
        if tree is None:
            raise self._finder.no_such_run(user_id, checked)
        return jsonify(tree.to_dict())

    async def tree_on_thread(self, thread_id: str, run_id: str) -> Any:
        user_id, checked = await self._asked(thread_id, run_id)
        brought.query(Nothing)
        tree = await self._own_tree(user_id, checked)
        if tree is None or tree.thread_id != thread_id:
            raise self._finder.no_such_run(user_id, checked)
        return jsonify(tree.to_dict())

    async def _own_tree(self, user_id: UserId, run_id: RunId) -> RunTree | None:
        run = self._supervisor.find(user_id, run_id)
        if run is not None:
            return run.tree()
        record = await self._store.run(user_id, run_id)
        return None if record is None else RunTree.of_record(record)

    async def _anybodys(self, operator: UserId, run_id: RunId, user: str | None) -> RunTree | None:
        """The operator's own, or another's: of one that is not live, it must be said whose.

        Raises UnfitError where that must be said because ids are unique to their users only.
        """
        if user is None:
            own = await self._own_tree(operator, run_id)
            if own is not None:
                return own
            found = [run for run in self._supervisor.all_runs() if run.run_id == run_id]
            if len(found) > 1:
                problem = "runs of several users have this id; say whose is meant"
                raise brought.UnfitError([("user", problem)], part="query")
            tree = found[0].tree() if found else None
        else:
            tree = await self._own_tree(UserId(user), run_id)
        if tree is not None and tree.user_id != operator:
            # No refusal, so it is none of the audit's kinds; but it must be found afterwards.
            _log.info(
                "an operator looked at another user's run",
                extra={
                    "operator": operator,
                    "user_id": tree.user_id,
                    "run_id": run_id,
                    "correlation_id": correlation_id(),
                },
            )
        return tree

    def _note_another(self, user_id: UserId, claimed: str) -> None:
        """Audit, after the reply, that somebody asked by name for what is another's."""
        if claimed != user_id:
            after_reply(
                functools.partial(
                    self._audit.record_nowait,
                    "user_mismatch",
                    user=user_id,
                    claimed_owner=claimed,
                    resource="runs",
                    operation=operation(),
                    outcome="absent",
                    correlation_id=correlation_id(),
                )
            )

    # --- a thread's, as the LangGraph SDK asks for them

    async def listing(self, thread_id: str) -> Any:
        """The latest first."""
        user_id = current_user(self._auth)
        page = brought.query(RunPage)
        thread = await self._finder.thread(user_id, thread_id)
        records = await self._store.runs(user_id, thread.thread_id)
        found = [self._told(record) for record in reversed(records)]
        if page.status is not None:
            found = [run for run in found if run["status"] == page.status]
        return jsonify(found[page.offset : page.offset + page.limit])

    async def look(self, thread_id: str, run_id: str) -> Any:
        user_id, checked = await self._asked(thread_id, run_id)
        brought.query(Nothing)
        return jsonify(self._told(await self._record(user_id, thread_id, checked)))

    async def cancel(self, thread_id: str, run_id: str) -> Any:
        """Stop a run; with `wait`, the answer comes once it has ended, with its receipt."""
        user_id, checked = await self._asked(thread_id, run_id)
        how = brought.query(Cancelling)
        if how.action == "rollback":
            problem = (
                "a run that is cancelled stays in its thread's history: rollback cannot be done "
                "here, only interrupt"
            )
            raise brought.UnfitError([("action", problem)], part="query")
        run = self._supervisor.find(user_id, checked)
        if run is None or run.thread_id != thread_id:
            record = await self._record(user_id, thread_id, checked)
            return jsonify(run_id=record.run_id, status=record.status, receipt=record.receipt)
        run.cancel("user")
        if how.wait:
            with trio.move_on_after(self._longest_wait):
                return await self._ended(run)
        return jsonify(run_id=run.run_id, status="cancelling"), HTTPStatus.ACCEPTED

    async def _ended(self, run: Run) -> Any:
        outcome = await run.concluded()
        receipt = outcome.receipt.to_dict()
        return jsonify(run_id=run.run_id, status=outcome.status, receipt=receipt)

    async def _asked(self, thread_id: str, run_id: str) -> tuple[UserId, RunId]:
        """Who asks for which run. Raises InvalidContextError for ids that can be none."""
        user_id = current_user(self._auth)
        await self._finder.thread_id(user_id, thread_id)
        return user_id, await self._finder.run_id(user_id, run_id)

    async def _record(self, user_id: UserId, thread_id: str, run_id: RunId) -> RunRecord:
        """A run of the user's, on that thread. Raises UnknownRunError."""
        record = await self._store.run(user_id, run_id)
        if record is None or record.thread_id != thread_id:
            raise self._finder.no_such_run(user_id, run_id)
        return record

    def _told(self, record: RunRecord) -> dict[str, Any]:
        run = self._supervisor.find(record.user_id, record.run_id)
        return sdk_run(record, live=None if run is None else run.tree())
