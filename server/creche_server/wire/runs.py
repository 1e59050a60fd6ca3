"""How a run looks to others' clients: the LangGraph SDK's `Run`, the protocol's `AgentTreeNode`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from typing import Any, Final

from creche import ActivityNode, RunRecord, RunTree

# langgraph_sdk.schema.RunStatus. A parked run waits for somebody, which is "interrupted" there.
_SDK_STATUS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "queued": "pending",
        "running": "running",
        "parked": "interrupted",
        "success": "success",
        "cancelled": "interrupted",
        "failed": "error",
        "lost": "error",
    }
)
SDK_STATUSES: Final = ("pending", "running", "error", "success", "timeout", "interrupted")

# langchain_protocol's AgentStatus.
_AGENT_STATUS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "queued": "started",
        "running": "running",
        "parked": "interrupted",
        "success": "completed",
        "cancelled": "interrupted",
        "failed": "failed",
        "lost": "failed",
    }
)


def sdk_status(status: str, reason: str | None) -> str:
    """How the LangGraph SDK calls it."""
    return "timeout" if reason == "deadline" else _SDK_STATUS[status]


def sdk_run(record: RunRecord, *, live: RunTree | None = None) -> dict[str, Any]:
    """The SDK's `Run`. What it has no word for is in `metadata.creche`, as in a terminal event.

    A record is as it was last written: of a live run, the tree is ahead of it.
    """
    status = record.status if live is None else live.status
    reason = record.reason if live is None else live.reason
    started_at = record.started_at or (None if live is None else live.started_at)
    changed_at = record.ended_at or started_at or record.created_at
    known: dict[str, Any] = {
        "reason": reason,
        "started_at": _told(started_at),
        "ended_at": _told(record.ended_at),
        "first_seq": record.first_seq,
        "last_seq": record.last_seq,
        "receipt": record.receipt,
    }
    return {
        "run_id": record.run_id,
        "thread_id": record.thread_id,
        "assistant_id": record.agent,
        "created_at": _told(record.created_at),
        "updated_at": _told(changed_at),
        "status": sdk_status(status, reason),
        "metadata": {
            "creche": {
                "status": status,
                **{key: value for key, value in known.items() if value is not None},
            }
        },
        "multitask_strategy": "enqueue",
        **({"cancel_reason": reason} if status == "cancelled" else {}),
    }


def _told(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat(timespec="milliseconds")


def thread_node(trees: Sequence[RunTree]) -> dict[str, Any]:
    """A thread as the root of its live runs; it is called after the active one's agent."""
    return {
        "namespace": [],
        "status": _AGENT_STATUS[trees[0].status] if trees else "completed",
        "graph_name": trees[0].agent if trees else "",
        "children": [run_node(tree, (tree.run_id,)) for tree in trees],
    }


def run_node(tree: RunTree, namespace: tuple[str, ...] = ()) -> dict[str, Any]:
    """A run, its sub-agents below it; all else that is known of it is in `metadata.creche`."""
    return {
        "namespace": list(namespace),
        "status": _AGENT_STATUS[tree.status],
        "graph_name": tree.agent,
        "children": _subagents(tree.doing, namespace),
        "metadata": {"creche": tree.to_dict()},
    }


def _subagents(doing: Sequence[ActivityNode], namespace: tuple[str, ...]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for node in _agents_in(doing):
        own = (*namespace, f"{node.name}:{len(found) + 1}")
        found.append(
            {
                "namespace": list(own),
                "status": "running",
                "graph_name": node.name,
                "children": _subagents(node.doing, own),
            }
        )
    return found


def _agents_in(doing: Sequence[ActivityNode]) -> list[ActivityNode]:
    """The sub-agents, those within a tool call included, but none within another."""
    found: list[ActivityNode] = []
    for node in doing:
        found += [node] if node.kind == "subagent" else _agents_in(node.doing)
    return found
