"""The questions that the store asks, made once: SQLAlchemy takes longer to make one than to run it.

Every one names the owner, but the one for the runs that a dead process left, and the one whether
an id is somebody else's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any, Final

from sqlalchemy import (
    BindParameter,
    Insert,
    Select,
    Table,
    bindparam,
    exists,
    false,
    func,
    select,
    true,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from creche_server.database.tables import chunks, messages, questions, runs, spending, threads

# Both spell "on conflict" alike; SQLAlchemy has no common class for them.
DialectInsert = Callable[[Table], postgresql.Insert] | Callable[[Table], sqlite.Insert]


def given(name: str) -> BindParameter[Any]:
    """A value that comes with each row."""
    return bindparam(name)


_RUNS_OF_IT: Final = (
    select(func.count())
    .where(runs.c.user_id == threads.c.user_id, runs.c.thread_id == threads.c.thread_id)
    .scalar_subquery()
    .label("runs")
)
THREAD: Final = select(threads, _RUNS_OF_IT).where(
    threads.c.user_id == given("user"),
    threads.c.thread_id == given("thread"),
)
THREADS: Final = (
    select(threads, _RUNS_OF_IT)
    .where(threads.c.user_id == given("user"))
    .order_by(threads.c.updated_at.desc(), threads.c.thread_id.desc())
    .limit(given("most"))
    .offset(given("skipped"))
)
RUNS: Final = (
    select(runs)
    .where(runs.c.user_id == given("user"), runs.c.thread_id == given("thread"))
    .order_by(runs.c.id)
)
RUN: Final = select(runs).where(runs.c.user_id == given("user"), runs.c.run_id == given("run"))
MESSAGES: Final = (
    select(messages.c.run_id, messages.c.data, messages.c.created_at)
    .join(runs, (runs.c.user_id == messages.c.user_id) & (runs.c.run_id == messages.c.run_id))
    .where(
        messages.c.user_id == given("user"),
        messages.c.thread_id == given("thread"),
        runs.c.rolled_back.is_(false()),
    )
    .order_by(runs.c.id, messages.c.id)
)
OLDEST_OF_THE_LATEST: Final = (
    select(runs.c.id)
    .where(
        runs.c.user_id == given("user"),
        runs.c.thread_id == given("thread"),
        runs.c.rolled_back.is_(false()),
    )
    .order_by(runs.c.id.desc())
    .offset(given("skipped"))
    .limit(1)
)
LATEST_MESSAGES: Final = MESSAGES.where(
    # A thread with fewer runs has no such one, and keeps them all.
    runs.c.id >= func.coalesce(OLDEST_OF_THE_LATEST.scalar_subquery(), 0),
)
CHUNKS: Final = (
    select(chunks.c.first_seq, chunks.c.last_seq, chunks.c.data)
    .where(
        chunks.c.user_id == given("user"),
        chunks.c.thread_id == given("thread"),
        chunks.c.last_seq > given("after"),
    )
    .order_by(chunks.c.first_seq)
    .limit(given("most"))
)
SPENDING: Final = select(
    spending.c.tokens,
    spending.c.micro_usd,
    spending.c.tool_calls,
).where(spending.c.user_id == given("user"), spending.c.day == given("day"))
OPEN_QUESTIONS: Final = (
    select(questions)
    .where(
        questions.c.user_id == given("user"),
        questions.c.thread_id == given("thread"),
        questions.c.status == "open",
    )
    .order_by(questions.c.id)
)
QUESTION: Final = select(questions).where(
    questions.c.user_id == given("user"),
    questions.c.question_id == given("question"),
)
UNFINISHED_RUNS: Final = select(runs).where(runs.c.last_seq.is_(None)).order_by(runs.c.id)
_THREAD_OF_ANOTHER: Final = exists().where(
    threads.c.thread_id == given("wanted"),
    threads.c.user_id != given("asking"),
)
_RUN_OF_ANOTHER: Final = exists().where(
    runs.c.run_id == given("wanted"),
    runs.c.user_id != given("asking"),
)
_QUESTION_OF_ANOTHER: Final = exists().where(
    questions.c.question_id == given("wanted"),
    questions.c.user_id != given("asking"),
)
# {kind of id: the question}; on PostgreSQL it goes through the wall by a function.
OF_ANOTHER: Final = MappingProxyType(
    {
        "thread": select(_THREAD_OF_ANOTHER),
        "run": select(_RUN_OF_ANOTHER),
        "question": select(_QUESTION_OF_ANOTHER),
    },
)
OF_ANOTHER_BEHIND_THE_WALL: Final = MappingProxyType(
    {
        "thread": select(func.threads_of_another(given("wanted"), given("asking"))),
        "run": select(func.runs_of_another(given("wanted"), given("asking"))),
        "question": select(func.questions_of_another(given("wanted"), given("asking"))),
    },
)
ROLL_BACK: Final = (
    update(runs)
    .where(
        runs.c.user_id == given("owner"),
        runs.c.thread_id == given("thread"),
        runs.c.run_id == given("run"),
    )
    .values(rolled_back=true())
)
TOUCH_THREADS: Final = (
    update(threads)
    .where(threads.c.user_id == given("owner"), threads.c.thread_id == given("thread"))
    .values(
        updated_at=given("moment"),
        last_seq=func.coalesce(given("seq"), threads.c.last_seq),
        epoch=func.coalesce(given("new_epoch"), threads.c.epoch),
    )
)

# What changes of a run after it was first written; that it is rolled back is no record's to say.
_RUN_CHANGES: Final = (
    "status",
    "started_at",
    "ended_at",
    "first_seq",
    "last_seq",
    "reason",
    "receipt",
)


def containing(words: Sequence[str]) -> Select[*tuple[Any, ...]]:
    """A user's messages that contain all these words, in small letters."""
    undone = exists().where(
        runs.c.user_id == messages.c.user_id,
        runs.c.run_id == messages.c.run_id,
        runs.c.rolled_back.is_(true()),
    )
    return (
        select(messages)
        .where(
            messages.c.user_id == given("user"),
            ~undone,
            *(func.lower(messages.c.words).contains(word, autoescape=True) for word in words),
        )
        .order_by(messages.c.id.desc())
        .limit(given("most"))
    )


def open_threads(dialect_insert: DialectInsert) -> Insert:
    """Make threads; of one that is there, only a missing title is filled in."""
    opening = dialect_insert(threads)
    return opening.on_conflict_do_update(
        index_elements=[threads.c.user_id, threads.c.thread_id],
        set_={"title": opening.excluded.title},
        where=threads.c.title == "",
    )


def record_runs(dialect_insert: DialectInsert) -> Insert:
    """Write runs as they stand now."""
    recording = dialect_insert(runs)
    return recording.on_conflict_do_update(
        index_elements=[runs.c.user_id, runs.c.run_id],
        set_={name: recording.excluded[name] for name in _RUN_CHANGES},
    )


def add_spending(dialect_insert: DialectInsert) -> Insert:
    """Add to what users spent on a day."""
    adding = dialect_insert(spending)
    return adding.on_conflict_do_update(
        index_elements=[spending.c.user_id, spending.c.day],
        set_={
            name: spending.c[name] + adding.excluded[name]
            for name in ("tokens", "micro_usd", "tool_calls")
        },
    )


def record_questions(dialect_insert: DialectInsert) -> Insert:
    """Write questions as they stand now."""
    recording = dialect_insert(questions)
    return recording.on_conflict_do_update(
        index_elements=[questions.c.user_id, questions.c.question_id],
        set_={name: recording.excluded[name] for name in ("status", "closed_at")},
    )
