"""Judges what a story left behind: what each check looks for is in its name."""

from __future__ import annotations

import collections
import hashlib
import re
from collections.abc import Collection, Iterable, Iterator
from typing import Any, Final

import msgspec
from tests.agui_rules import RefusedError, StockClient
from tests.isolation.canaries import (
    FAULT,
    HIDDEN,
    PAYLOAD,
    Finding,
    owner_of,
    search_record,
    strangers,
    words_of_error,
)
from tests.isolation.story import Asked, Evidence

from creche import Entry, Run, RunOutcome, SpanStart

TERMINAL: Final = {"RUN_FINISHED", "RUN_ERROR"}
# Never in what others than the model see: nobody but the run's own code is told these.
INSIDE: Final = frozenset({HIDDEN, FAULT, "metadata"})
_CLOCKS: Final = re.compile(
    r'"timestamp":\d+|datetime\.datetime\([^)]*\)|0x[0-9a-f]+|\d{4}-\d\d-\d\dT[\d:.+]+',
)


def findings(evidence: Evidence) -> list[Finding]:
    """Everything that is wrong with a story; empty if it went well."""
    return [finding for check in CHECKS for finding in check(evidence)]


def no_crash(evidence: Evidence) -> Iterator[Finding]:
    """The process lives: nothing but its cancellation comes out of the supervisor's block."""
    if evidence.hung:
        yield Finding("crash", "the story never came to its end")
    if evidence.crash is not None:
        words = "; ".join(words_of_error(evidence.crash))
        yield Finding("crash", words[:500])


def no_canary_in_frames(evidence: Evidence) -> Iterator[Finding]:
    for session in evidence.sessions:
        text = b"\n".join([entry.data for entry in session.entries]).decode()
        owner, mark = owner_of(session.user), evidence.plan.mark
        for found in strangers(text, owner, mark, forbidden=INSIDE):
            yield Finding("canary in frames", f"{session.user} was sent {found}")


def no_canary_in_rows(evidence: Evidence) -> Iterator[Finding]:
    for (user, thread_id), thread in evidence.store._threads.items():
        rows = [repr(thread.record), repr(thread.messages), repr(list(thread.runs.values()))]
        chunks = [chunk.data.decode() for chunk in thread.chunks]
        text = "\n".join([thread_id, *rows, *chunks])
        for found in strangers(text, owner_of(user), evidence.plan.mark, forbidden=INSIDE):
            yield Finding("canary in rows", f"{user}'s {thread_id} has {found}")
        for run in thread.runs.values():
            if (run.user_id, run.thread_id) != (user, thread_id):
                yield Finding("canary in rows", f"{user}'s rows have {run.user_id}'s run")


def no_canary_in_logs(evidence: Evidence) -> Iterator[Finding]:
    for record in evidence.logs:
        for found in search_record(record, evidence.plan.mark):
            yield Finding("canary in logs", f"{record.name} {record.getMessage()!r}: {found}")


def no_canary_in_errors(evidence: Evidence) -> Iterator[Finding]:
    for user, error in evidence.errors:
        for words in words_of_error(error):
            for found in strangers(words, owner_of(user), evidence.plan.mark, forbidden=INSIDE):
                yield Finding("canary in errors", f"{user} was told {found}")


def no_canary_in_returns(evidence: Evidence) -> Iterator[Finding]:
    """What calls gave back to a user, their reprs included, is about that user only."""
    for user, value in evidence.returned:
        text = f"{value!r} {value}"
        for found in strangers(text, owner_of(user), evidence.plan.mark, forbidden=INSIDE):
            yield Finding("canary in returns", f"{user} was given {found}")


def no_canary_in_agents(evidence: Evidence) -> Iterator[Finding]:
    """What an agent is handed is its own user's: history, identity, metadata, its own state."""
    for user, run_id, given in evidence.stage.seen:
        for found in strangers(given, owner_of(user), evidence.plan.mark, forbidden=()):
            yield Finding("canary in agents", f"{user}'s agent in {run_id} was given {found}")
    for mixed_up in evidence.stage.mixed_up:
        yield Finding("canary in agents", mixed_up)


def no_canary_in_spans(evidence: Evidence) -> Iterator[Finding]:
    """A span may name whose it is; what users, agents and tools say is in none."""
    for told in evidence.tracer.spans:
        owner = owner_of(told.started.user_id)
        text = f"{told.started!r} {told.ended!r}"
        for found in strangers(text, owner, evidence.plan.mark, forbidden=PAYLOAD):
            yield Finding("canary in spans", f"{told.started.user_id}'s span has {found}")


