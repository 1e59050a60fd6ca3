"""creche: runs AI agents for many users at once, each run in a Trio nursery of its own.

The layout, in reading order: who is asking (`UserExecutionContext`); what a run says (`events`);
what it works with (models, tools, agents); what owns it (`open_supervisor`).
"""

from creche import _events as events
from creche._admission import Weight
from creche._agents import Agent, AgentClassRegistry, AgentDescription, ModelAgent
from creche._approval import Approval, ApprovalRequest, Approver
from creche._audit import SecurityAudit, open_audit
from creche._audit_chain import (
    AuditEntry,
    AuditHead,
    AuditKind,
    AuditRecord,
    Flaw,
    Verification,
    verify,
)
from creche._audit_sinks import AuditQuery, AuditSink, JsonlSink, Kept, MemorySink
from creche._barrier import leaves, split
from creche._budget import Allowance, DaySpending, Price, Spending, Usd
from creche._class_guard import IsolationViolationError
from creche._context import (
    ConnectionId,
    MessageId,
    RequestId,
    RunId,
    ThreadId,
    ToolCallId,
    UserExecutionContext,
    UserId,
    check_characters,
    check_id,
    is_connection_of,
    logged_context,
    new_connection_id,
    new_id,
)
from creche._dispatcher import ToolDispatcher
from creche._double_texting import MultitaskStrategy
from creche._emitter import EventEmitter, SubagentEmitter
from creche._engine import ExecutionEngine, NamesAgent
from creche._errors import (
    AuditTamperedError,
    AuditUnavailableError,
    BudgetExceededError,
    BusyError,
    CommitInDoubtError,
    ConnectionMismatchError,
    CrecheError,
    DrainingError,
    EmitterClosedError,
    GrammarError,
    InvalidContextError,
    IsolationError,
    LimitExceededError,
    LogConflictError,
    ModelError,
    RunError,
    StoreUnavailableError,
    SubagentFailedError,
    ThreadDeletedError,
    ToolDefinitionError,
    UnknownAgentError,
)
from creche._grammar import Grammar
from creche._infrastructure import Infrastructure
from creche._isolation import assert_isolated
from creche._journal import Entry, Journal
from creche._journals import Journals, open_journals
from creche._limits import Limits
from creche._messages import (
    AgentInput,
    AssistantMessage,
    FunctionCall,
    Message,
    SystemMessage,
    ToolCall,
    ToolMessage,
    UserMessage,
    decode_message,
    encode_message,
    role_of,
    text_of,
)
from creche._models import Model, ModelPart, TextDelta, ToolCallRequest, ToolSpec, Usage
from creche._outcome import (
    AbandonedThread,
    CancelReason,
    Receipt,
    RunOutcome,
    StopMeans,
    StoppedTool,
)
from creche._quotas import ToolQuotas
from creche._recovery import end_lost_runs
from creche._redaction import redact_text, redact_value
from creche._run import Run
from creche._run_context import RunContext
from creche._run_tree import ActivityNode, RunTree, TaskNode
from creche._spending import Budget
from creche._statistics import RunStatistics
from creche._steps import Step, SubagentResult
from creche._store import (
    Chunk,
    Commit,
    IdKind,
    MemoryStore,
    NewThread,
    RunRecord,
    RunStatus,
    Store,
    StoredMessage,
    ThreadRecord,
    new_epoch,
)
from creche._supervisor import Supervisor, open_supervisor
from creche._tool_calls import ToolPolicy, allow_every_tool
from creche._tool_sources import ToolSource, ToolSourceContext, ToolSourceError
from creche._tools import StopFlag, Tool, ToolContext, ToolResult, schema_tool, tool
from creche._tracing import Span, SpanEnd, SpanStart, Tracer

__all__ = [
    "AbandonedThread",
    "ActivityNode",
    "Agent",
    "AgentClassRegistry",
    "AgentDescription",
    "AgentInput",
    "Allowance",
    "Approval",
    "ApprovalRequest",
    "Approver",
    "AssistantMessage",
    "AuditEntry",
    "AuditHead",
    "AuditKind",
    "AuditQuery",
    "AuditRecord",
    "AuditSink",
    "AuditTamperedError",
    "AuditUnavailableError",
    "Budget",
    "BudgetExceededError",
    "BusyError",
    "CancelReason",
    "Chunk",
    "Commit",
    "CommitInDoubtError",
    "ConnectionId",
    "ConnectionMismatchError",
    "CrecheError",
    "DaySpending",
    "DrainingError",
    "EmitterClosedError",
    "Entry",
    "EventEmitter",
    "ExecutionEngine",
    "Flaw",
    "FunctionCall",
    "Grammar",
    "GrammarError",
    "IdKind",
    "Infrastructure",
    "InvalidContextError",
    "IsolationError",
    "IsolationViolationError",
    "Journal",
    "Journals",
    "JsonlSink",
    "Kept",
    "LimitExceededError",
    "Limits",
    "LogConflictError",
    "MemorySink",
    "MemoryStore",
    "Message",
    "MessageId",
    "Model",
    "ModelAgent",
    "ModelError",
    "ModelPart",
    "MultitaskStrategy",
    "NamesAgent",
    "NewThread",
    "Price",
    "Receipt",
    "RequestId",
    "Run",
    "RunContext",
    "RunError",
    "RunId",
    "RunOutcome",
    "RunRecord",
    "RunStatistics",
    "RunStatus",
    "RunTree",
    "SecurityAudit",
    "Span",
    "SpanEnd",
    "SpanStart",
    "Spending",
    "Step",
    "StopFlag",
    "StopMeans",
    "StoppedTool",
    "Store",
    "StoreUnavailableError",
    "StoredMessage",
    "SubagentEmitter",
    "SubagentFailedError",
    "SubagentResult",
    "Supervisor",
    "SystemMessage",
    "TaskNode",
    "TextDelta",
    "ThreadDeletedError",
    "ThreadId",
    "ThreadRecord",
    "Tool",
    "ToolCall",
    "ToolCallId",
    "ToolCallRequest",
    "ToolContext",
    "ToolDefinitionError",
    "ToolDispatcher",
    "ToolMessage",
    "ToolPolicy",
    "ToolQuotas",
    "ToolResult",
    "ToolSource",
    "ToolSourceContext",
    "ToolSourceError",
    "ToolSpec",
    "Tracer",
    "UnknownAgentError",
    "Usage",
    "Usd",
    "UserExecutionContext",
    "UserId",
    "UserMessage",
    "Verification",
    "Weight",
    "allow_every_tool",
    "assert_isolated",
    "check_characters",
    "check_id",
    "decode_message",
    "encode_message",
    "end_lost_runs",
    "events",
    "is_connection_of",
    "leaves",
    "logged_context",
    "new_connection_id",
    "new_epoch",
    "new_id",
    "open_audit",
    "open_journals",
    "open_supervisor",
    "redact_text",
    "redact_value",
    "role_of",
    "schema_tool",
    "split",
    "text_of",
    "tool",
    "verify",
]
