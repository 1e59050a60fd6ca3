"""AG-UI's and the model providers' rules, written a second time to check ours against.

`StockClient` judges a stream as the stock client does (`@ag-ui/client` 1.0, `verifyEvents`, and
docs.ag-ui.com, "Events"); it reads the JSON and shares nothing with `creche`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from creche import Message


class RefusedError(Exception):
    """A stock client, or a provider, would not take this."""


_OPENERS = {
    "TEXT_MESSAGE_START": ("message", "messageId"),
    "TOOL_CALL_START": ("call", "toolCallId"),
    "REASONING_START": ("span", "messageId"),
    "REASONING_MESSAGE_START": ("reasoning", "messageId"),
}
_PARTS = {
    "TEXT_MESSAGE_CONTENT": ("message", "messageId"),
    "TOOL_CALL_ARGS": ("call", "toolCallId"),
    "REASONING_MESSAGE_CONTENT": ("reasoning", "messageId"),
}
_CLOSERS = {
    "TEXT_MESSAGE_END": ("message", "messageId"),
    "TOOL_CALL_END": ("call", "toolCallId"),
    "REASONING_END": ("span", "messageId"),
    "REASONING_MESSAGE_END": ("reasoning", "messageId"),
}
# A span of reasoning and the message in it may share an id, and then share the owner.
_OWNER_KIND = {"message": "message", "call": "call", "span": "thought", "reasoning": "thought"}


class StockClient:
    """Takes one run's events in turn and raises RefusedError at the first that it refuses.

    A run that was interrupted may go on, in as many stock runs as it takes.
    """

    def __init__(self) -> None:
        self.state = "before"  # then running, then finished or failed, or parked and running
        self.open: set[tuple[str, Any]] = set()
        self.owners: dict[tuple[str, str], str | None] = {}
        self.subagents: dict[str, bool] = {}  # {id: whether it is still active}
        self.results: dict[str, int] = {}  # {tool call id: results so far}

    @property
    def is_tidy(self) -> bool:
        """Whether nothing is open and every tool call has had its one result."""
        called = {key for kind, key in self.owners if kind == "call"}
        return (
            not self.open
            and not any(self.subagents.values())
            and set(self.results) == called
            and set(self.results.values()) <= {1}
        )

    def take_all(self, events: Iterable[Mapping[str, Any]]) -> None:
        for event in events:
            self.take(event)

    def take(self, event: Mapping[str, Any]) -> None:
        kind = event["type"]
        if "subagentRunId" in event and event["subagentRunId"] is None:
            raise RefusedError("subagentRunId is null")
        if kind == "RUN_STARTED":
            self._need(self.state in {"before", "parked"}, "a second RUN_STARTED")
            # What comes after an interrupt is another run: only calls and their results span both.
            self.subagents = {}
            self.owners = {key: owner for key, owner in self.owners.items() if key[0] == "call"}
            self.state = "running"
        elif kind == "RUN_ERROR":
            self._need(self.state != "failed", "an event after RUN_ERROR")
            self.state = "failed"
        else:
            self._need(self.state == "running", f"{kind} {self.state}")
            self._within(kind, event)

    def _within(self, kind: str, event: Mapping[str, Any]) -> None:
        owner = event.get("subagentRunId")
        if kind == "RUN_FINISHED":
            self._need(not self.open, f"RUN_FINISHED while {self.open} is open")
            active = [name for name, alive in self.subagents.items() if alive]
            self._need(not active, f"RUN_FINISHED while {active} are active")
            interrupted = (event.get("outcome") or {}).get("type") == "interrupt"
            self.state = "parked" if interrupted else "finished"
        elif kind in _OPENERS:
            bracket, field = _OPENERS[kind]
            key = event[field]
            self._need((bracket, key) not in self.open, f"{bracket} {key} is open already")
            if kind == "TOOL_CALL_START" and event.get("parentMessageId") is not None:
                self._check_owner("message", event["parentMessageId"], owner)
            self._check_owner(_OWNER_KIND[bracket], key, owner)
            self.owners.setdefault((_OWNER_KIND[bracket], key), owner)
            self.open.add((bracket, key))
        elif kind in _PARTS or kind in _CLOSERS:
            bracket, field = (_PARTS | _CLOSERS)[kind]
            key = event[field]
            self._need((bracket, key) in self.open, f"{kind}: no {bracket} {key} is open")
            self._check_owner(_OWNER_KIND[bracket], key, owner)
            if kind in _CLOSERS:
                self.open.remove((bracket, key))
        elif kind == "TOOL_CALL_RESULT":
            self.owners["message", event["messageId"]] = owner
            call = event["toolCallId"]
            self.results[call] = self.results.get(call, 0) + 1
        elif kind in {"STEP_STARTED", "STEP_FINISHED"}:
            step = ("step", (owner, event["stepName"]))
            starts = kind == "STEP_STARTED"
            self._need((step in self.open) != starts, f"{kind} {step}")
            self.open.symmetric_difference_update({step})
        elif kind == "SUBAGENT_STARTED":
            name, parent = event["subagentRunId"], event.get("parentSubagentRunId")
            self._need(name not in self.subagents, f"sub-agent {name} a second time")
            self._need(parent is None or parent in self.subagents, f"no parent {parent}")
            self.subagents[name] = True
        elif kind in {"SUBAGENT_FINISHED", "SUBAGENT_ERROR"}:
            name = event["subagentRunId"]
            self._need(self.subagents.get(name, False), f"sub-agent {name} is not active")
            self.subagents[name] = False

    def _check_owner(self, kind: str, key: str, owner: str | None) -> None:
        if owner is not None and (kind, key) in self.owners:
            recorded = self.owners[kind, key]
            self._need(recorded == owner, f"{kind} {key} belongs to {recorded}, not to {owner}")

    @staticmethod
    def _need(condition: bool, why: str) -> None:
        if not condition:
            raise RefusedError(why)


def check_history(messages: Sequence[Message]) -> None:
    """Raise RefusedError where an OpenAI-style chat API would answer 400.

    An assistant message has words or calls; each call is answered by exactly one tool message,
    and that before anything else is said; a tool message answers a call of the assistant message
    that it follows; call ids are not used twice.
    """
    owed: list[str] = []
    used: set[str] = set()
    for message in messages:
        data = msgspec.to_builtins(message)
        role = data["role"]
        if role == "tool":
            if data["toolCallId"] not in owed:
                raise RefusedError(f"nobody asked for {data['toolCallId']}")
            owed.remove(data["toolCallId"])
            continue
        if owed:
            raise RefusedError(f"{owed} are unanswered before {role}")
        if role == "assistant":
            calls = [call["id"] for call in data.get("toolCalls", ())]
            if not calls and not data.get("content"):
                raise RefusedError("an assistant message with neither words nor calls")
            if used & set(calls) or len(set(calls)) != len(calls):
                raise RefusedError("a call id twice")
            used.update(calls)
            owed = calls
        elif not isinstance(data.get("content"), str):
            raise RefusedError(f"{role} without words")
    if owed:
        raise RefusedError(f"{owed} are unanswered at the end")
