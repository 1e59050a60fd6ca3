"""The default agent, `assistant`, and its tools: a calculator, a clock, a memory of old chats."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Final
from zoneinfo import ZoneInfo

import msgspec

from creche import ModelAgent, RunError, Store, Tool, ToolContext, role_of, text_of, tool
from creche_server.arithmetic import evaluate
from creche_server.words import telling

_MOST_FOUND: Final = 5
_EXCERPT: Final = 300  # characters

# Of all that a server provides to agents that name them.
TOOL_NAMES: Final = ("calculator", "clock", "search_history")


class Assistant(ModelAgent):
    """Answers questions, and calculates, tells the time and looks up earlier chats for that."""

    instructions = (
        "You are a helpful, concise assistant. Use a tool when it gives a surer answer than you "
        "could: the calculator for arithmetic, the clock for dates and times, search_history "
        "for what was said in earlier conversations."
    )
    tools = TOOL_NAMES


def assistant_with(sources: tuple[str, ...]) -> type[Assistant]:
    """The assistant, with these tool sources beside its own tools."""
    if not sources:
        return Assistant
    return type("Assistant", (Assistant,), {"tool_sources": sources, "__doc__": Assistant.__doc__})


@tool
def calculator(
    expression: Annotated[str, msgspec.Meta(description="such as `37 * 91` or `sqrt(2) / 3`")],
) -> str:
    """Evaluate an arithmetic expression."""
    try:
        return str(evaluate(expression))
    except Exception as error:  # boundary: whatever Python makes of somebody's expression
        msg = f"{expression[:100]!r} cannot be calculated: {str(error)[:_EXCERPT]}"
        raise RunError(msg) from error


@tool
async def clock(
    timezone: Annotated[str, msgspec.Meta(description="such as `Europe/Paris`")] = "UTC",
) -> str:
    """Tell the current date and time."""
    try:
        zone = ZoneInfo(timezone)
    except (ValueError, OSError, LookupError) as error:
        msg = f"there is no time zone {timezone[:64]!r}; use a name such as Europe/Paris"
        raise RunError(msg) from error
    return datetime.now(zone).strftime("%A, %d %B %Y, %H:%M:%S %Z")


def history_tool(store: Store) -> Tool:
    """`search_history`, over the threads of whoever's run calls it, and nobody else's."""

    @tool
    async def search_history(
        caller: ToolContext,
        query: Annotated[str, msgspec.Meta(description="words that the messages contain")],
    ) -> list[dict[str, str]]:
        """Search this user's earlier conversations."""
        words = telling(query)
        try:
            if not words:  # "What have we talked about?" looks for nothing in particular
                return await _latest(store, caller)
            found = await store.search_messages(
                caller.context.user_id,
                " ".join(words),
                limit=_MOST_FOUND + 1,
            )
        except Exception as error:  # boundary: whatever a store raises is nothing for a model
            msg = "earlier conversations cannot be searched just now"
            raise RunError(msg) from error
        return [
            {
                "thread_id": thread_id,
                "when": stored.created_at.strftime("%Y-%m-%d %H:%M"),
                "role": role_of(stored.message),
                "text": text_of(stored.message)[:_EXCERPT],
            }
            for thread_id, stored in found
            if stored.run_id != caller.context.run_id  # the question itself is no finding
        ][:_MOST_FOUND]

    return search_history


async def _latest(store: Store, caller: ToolContext) -> list[dict[str, str]]:
    """The titles of this user's latest threads, but for one that this run began."""
    threads = await store.threads(caller.context.user_id, limit=_MOST_FOUND + 1)
    runs = await store.runs(caller.context.user_id, caller.context.thread_id)
    return [
        {
            "thread_id": thread.thread_id,
            "when": thread.updated_at.strftime("%Y-%m-%d %H:%M"),
            "title": thread.title,
        }
        for thread in threads
        if thread.thread_id != caller.context.thread_id or len(runs) > 1
    ][:_MOST_FOUND]
