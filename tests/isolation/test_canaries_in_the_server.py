"""A hundred users with secrets on one real server: sockets, HTTP, rows, logs, spans, files."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import random
import re
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2
import msgspec
import pytest
import trio
from tests.isolation.canaries import (
    HIDDEN,
    PAYLOAD,
    Finding,
    canary,
    owner_of,
    search_record,
    strangers,
)
from tests.isolation.cast import STAGE, STEPS, Actor, Script, Stage
from tests.isolation.checks import INSIDE, wrong_in_log
from tests.isolation.mutants import MUTANTS, replaced
from tests.isolation.story import SHARED_THREAD, captured_logs
from tests.server.collecting import Collector, open_collector
from tests.server.running import Chat, CommandError, Server, asking, open_server

from creche import AuditRecord, SecurityAudit
from creche_server import websocket
from creche_server.telemetry import configure_logging
from creche_server.wire import replies

USERS = 100
RUNS = 10  # of each
MARK = "0"
# The server's model does not know our scripts.
OWN_STEPS = tuple(step for step in STEPS if step != "asks")


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("CRECHE_", "OTEL_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


class Client:
    """One user's clients, and all that ever reached them."""

    def __init__(self, server: Server, number: int, users: int) -> None:
        self.server = server
        self.users = users
        self.user = f"user-{number}"
        self.owner = str(number)
        self.chance = random.Random(number)
        self.received: list[str] = []
        self.findings: list[Finding] = []
        self.threads = [SHARED_THREAD, canary(self.owner, "thread", MARK)]

    async def live(self) -> None:
        async with self.server.http(self.user) as http:
            await self._chat(http)
            await self._ask_by_http(http)

    async def _chat(self, http: httpx2.AsyncClient) -> None:
        """Ten runs over a few connections, each of which may end in the middle of something."""
        left = RUNS
        seen = dict.fromkeys(self.threads, 0)
        while left:
            thread = self.chance.choice(self.threads)
            async with self.server.chat(thread, self.user) as chat:
                subscription = (await chat.subscribe(since=seen[thread]))["subscription_id"]
                started = [
                    await self._start(chat) for _ in range(min(left, self.chance.randrange(1, 5)))
                ]
                left -= len(started)
                if self.chance.random() < 0.3:
                    await self._pry(chat, http)
                if left == 0 or self.chance.random() < 0.5:
                    # What was cut off before is owed to this connection, from where it was.
                    for run_id in started:
                        await self._finished(chat, run_id)
                if self.chance.random() < 0.2:
                    await self._stop_listening(chat, subscription)
            self.received += chat.frames
            self._check_order(chat, seen[thread])
            seen[thread] = max([seen[thread], *(event["seq"] for event in chat.events)])

    async def _start(self, chat: Chat) -> str:
        end = self.chance.choice(["done", "done", "fails", "told", "hangs"])
        steps = tuple(self.chance.choices(OWN_STEPS, k=self.chance.randrange(1, 4)))
        secret = canary(self.owner, "message", MARK)
        words = msgspec.json.encode(Script(secret, steps, end)).decode()
        run_id = await chat.start(words, "actor")
        if end == "hangs":
            wait = self.chance.random() < 0.5
            await chat.ask("run.cancel", run_id=run_id, wait=wait)
        elif self.chance.random() < 0.3:
            await self._finished(chat, run_id)
        return run_id

    async def _finished(self, chat: Chat, run_id: str) -> None:
        try:
            await chat.finished(run_id)
        except AssertionError as error:
            self.findings.append(Finding("delivery", str(error)))

    async def _stop_listening(self, chat: Chat, subscription: str) -> None:
        """Unsubscribe: what happens from then on is not for this connection."""
        await chat.ask("subscription.unsubscribe", subscription_id=subscription)
        had = len(chat.events)
        words = msgspec.json.encode(Script("quiet", ("says",), "hangs")).decode()
        run_id = await chat.start(words, "actor")
        await chat.ask("run.cancel", run_id=run_id, wait=True)
        if len(chat.events) > had:
            self.findings.append(Finding("subscription", f"{self.user} is still sent events"))
        del chat.events[had:]

    async def _pry(self, chat: Chat, http: httpx2.AsyncClient) -> None:
        """Ask for what another user has, by its very name."""
        victim = str((int(self.owner) + 1) % self.users)
        thread = canary(victim, "thread", MARK)
        with pytest.raises(CommandError):
            await chat.ask("run.cancel", run_id=canary(victim, "run", MARK), wait=True)
        with pytest.raises(CommandError):
            await chat.ask("run.start", **asking("hello", "nobody"))
        path = f"/threads/{thread}"
        for answer in (
            await http.get(path),
            await http.get(f"{path}/state"),
            await http.get(f"{path}/history"),
            await http.delete(path),
        ):
            if answer.status_code not in {404, 405}:
                self.findings.append(Finding("foreign ids", f"{self.user} gets {path}"))
            # What it asked for itself may be named to it, nothing else.
            self.received.append(answer.text.replace(thread, ""))
        async with self.server.chat(thread, self.user) as other:
            await other.subscribe(since=0)
            await trio.sleep(0.01)
            self.received += other.frames

    async def _ask_by_http(self, http: httpx2.AsyncClient) -> None:
        for path in ("/threads", *(f"/threads/{quote(t, safe='')}/state" for t in self.threads)):
            self.received.append((await http.get(path)).text)
        self.received.append((await http.get("/threads", params={"limit": "x"})).text)

    def _check_order(self, chat: Chat, since: int) -> None:
        seqs = [event["seq"] for event in chat.events]
        if seqs != [*range(since + 1, since + 1 + len(seqs))]:
            self.findings.append(Finding("gaps", f"{self.user} had {seqs} after {since}"))


