"""How the core's records stand in rows, and come back out of them."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date, datetime
from typing import Any, Final

import msgspec
from sqlalchemy import RowMapping

from creche import (
    Commit,
    QuestionRecord,
    RunId,
    RunRecord,
    Spending,
    StoredMessage,
    ThreadRecord,
    decode_message,
    encode_message,
    role_of,
    text_of,
)

Row = dict[str, Any]


_QUESTION_FIELDS: Final = tuple(QuestionRecord.__dataclass_fields__)
_RUN_FIELDS: Final = tuple(RunRecord.__dataclass_fields__)
_THREAD_FIELDS: Final = tuple(ThreadRecord.__dataclass_fields__)


def thread_row(commit: Commit, moment: datetime) -> Row:
    """The thread that a commit opens."""
    assert commit.opens is not None
    return {
        "user_id": commit.user_id,
        "thread_id": commit.thread_id,
        "title": without_nul(commit.opens.title),
        "epoch": commit.opens.epoch,
        "last_seq": 0,
        "created_at": moment,
        "updated_at": moment,
    }


def touch_row(commit: Commit, moment: datetime) -> Row:
    """What a commit changes of its thread."""
    return {
        "owner": commit.user_id,
        "thread": commit.thread_id,
        "moment": moment,
        "seq": commit.chunk.last_seq if commit.chunk is not None else None,
        "new_epoch": commit.epoch,
    }


def run_row(run: RunRecord) -> Row:
    """A run as it stands."""
    row = {name: getattr(run, name) for name in _RUN_FIELDS}
    if run.reason is not None:
        row["reason"] = without_nul(run.reason)
    return row


def question_row(question: QuestionRecord) -> Row:
    """A question as it stands."""
    row = {name: getattr(question, name) for name in _QUESTION_FIELDS}
    for name in ("prompt", "tool_name", "tool_call_id", "arguments"):
        if row[name] is not None:
            row[name] = without_nul(row[name])
    row["schema"] = msgspec.json.encode(question.schema)
    return row


def rolled_back_rows(commit: Commit) -> Iterator[Row]:
    """Which runs a commit takes back."""
    for run_id in commit.rolls_back:
        yield {"owner": commit.user_id, "thread": commit.thread_id, "run": run_id}


def message_row(commit: Commit, stored: StoredMessage) -> Row:
    """A message, with the words in it for the search."""
    return {
        "user_id": commit.user_id,
        "thread_id": commit.thread_id,
        "run_id": stored.run_id,
        "role": role_of(stored.message),
        "words": without_nul(text_of(stored.message)),
        "data": encode_message(stored.message),
        "created_at": stored.created_at,
    }


def chunk_row(commit: Commit) -> Row:
    """The log entries of a commit."""
    assert commit.chunk is not None
    return {
        "user_id": commit.user_id,
        "thread_id": commit.thread_id,
        "first_seq": commit.chunk.first_seq,
        "last_seq": commit.chunk.last_seq,
        "data": commit.chunk.data,
    }


def spending_row(commit: Commit, day: date, spent: Spending) -> Row:
    """What a commit adds to its user's day."""
    return {
        "user_id": commit.user_id,
        "day": day,
        "tokens": spent.tokens,
        "micro_usd": spent.micro_usd,
        "tool_calls": spent.tool_calls,
    }


def thread_of(row: RowMapping) -> ThreadRecord:
    """A thread's record."""
    return ThreadRecord(**{name: row[name] for name in _THREAD_FIELDS})


def run_of(row: RowMapping) -> RunRecord:
    """A run's record."""
    return RunRecord(**{name: row[name] for name in _RUN_FIELDS})


def question_of(row: RowMapping) -> QuestionRecord:
    """A question's record."""
    fields = {name: row[name] for name in _QUESTION_FIELDS}
    fields["schema"] = msgspec.json.decode(fields["schema"])
    return QuestionRecord(**fields)


def message_of(row: RowMapping) -> StoredMessage:
    """A message and whose it is."""
    return StoredMessage(
        run_id=RunId(row["run_id"]),
        message=decode_message(row["data"]),
        created_at=row["created_at"],
    )


def without_nul(text: str) -> str:
    """PostgreSQL's text has no NUL; what is searched and shown can do without."""
    return text.replace("\0", "")
