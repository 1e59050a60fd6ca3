"""creche: runs AI agents for many users at once, each run in a Trio nursery of its own.

The layout, in reading order: who is asking (`UserExecutionContext`); what a run says (`events`);
what it works with (models, tools, agents); what owns it (`open_supervisor`).
"""

from creche import _events as events
from creche._agents import Agent, AgentClassRegistry, AgentDescription, ModelAgent
from creche._approval import Approval, ApprovalRequest, Approver
from creche._asking import interrupt_of
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
    check_id,
    logged_context,
    new_connection_id,
    new_id,
)
from creche._dispatcher import ToolDispatcher
from creche._emitter import EventEmitter, SubagentEmitter
from creche._engine import ExecutionEngine, NamesAgent
from creche._errors import (
    AnswerRefusedError,
    AuditTamperedError,
    AuditUnavailableError,
    CommitInDoubtError,
    CrecheError,
    DrainingError,
    EmitterClosedError,
    GrammarError,
    InvalidContextError,
    IsolationError,
    LimitExceededError,
    ModelError,
    NoSuchQuestionError,
    QuestionClosedError,
    QuestionDeclinedError,
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
from creche._statistics import RunStatistics
from creche._steps import Step, SubagentResult
from creche._store import (
    Chunk,
    Commit,
    IdKind,
    MemoryStore,
    NewThread,
    QuestionRecord,
    QuestionStatus,
    RunRecord,
    RunStatus,
    Store,
    StoredMessage,
    ThreadRecord,
    new_epoch,
)
from creche._supervisor import Supervisor, open_supervisor
from creche._tool_calls import ToolPolicy
from creche._tools import StopFlag, Tool, ToolContext, ToolResult, tool

__all__ = [
    "AbandonedThread",
    "Agent",
    "AgentClassRegistry",
    "AgentDescription",
    "AgentInput",
    "AnswerRefusedError",
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
    "CancelReason",
    "Chunk",
    "Commit",
    "CommitInDoubtError",
    "ConnectionId",
    "CrecheError",
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
    "MemorySink",
    "MemoryStore",
    "Message",
    "MessageId",
    "Model",
    "ModelAgent",
    "ModelError",
    "ModelPart",
    "NamesAgent",
    "NewThread",
    "NoSuchQuestionError",
    "QuestionClosedError",
    "QuestionDeclinedError",
    "QuestionRecord",
    "QuestionStatus",
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
    "SecurityAudit",
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
    "ToolSpec",
    "UnknownAgentError",
    "Usage",
    "UserExecutionContext",
    "UserId",
    "UserMessage",
    "Verification",
    "assert_isolated",
    "check_id",
    "decode_message",
    "encode_message",
    "end_lost_runs",
    "events",
    "interrupt_of",
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
    "split",
    "text_of",
    "tool",
    "verify",
]