def rows_of(database: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(table, row) of every row of every table that there is."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.row_factory = sqlite3.Row
        tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        for (table,) in tables.fetchall():
            for row in connection.execute(f"SELECT * FROM {table}"):
                yield table, dict(row)


def wrong_in_rows(database: Path) -> Iterator[Finding]:
    logs: dict[tuple[str, str], dict[int, bytes]] = {}
    runs: dict[tuple[str, str], set[str]] = {}
    for table, row in rows_of(database):
        text = " ".join(
            value.decode() if isinstance(value, bytes) else str(value) for value in row.values()
        )
        owner = owner_of(row["user_id"]) if "user_id" in row else None
        for found in strangers(text, owner, MARK, forbidden=INSIDE):
            yield Finding("canary in rows", f"{table} {row.get('user_id')}: {found}")
        if table in {"runs", "chunks"}:
            key = (row["user_id"], row["thread_id"])
            logs.setdefault(key, {})
            if table == "runs":
                runs.setdefault(key, set()).add(row["run_id"])
            else:
                logs[key][row["first_seq"]] = row["data"]
    for key, chunks in logs.items():
        lines = [line for _, data in sorted(chunks.items()) for line in data.split(b"\n")]
        yield from wrong_in_log(str(key), lines, runs.get(key, set()))


def wrong_in_files(data: Path) -> Iterator[Finding]:
    """Beside the database and the audit, no file has a word of what users say."""
    for path in data.rglob("*"):
        beside = path.is_file() and not path.name.startswith(("creche.db", "audit.jsonl"))
        if beside and b"canary-" in path.read_bytes():
            yield Finding("canary in files", str(path))


def wrong_in_audit(path: Path) -> Iterator[Finding]:
    """Ids are named there, to the one who asked for them even another's; no payload is."""
    for line in path.read_text().splitlines():
        record = msgspec.json.decode(line, type=AuditRecord)
        owner = record.user and owner_of(record.user)
        rest = repr(msgspec.structs.replace(record, resource=""))
        named = re.sub(r"canary-\d+-(thread|run)-\d+", "", record.resource)
        for found in strangers(f"{rest} {named}", owner, MARK, forbidden=PAYLOAD):
            yield Finding("canary in audit", f"{record.kind} of {record.user} has {found}")
        if record.kind not in {"thread_mismatch", "run_mismatch", "limit_hit"}:
            yield Finding("audit", f"{record.kind}: {record.user}, {record.claimed_owner}")


def wrong_in_logs(records: list[logging.LogRecord]) -> Iterator[Finding]:
    """As the process has them, and as its own handler writes them."""
    written = io.StringIO()
    with captured_logs():
        configure_logging("debug", written)
        (handler,) = logging.getLogger().handlers
        for record in records:
            if record.name.startswith("creche") or record.levelno >= logging.WARNING:
                for found in search_record(record, MARK):
                    yield Finding("canary in logs", f"{record.name}: {found}")
                handler.handle(record)
    for line in written.getvalue().splitlines():
        user = msgspec.json.decode(line).get("user_id")
        for found in strangers(line, user and owner_of(user), MARK, forbidden={HIDDEN, "message"}):
            yield Finding("canary in logs", f"{found} in {line[:200]}")


def wrong_in_spans(collector: Collector) -> Iterator[Finding]:
    """As a collector has them: whose a span is may be in it, and nothing that anybody says."""
    spans = {received.span.span_id: received for received in collector.spans}
    for received in spans.values():
        user = received.attributes["creche.user_id"]
        for found in strangers(str(received.span), owner_of(user), MARK, forbidden=PAYLOAD):
            yield Finding("canary in spans", f"{user}'s {received.span.name} has {found}")
        around = spans.get(received.span.parent_span_id)
        if around is not None and around.attributes["creche.user_id"] != user:
            yield Finding("spans", f"{user}'s {received.span.name} is in another's")
    sent = b"".join(collector.bodies).decode(errors="replace")
    for place in PAYLOAD:
        if re.search(rf"canary-\d+-{place}-", sent):
            yield Finding("canary in spans", f"a canary of a {place} was sent")


async def play(data: Path, users: int) -> list[Finding]:
    """Let so many users live on a server of their own; returns all that is wrong afterwards."""
    stage = Stage()
    STAGE.set(stage)
    clients: list[Client] = []
    with captured_logs() as records, open_collector() as collector:
        opened = open_server(data, {"actor": Actor}, otlp_endpoint=collector.url)
        async with opened as server:
            clients.extend(Client(server, number, users) for number in range(users))
            with trio.fail_after(100):
                async with trio.open_nursery() as nursery:
                    for client in clients:
                        nursery.start_soon(client.live)
            await server.shut_down()
    findings = [
        *(Finding("canary in agents", what) for what in stage.mixed_up),
        *wrong_in_rows(data / "creche.db"),
        *wrong_in_files(data),
        *wrong_in_audit(data / "audit.jsonl"),
        *wrong_in_logs(records),
        *wrong_in_spans(collector),
    ]
    told = {received.attributes["creche.user_id"] for received in collector.spans}
    findings += [
        Finding("spans", f"there are none of {client.user}")
        for client in clients
        if client.user not in told
    ]
    for client in clients:
        text = "\n".join(client.received)
        if f"canary-{client.owner}-message" not in text:
            findings.append(Finding("delivery", f"{client.user} had nothing of its own"))
        findings += [
            Finding("canary in frames", f"{client.user} was sent {found}")
            for found in strangers(text, client.owner, MARK, forbidden=INSIDE)
        ]
        findings += client.findings
    for user, run_id, given in stage.seen:
        found = strangers(given, owner_of(user), MARK, forbidden=())
        findings += [Finding("canary in agents", f"{run_id}: {what}") for what in found]
    assert records, "nothing was captured"
    return findings


async def test_a_hundred_users_with_secrets_share_a_server_and_never_meet(tmp_path: Path):
    assert await play(tmp_path / "data", USERS) == []
    runs = [row for table, row in rows_of(tmp_path / "data/creche.db") if table == "runs"]
    assert len(runs) >= USERS * RUNS
    assert {row["status"] for row in runs} == {"success", "failed", "cancelled"}


def whoever_connected_last() -> contextlib.AbstractContextManager[None]:
    """Who speaks is looked up in a slot, not taken from the socket's own token."""
    slot: dict[str, Any] = {}

    def change(original: Any) -> Any:
        def admit(*rest: Any) -> Any:
            user_id, thread_id = original(*rest)
            before = slot.get("user", user_id)
            slot["user"] = user_id
            return before, thread_id

        return admit

    return replaced(websocket, "admit", change)


def unsubscribed_and_still_sent() -> contextlib.AbstractContextManager[None]:
    """A subscription that survives its end."""

    def change(_: Any) -> Any:
        def unsubscribe(self: Any, command_id: int, command: Any) -> None:
            del command
            self._reply(replies.success(command_id, {}))

        return unsubscribe

    return replaced(websocket.ChatClient, "_unsubscribe", change)


def audited_with_what_was_said() -> contextlib.AbstractContextManager[None]:
    """A refusal is audited together with words of whom it was refused to."""

    def change(original: Any) -> Any:
        def added(self: SecurityAudit, key: Any, outcome: str, *rest: Any) -> Any:
            said = canary(owner_of(key.user or ""), "message", MARK)
            return original(self, key, f"{outcome}: {said}", *rest)

        return added

    return replaced(SecurityAudit, "_added", change)


@pytest.mark.parametrize(
    ("planting", "check"),
    [
        (audited_with_what_was_said, "canary in audit"),
        (whoever_connected_last, "canary in frames"),
        (unsubscribed_and_still_sent, "subscription"),
        (MUTANTS["payload logged"], "canary in logs"),
        (MUTANTS["redaction off"], "canary in rows"),
        (MUTANTS["span carries the tools arguments"], "canary in spans"),
        (MUTANTS["span within the one that began last"], "spans"),
        (MUTANTS["failure told as it is"], "canary in frames"),
        (MUTANTS["terminal said twice"], "terminal count"),
        (MUTANTS["agent class attribute written by runs"], "canary in rows"),
    ],
)
async def test_a_leak_planted_in_a_server_is_caught(
    planting: Callable[[], contextlib.AbstractContextManager[None]],
    check: str,
    tmp_path: Path,
):
    with planting():
        findings = await play(tmp_path / "data", 8)
    assert check in {finding.check for finding in findings}


async def test_a_few_users_without_a_leak_are_clean(tmp_path: Path):
    assert await play(tmp_path / "data", 8) == []
