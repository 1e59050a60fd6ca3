"""The older design's snippet as its users have it: nothing is passed but the context."""

from __future__ import annotations

from typing import Any

from creche import ExecutionEngine, ToolDispatcher, UserExecutionContext


async def handle(agent_context: Any, state: Any, params: Any) -> tuple[Any, Any]:
    """What stands between the lines is the snippet, word for word."""
    result: Any
    # ---
    user_context = UserExecutionContext.from_request(user_id="user_123", thread_id="thread_456", run_id="run_789")  # noqa: E501  # fmt: skip
    async with ExecutionEngine.create_user_engine(user_context) as engine:
        result = await engine.execute_agent(agent_context, state)
    # ---
    answered = result
    # ---
    async with ToolDispatcher.create_scoped_dispatcher_context(user_context) as dispatcher:
        result = await dispatcher.dispatch("my_tool", params)
    # ---
    return answered, result