def spans_are_whole(evidence: Evidence) -> Iterator[Finding]:
    """Each ends once, before the one around it, which is of the same run; each run has one."""
    for told in evidence.tracer.spans:
        started, around = told.started, told.parent
        if told.ends != 1:
            yield Finding("spans", f"{started} ended {told.ends} times")
        if (started.kind == "run") != (around is None):
            yield Finding("spans", f"{started} is within {around}")
        if around is not None and _run_of(around.started) != _run_of(started):
            yield Finding("spans", f"{started} is within another run's {around.started}")
    ran = collections.Counter(
        _run_of(told.started) for told in evidence.tracer.spans if told.started.kind == "run"
    )
    # The id of a run whose thread was deleted may be had by another.
    handles = [asked.handle for asked in evidence.runs]
    taken = collections.Counter(map(_run_told, handles))
    ended = collections.Counter(_run_told(each) for each in handles if each.outcome is not None)
    for key, count in taken.items():
        if not ended[key] <= ran[key] <= count:
            yield Finding("spans", f"{key} has {ran[key]} spans of a run, of {count} runs")


def _run_told(handle: Run) -> tuple[str, str, str]:
    return handle.user_id, handle.thread_id, handle.run_id


def _run_of(started: SpanStart) -> tuple[str, str, str]:
    return started.user_id, started.thread_id, started.run_id


def no_canary_in_the_audit(evidence: Evidence) -> Iterator[Finding]:
    """Users may be named there, and what they were refused; nothing of what they say."""
    for record in evidence.audited:
        text = f"{record!r}"
        owner = record.user and owner_of(record.user)
        for found in strangers(text, owner, evidence.plan.mark, forbidden=PAYLOAD):
            yield Finding("canary in audit", f"{record.kind} of {record.user} has {found}")


def only_limits_are_audited(evidence: Evidence) -> Iterator[Finding]:
    """Nobody crosses a border in a story, so a mix-up that the audit tells of is creche's own."""
    for record in evidence.audited:
        if record.kind != "limit_hit":
            yield Finding("audit", f"{record.kind}: {record.user}, {record.claimed_owner}")
    for flaw in evidence.audit_flaws:
        yield Finding("audit", f"{flaw.problem} at {flaw.seq}: {flaw.message}")


def nothing_foreign_exists(evidence: Evidence) -> Iterator[Finding]:
    for pried in evidence.pried:
        yield Finding("foreign ids", pried)


def grammar_holds(evidence: Evidence) -> Iterator[Finding]:
    """Each run is in an order that a stock AG-UI client takes, with one terminal, its last."""
    on: dict[tuple[str, str], str] = {}  # {(user, run): its thread}
    for (user, thread_id), thread in evidence.store._threads.items():
        lines = [line for chunk in thread.chunks for line in chunk.lines()]
        yield from wrong_in_log(f"{user} {thread_id}", lines, set(thread.runs))
        for run_id in thread.runs:
            if on.setdefault((user, run_id), thread_id) != thread_id:
                yield Finding("grammar", f"{user} {run_id} is on two threads")


def wrong_in_log(where: str, lines: Iterable[bytes], rows: Collection[str]) -> Iterator[Finding]:
    """What is wrong with a thread's whole log; `rows` are the runs that the store knows of."""
    clients: dict[str, StockClient] = {}
    ends: collections.Counter[str] = collections.Counter()
    current = ""
    for line in lines:
        event: dict[str, Any] = msgspec.json.decode(line)
        if event["type"] == "RUN_STARTED":
            if clients and not ends[current]:
                yield Finding("grammar", f"{where}: {current} has no end")
            current = event["runId"]
            if current in clients:
                yield Finding("grammar", f"{where}: {current} starts twice")
        ends[current] += event["type"] in TERMINAL
        if event.get("runId", current) != current:
            yield Finding("grammar", f"{where}: {current} speaks for another run")
        try:
            clients.setdefault(current, StockClient()).take(event)
        except RefusedError as error:
            yield Finding("grammar", f"{where} {current}: {error}")
    for run_id, client in clients.items():
        if not client.is_tidy:
            yield Finding("grammar", f"{where} {run_id}: something is left open")
        if ends[run_id] != 1:
            yield Finding("terminal count", f"{where} {run_id} has {ends[run_id]} terminals")
    if set(rows) != set(clients):
        yield Finding("terminal count", f"{where}: {set(rows)} ran, {set(clients)} spoke")


def readers_miss_nothing(evidence: Evidence) -> Iterator[Finding]:
    """Each reader had every entry after its `since`, once, and all had the same ones."""
    logs: dict[tuple[str, str, str], dict[int, bytes]] = {}
    for (user, thread_id), thread in evidence.store._threads.items():
        stored: dict[int, bytes] = {}
        for chunk in thread.chunks:
            stored.update(
                zip(range(chunk.first_seq, chunk.last_seq + 1), chunk.lines(), strict=True)
            )
        logs[user, thread_id, thread.record.epoch] = stored
    for session in evidence.sessions:
        known = logs.setdefault((session.user, session.thread, session.epoch), {})
        for due, entry in enumerate(session.entries, session.after + 1):
            if entry.seq != due:
                yield Finding("gaps", f"{session.user} {session.thread}: {entry.seq} for {due}")
            elif known.setdefault(due, entry.data) != entry.data:
                yield Finding("gaps", f"{session.user} {session.thread}: two entries {due}")


