"""What a dead process left behind is ended once, with a history that a model accepts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import timedelta

import pytest
import trio
from tests.agui_rules import StockClient, check_history
from tests.small_world import (
    ADA,
    BOB,
    THREAD,
    context,
    hang,
    infrastructure,
    log_of,
    terminals_of,
    types_of,
)
from trio.testing import MockClock

from creche import (
    Chunk,
    Commit,
    MemoryStore,
    MessageId,
    NewThread,
    RunId,
    RunRecord,
    RunStatus,
    StoredMessage,
    ThreadId,
    ToolCallId,
    UserId,
    UserMessage,
    end_lost_runs,
    events,
    open_supervisor,
)
from creche._events import encode_event
from creche._store import now

UNENDED: tuple[RunStatus, ...] = ("queued", "running")
C = ToolCallId("c-1")
M = MessageId("m-1")


def started(run: str = "run-a") -> events.Event:
    return events.RunStarted(thread_id=THREAD, run_id=RunId(run))


def left(
    said: Sequence[events.Event],
    *,
    run: str = "run-a",
    status: RunStatus = "running",
    user: UserId = ADA,
    first_seq: int = 1,
    minute: int = 0,
) -> Commit:
    """What a process had committed of a run when it died."""
    record = RunRecord(
        user_id=user,
        thread_id=THREAD,
        run_id=RunId(run),
        agent="hello",
        status=status,
        created_at=now() + timedelta(minutes=minute),
        first_seq=first_seq if said else None,
        last_seq=None if status in UNENDED or not said else first_seq + len(said) - 1,
    )
    asked = StoredMessage(
        run_id=RunId(run),
        message=UserMessage(id=MessageId(f"asked-{run}"), content=f"question of {run}"),
        created_at=now(),
    )
    lines = [encode_event(event, first_seq + n) for n, event in enumerate(said)]
    return Commit(
        user_id=user,
        thread_id=THREAD,
        opens=NewThread(title="", epoch="epoch-1"),
        runs=(record,),
        messages=(asked,),
        chunk=Chunk(first_seq=first_seq, last_seq=first_seq + len(said) - 1, data=b"\n".join(lines))
        if said
        else None,
    )


STORIES: dict[str, Sequence[events.Event]] = {
    "queued": [],
    "only begun": [started()],
    "in the middle of a sentence": [
        started(),
        events.TextMessageStart(message_id=M, role="assistant"),
        events.TextMessageContent(message_id=M, delta="half a sen"),
    ],
    "in the arguments of a call": [
        started(),
        events.ToolCallStart(tool_call_id=C, tool_call_name="add"),
        events.ToolCallArgs(tool_call_id=C, delta="{}"),
    ],
    "in a tool": [
        started(),
        events.ToolCallStart(tool_call_id=C, tool_call_name="add", parent_message_id=M),
        events.ToolCallEnd(tool_call_id=C),
    ],
    "in a step of a sub-agent": [
        started(),
        events.SubagentStarted(subagent_run_id="s", name="x"),
        events.StepStarted(step_name="plan", subagent_run_id="s"),
    ],
}


@pytest.mark.parametrize("said", STORIES.values(), ids=STORIES)
async def test_a_lost_run_gets_one_terminal_event_and_a_valid_history(
    said: Sequence[events.Event],
) -> None:
    store = MemoryStore()
    await store.commit([left(said, status="running" if said else "queued")])
    assert await end_lost_runs(store) == 1
    log = await log_of(store)
    client = StockClient()
    client.take_all(log)
    assert client.is_tidy
    (terminal,) = terminals_of(log)
    assert terminal is log[-1]
    assert (terminal["type"], terminal["code"]) == ("RUN_ERROR", "lost")
    assert terminal["metadata"]["creche"]["receipt"]["reason"] == "lost"
    assert types_of(log)[: len(said)] == [event.__struct_config__.tag for event in said]
    (record,) = await store.runs(ADA, THREAD)
    assert (record.status, record.reason) == ("lost", "lost")
    assert (record.first_seq, record.last_seq) == (1, len(log))
    assert record.ended_at is not None
    messages = [item.message for item in await store.messages(ADA, THREAD)]
    check_history(messages)
    assert messages[0].content == "question of run-a"
    thread = await store.thread(ADA, THREAD)
    assert thread is not None
    assert thread.epoch != "epoch-1"
    assert thread.last_seq == len(log)


async def test_what_it_had_said_is_kept() -> None:
    store = MemoryStore()
    await store.commit([left(STORIES["in the middle of a sentence"])])
    await end_lost_runs(store)
    contents = [item.message.content for item in await store.messages(ADA, THREAD)]
    assert contents == ["question of run-a", "half a sen"]


async def test_a_second_time_there_is_nothing_to_end() -> None:
    store = MemoryStore()
    await store.commit([left(STORIES["in a tool"])])
    await end_lost_runs(store)
    log, thread = await log_of(store), await store.thread(ADA, THREAD)
    assert await end_lost_runs(store) == 0
    assert (await log_of(store), await store.thread(ADA, THREAD)) == (log, thread)


async def test_those_that_waited_end_after_the_one_that_ran_in_their_order() -> None:
    store = MemoryStore()
    done = [started("run-0"), events.RunFinished(thread_id=THREAD, run_id=RunId("run-0"))]
    await store.commit([left(done, run="run-0", status="success")])
    await store.commit([left([], run="run-c", status="queued", minute=3)])
    await store.commit([left([], run="run-z", status="queued", minute=2)])
    said = [started("run-m"), *STORIES["in the middle of a sentence"][1:]]
    await store.commit([left(said, run="run-m", first_seq=3, minute=1)])
    assert await end_lost_runs(store) == 3
    log = await log_of(store)
    begun = [event["runId"] for event in log if event["type"] == "RUN_STARTED"]
    assert begun == ["run-0", "run-m", "run-z", "run-c"]
    assert len(terminals_of(log)) == 4
    records = {record.run_id: record for record in await store.runs(ADA, THREAD)}
    assert records[RunId("run-0")].status == "success"
    position = 2
    for run in ("run-m", "run-z", "run-c"):
        record = records[RunId(run)]
        assert record.first_seq == position + 1
        assert record.last_seq is not None
        position = record.last_seq
    assert position == len(log)
    check_history([item.message for item in await store.messages(ADA, THREAD)])


async def test_a_chunk_that_begins_with_another_runs_end_is_read_from_its_own_beginning() -> None:
    store = MemoryStore()
    done = [started("run-0"), events.RunFinished(thread_id=THREAD, run_id=RunId("run-0"))]
    before, after = left(done, run="run-0", status="success"), left(STORIES["in a tool"])
    both = [*done, *STORIES["in a tool"]]
    await store.commit(
        [
            dataclasses.replace(before, chunk=left(both).chunk),
            dataclasses.replace(
                after,
                chunk=None,
                runs=(dataclasses.replace(after.runs[0], first_seq=3),),
            ),
        ],
    )
    await end_lost_runs(store)
    record = await store.run(ADA, RunId("run-a"))
    assert record is not None
    assert (record.status, record.first_seq) == ("lost", 3)
    own = (await log_of(store))[2:]
    assert types_of(own)[-2:] == ["TOOL_CALL_RESULT", "RUN_ERROR"]
    StockClient().take_all(own)
    check_history([item.message for item in await store.messages(ADA, THREAD)])


async def test_every_users_are_ended_and_finished_threads_keep_their_epoch() -> None:
    store = MemoryStore()
    done = [started(), events.RunFinished(thread_id=THREAD, run_id=RunId("run-a"))]
    await store.commit([left(done, status="success"), left(STORIES["only begun"], user=BOB)])
    assert await end_lost_runs(store) == 1
    ours, theirs = await store.thread(ADA, THREAD), await store.thread(BOB, THREAD)
    assert ours is not None
    assert theirs is not None
    assert ours.epoch == "epoch-1"
    assert theirs.epoch != "epoch-1"


async def test_a_log_that_cannot_be_read_does_not_keep_the_others_from_their_end() -> None:
    """One bad row harms only its owner: the server must still start."""
    store = MemoryStore()
    broken = left(STORIES["only begun"])
    assert broken.chunk is not None
    chunk = dataclasses.replace(broken.chunk, data=b'{"type":"FROM_THE_FUTURE","seq":1}')
    await store.commit([dataclasses.replace(broken, chunk=chunk)])
    await store.commit([left(STORIES["only begun"], user=BOB)])
    await end_lost_runs(store)
    (theirs,) = await store.runs(BOB, THREAD)
    assert theirs.status == "lost"


async def test_what_a_process_left_that_died_in_the_middle_is_ended_by_the_next(
    autojump_clock: MockClock,
) -> None:
    """A real run, cut off from its store at a commit of its own choosing."""

    class Dies(MemoryStore):
        commits_left = 3

        async def commit(self, commits: Sequence[Commit]) -> None:
            if self.commits_left == 0:
                raise OSError("the process is dead")
            self.commits_left -= 1
            await super().commit(commits)

    store = Dies()
    async with open_supervisor(infrastructure(store=store, hang=hang)) as supervisor:
        await supervisor.start(context(run="run-a"), "hang", "hi")
        await supervisor.start(context(run="run-b"), "hang", "hi")
        await trio.sleep(1)
    assert len(await store.unfinished_runs()) >= 1
    before = len(await log_of(store))
    store.commits_left = 100
    assert await end_lost_runs(store) >= 1
    log = await log_of(store)
    assert len(log) > before
    assert len(terminals_of(log)) == len(await store.runs(ADA, THREAD))
    assert await store.unfinished_runs() == []
    async with open_supervisor(infrastructure(store=store)) as supervisor:
        run = await supervisor.start(context(run="run-c"), "hello", "and now?")
        with trio.fail_after(5):
            assert (await run.ended()).status == "success"
        assert run.first_seq == len(log) + 1
    check_history([item.message for item in await store.messages(ADA, ThreadId(THREAD))])


async def test_only_what_was_ended_is_counted() -> None:
    class Refuses(MemoryStore):
        refuses = False

        async def commit(self, commits: Sequence[Commit]) -> None:
            if self.refuses and commits[0].user_id == BOB:
                raise OSError("the disk is gone")
            await super().commit(commits)

    store = Refuses()
    await store.commit([left([started()]), left([started()], user=BOB)])
    store.refuses = True
    assert await end_lost_runs(store) == 1
    assert [run.user_id for run in await store.unfinished_runs()] == [BOB]


async def test_a_run_that_was_cancelled_in_the_queue_stays_cancelled() -> None:
    """Somebody was told so, and its events only waited for those of the run before it."""
    store = MemoryStore()
    receipt = {"reason": "user", "elapsed_ms": 0, "run_ms": 0, "tasks_ended": 0}
    called_off = left([], run="run-b", status="cancelled", minute=1)
    called_off = dataclasses.replace(
        called_off,
        runs=tuple(
            dataclasses.replace(run, reason="user", receipt=receipt) for run in called_off.runs
        ),
    )
    await store.commit([left([started()]), called_off])
    assert await end_lost_runs(store) == 2
    log = await log_of(store, ADA)
    assert types_of(log) == ["RUN_STARTED", "RUN_ERROR", "RUN_STARTED", "RUN_FINISHED"]
    assert log[-1]["runId"] == "run-b"
    assert log[-1]["outcome"] == {"type": "cancelled"}
    assert log[-1]["metadata"] == {"creche": {"receipt": receipt}}
    record = await store.run(ADA, RunId("run-b"))
    assert record is not None
    assert (record.status, record.reason) == ("cancelled", "user")
    assert (record.first_seq, record.last_seq) == (3, 4)
    assert await end_lost_runs(store) == 0