def ends_are_their_own(evidence: Evidence) -> Iterator[Finding]:
    """A run ends as its script has it, or as its own user, or the end of the process, wanted."""
    for asked in evidence.runs:
        outcome = asked.handle.outcome
        if asked.refused:
            continue
        if outcome is None:
            if "shutdown" not in asked.may_be_cancelled or not evidence.plan.refused:
                yield Finding("ends", f"{asked.user} {asked.run_id} never ended")
        else:
            yield from _own_end(asked, outcome)


def _own_end(asked: Asked, outcome: RunOutcome) -> Iterator[Finding]:
    who = f"{asked.user} {asked.run_id}"
    if outcome.status == "cancelled":
        if outcome.receipt.reason not in asked.may_be_cancelled:
            yield Finding("ends", f"{who} was cancelled ({outcome.receipt.reason}) by nobody")
        return
    expected = {"done": "success", "hangs": "cancelled"}.get(asked.script.end, "failed")
    if outcome.receipt.reason == "isolation_violation":
        yield Finding("isolation violation", f"{who}: {outcome.message}")
    elif outcome.status != expected:
        yield Finding("ends", f"{who} is {outcome.status}, not {expected}: {outcome}")
    wanted = {"secret": asked.script.secret} if asked.agent == "actor" else None
    if outcome.status == "success" and outcome.result != wanted:
        yield Finding("ends", f"{who} returned {outcome.result}")


def what_is_said_arrives(evidence: Evidence) -> Iterator[Finding]:
    """Each run's own words are in its own thread's log, where there still is one."""
    for asked in evidence.runs:
        thread = evidence.store._threads.get((asked.handle.user_id, asked.handle.thread_id))
        row = thread.runs.get(asked.handle.run_id) if thread else None
        if thread is None or row is None or asked.deleted:
            if not asked.refused and not asked.deleted:
                yield Finding("delivery", f"{asked.user} {asked.run_id} has no row")
            continue
        outcome = asked.handle.outcome
        if outcome is not None and row.status != outcome.status:
            yield Finding("delivery", f"{asked.run_id} is {row.status}, told {outcome.status}")
        if not any(asked.script.secret.encode() in chunk.data for chunk in thread.chunks):
            yield Finding(
                "delivery", f"{asked.user} {asked.run_id}: what it was asked is not there"
            )


def nothing_is_left(evidence: Evidence) -> Iterator[Finding]:
    """No run is listed, no journal is live, and the task tree is what it was."""
    for what, count in (
        ("runs listed", evidence.runs_left),
        ("journals live", evidence.journals_left),
        ("tasks more than before", evidence.tasks_more),
    ):
        if count:
            yield Finding("left over", f"{count} {what}")


CHECKS: Final = (
    no_crash,
    no_canary_in_frames,
    no_canary_in_rows,
    no_canary_in_logs,
    no_canary_in_errors,
    no_canary_in_returns,
    no_canary_in_agents,
    no_canary_in_spans,
    spans_are_whole,
    no_canary_in_the_audit,
    only_limits_are_audited,
    nothing_foreign_exists,
    grammar_holds,
    readers_miss_nothing,
    ends_are_their_own,
    what_is_said_arrives,
    nothing_is_left,
)


def whole_log(evidence: Evidence) -> str:
    """Everything that a story left behind, in words that are the same whenever it is the same."""
    parts: list[object] = [*evidence.stage.trace, *evidence.stage.seen]
    for session in evidence.sessions:
        parts += [session.user, session.after, *map(_data, session.entries)]
    parts += [(user, repr(value)) for user, value in evidence.returned]
    parts += [(user, repr(error)) for user, error in evidence.errors]
    parts += [(record.name, record.getMessage()) for record in evidence.logs]
    parts += [(each.kind, each.user, each.resource, each.count) for each in evidence.audited]
    parts += [(key, repr(thread)) for key, thread in evidence.store._threads.items()]
    return _CLOCKS.sub("", "\n".join(map(str, parts)))


def _data(entry: Entry) -> bytes:
    return entry.data


def order_of(evidence: Evidence) -> bytes:
    """A hash of who did what in which order: equal for two stories that took the same course."""
    trace = "\n".join(evidence.stage.trace).replace(f"-{evidence.plan.mark}", "")
    return hashlib.sha1(trace.encode(), usedforsecurity=False).digest()
