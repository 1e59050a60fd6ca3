// What a thread looks like so far: a pure fold over its events. No DOM, no network, no clock.
//
// Two kinds of news come in: events, in the order of their `seq` (`apply`), and what this page
// itself asked (`ask`, `mark`, `reconcile`). Nothing is changed in place: whatever is untouched
// stays the same object, so that a view need only look at what differs.
//
//   thread  {epoch, seq, turns: [turn], asked: [question]}
//   turn    {runId, status, questions: [{id, text}], parts: [part], startedAt, steps: [name],
//            receipt, usage, error}         status: running, parked, done, stopped or failed
//   part    {kind: "text", id, text, open} | {kind: "thought", id, text, open, by}
//         | {kind: "tool", id, name, args, result, status, startedAt, endedAt}
//                                            status: calling, done or failed
//         | {kind: "agent", id, name, status, message}
//         | {kind: "asks", id, interrupt, state, why, answer}  what a person is asked
//                                            state: open, sending, answered, declined or over
//   asked   {id, text, agent, state, runId, why}: said by this page, not yet in the log
//            state: unsent, sending, unknown (the connection broke meanwhile), accepted,
//            waiting, withdrawn or refused

export const EMPTY = Object.freeze({ epoch: null, seq: 0, turns: [], asked: [] });

// --- events

// The thread after one more event. One that was told before changes nothing.
export function apply(thread, event) {
  if (event.seq <= thread.seq) return thread;
  const fold = FOLDS[event.type];
  return { ...(fold ? fold(thread, event) : thread), seq: event.seq };
}

const FOLDS = {
  RUN_STARTED(thread, event) {
    if (event.parentRunId) return goOn(thread, event);
    const known = thread.asked.filter((question) => question.runId === event.runId);
    const told = event.input?.messages.filter((message) => message.role === "user") ?? known;
    const questions = told.map(({ id, content, text }) => ({ id, text: content ?? text }));
    const ids = new Set(questions.map((question) => question.id));
    const turn = {
      runId: event.runId,
      status: "running",
      questions,
      parts: [],
      steps: [],
      startedAt: event.timestamp,
    };
    return {
      ...thread,
      turns: [...thread.turns, turn],
      asked: thread.asked.filter(({ id, runId }) => !ids.has(id) && runId !== event.runId),
    };
  },
  RUN_FINISHED: (thread, event) =>
    inTurn(thread, (turn) => event.outcome?.type === "interrupt" ? park(turn, event) : ({
      ...turn,
      status: event.outcome?.type === "cancelled" ? "stopped" : "done",
      steps: [],
      receipt: event.metadata?.creche?.receipt,
      usage: event.usage,
    })),
  RUN_ERROR: (thread, event) =>
    inTurn(withRunning(thread), (turn) => ({
      ...turn,
      status: "failed",
      steps: [],
      receipt: event.metadata?.creche?.receipt,
      error: {
        message: event.message,
        code: event.code,
        reference: event.metadata?.creche?.correlation_id,
      },
    })),
  STEP_STARTED: (thread, event) =>
    inTurn(thread, (turn) => ({ ...turn, steps: [...turn.steps, event.stepName] })),
  STEP_FINISHED: (thread, event) =>
    inTurn(thread, (turn) => ({
      ...turn,
      steps: turn.steps.filter((step) => step !== event.stepName),
    })),

  TEXT_MESSAGE_START: (thread, event) =>
    begin(thread, wordsOf(event), event.messageId, { text: "", by: nameOf(thread, event) }),
  TEXT_MESSAGE_CONTENT: (thread, event) => extend(thread, wordsOf(event), event),
  TEXT_MESSAGE_END: (thread, event) => end(thread, wordsOf(event), event),
  REASONING_MESSAGE_START: (thread, event) =>
    begin(thread, "thought", event.messageId, { text: "" }),
  REASONING_MESSAGE_CONTENT: (thread, event) => extend(thread, "thought", event),
  REASONING_MESSAGE_END: (thread, event) => end(thread, "thought", event),

  TOOL_CALL_START: (thread, event) =>
    begin(thread, "tool", event.toolCallId, {
      name: event.toolCallName,
      args: "",
      status: "calling",
      startedAt: event.timestamp,
    }),
  TOOL_CALL_ARGS: (thread, event) =>
    inPart(thread, "tool", event.toolCallId, (part) => ({ args: part.args + event.delta })),
  TOOL_CALL_RESULT: (thread, event) =>
    inPart(thread, "tool", event.toolCallId, () => ({
      result: event.content,
      status: event.metadata?.creche?.error ? "failed" : "done",
      endedAt: event.timestamp,
    })),

  // What a later message undid is no part of the conversation any more.
  CUSTOM: (thread, event) =>
    event.name === "creche.rolled_back"
      ? {
          ...thread,
          turns: thread.turns.filter((turn) => !event.value?.run_ids?.includes(turn.runId)),
        }
      : thread,

  SUBAGENT_STARTED: (thread, event) =>
    begin(thread, "agent", event.subagentRunId, { name: event.name, status: "working" }),
  SUBAGENT_FINISHED: (thread, event) =>
    inPart(thread, "agent", event.subagentRunId, () => ({
      status: event.outcome?.type === "suspended" ? "working" : "done",
    })),
  SUBAGENT_ERROR: (thread, event) =>
    inPart(thread, "agent", event.subagentRunId, () => ({
      status: "failed",
      message: event.message,
    })),
};

// A run that asks something is parked; what it asks is a part of its turn.
function park(turn, event) {
  const asks = event.outcome.interrupts.map((interrupt) => (
    { kind: "asks", id: interrupt.id, interrupt, state: "open" }
  ));
  return { ...turn, status: "parked", parts: [...turn.parts, ...asks] };
}

// It goes on, under another id: with an answer, or because nobody waits for one any more.
function goOn(thread, event) {
  const given = new Map(event.input?.resume?.map((entry) => [entry.interruptId, entry]));
  return inTurn(thread, (turn) => ({
    ...turn,
    status: "running",
    segmentId: event.runId,
    parts: turn.parts.map((part) => {
      if (part.kind !== "asks" || !isOpen(part)) return part;
      const entry = given.get(part.id);
      if (!entry) return { ...part, state: "over" };
      return { ...part, state: entry.status === "resolved" ? "answered" : "declined", answer: entry.payload };
    }),
  }));
}

const isOpen = ({ state }) => state === "open" || state === "sending";

// Of a run that was lost before it began, the failure may be all that there is.
function withRunning(thread) {
  if (thread.turns.at(-1)?.status === "running") return thread;
  return { ...thread, turns: [...thread.turns, { status: "running", questions: [], parts: [], steps: [] }] };
}

// What a sub-agent says is told to its parent and is no answer, so it is shown as a thought.
const wordsOf = (event) => (event.subagentRunId ? "thought" : "text");

function nameOf(thread, event) {
  const agents = thread.turns.at(-1)?.parts.filter((part) => part.kind === "agent") ?? [];
  return agents.find((part) => part.id === event.subagentRunId)?.name;
}

// One run is active at a time, so an event speaks of the last turn.
function inTurn(thread, change) {
  const turn = thread.turns.at(-1);
  return turn ? { ...thread, turns: [...thread.turns.slice(0, -1), change(turn)] } : thread;
}

function inPart(thread, kind, id, change) {
  return inTurn(thread, (turn) => {
    const at = turn.parts.findLastIndex((part) => part.kind === kind && part.id === id);
    if (at < 0) return turn;
    const part = turn.parts[at];
    return { ...turn, parts: turn.parts.with(at, { ...part, ...change(part) }) };
  });
}

// What a question interrupted is begun again by the same id.
const begin = (thread, kind, id, fields) =>
  inTurn(thread, (turn) => {
    const at = turn.parts.findLastIndex((part) => part.kind === kind && part.id === id);
    if (at >= 0) {
      const part = { ...turn.parts[at], open: true, ...(fields.status && { status: fields.status }) };
      return { ...turn, parts: turn.parts.with(at, part) };
    }
    return { ...turn, parts: [...turn.parts, { kind, id, open: true, ...fields }] };
  });
const extend = (thread, kind, event) =>
  inPart(thread, kind, event.messageId, (part) => ({ text: part.text + event.delta }));
const end = (thread, kind, event) =>
  inPart(thread, kind, event.messageId, () => ({ open: false }));

// --- what this page asked

// A new question, shown at once. `apply` takes it away when the log tells of it.
export function ask(thread, question) {
  return { ...thread, asked: [...thread.asked, { state: "unsent", ...question }] };
}

// What became of a question that is not in the log yet.
export function mark(thread, id, change) {
  return {
    ...thread,
    asked: thread.asked.map((question) =>
      question.id === id ? { ...question, ...change } : question,
    ),
  };
}

export function forget(thread, id) {
  return { ...thread, asked: thread.asked.filter((question) => question.id !== id) };
}

// A subscription began in `epoch`; with `reset`, what was seen is not what is stored.
export function subscribed(thread, { epoch, reset }) {
  return reset ? { ...EMPTY, epoch, asked: thread.asked } : { ...thread, epoch };
}

// Something about what a run asks: that an answer is on its way, or was refused.
export function markAsks(thread, id, change) {
  return {
    ...thread,
    turns: thread.turns.map((turn) =>
      turn.parts.some((part) => part.kind === "asks" && part.id === id)
        ? {
            ...turn,
            parts: turn.parts.map((part) =>
              part.kind === "asks" && part.id === id ? { ...part, ...change } : part,
            ),
          }
        : turn,
    ),
  };
}

// Set right what no event tells: which questions wait, and which never arrived. `state` is the
// answer of GET /threads/{id}/state, asked for once the log had been read to its end.
export function reconcile(thread, state) {
  const stored = state.values.messages.filter((message) => message.role === "user");
  const arrived = new Set(stored.map((message) => message.id));
  const begun = new Set(thread.turns.map((turn) => turn.runId));
  const shown = new Set(thread.turns.flatMap((turn) => turn.questions.map(({ id }) => id)));
  const runs = [state.active_run, ...state.queued_runs].filter((id) => id && !begun.has(id));

  // Questions are stored in the order of asking, so those that wait are the last ones.
  const waiting = runs.length ? stored.filter(({ id }) => !shown.has(id)).slice(-runs.length) : [];
  const mine = new Map(thread.asked.map((question) => [question.id, question]));
  const inLine = waiting.map(({ id, content }, at) => ({
    text: content,
    ...mine.get(id),
    id,
    runId: waiting.length === runs.length ? runs[at] : mine.get(id)?.runId,
    state: ["accepted", "withdrawn"].find((state) => mine.get(id)?.state === state) ?? "waiting",
  }));
  const listed = new Set(inLine.map((question) => question.id));
  const rest = thread.asked
    .filter(({ id }) => !listed.has(id) && !arrived.has(id))
    .map((question) =>
      question.state === "unknown"
        ? { ...question, state: "refused", why: "The connection broke before it arrived." }
        : question,
    );
  // A run may be over, but what it asked can still be answered: `interrupts` says so.
  const open = new Set((state.interrupts ?? []).map(({ id }) => id));
  const turns = thread.turns.map((turn) =>
    turn.parts.some((part) => part.kind === "asks" && open.has(part.id) && part.state === "over")
      ? {
          ...turn,
          parts: turn.parts.map((part) =>
            part.kind === "asks" && open.has(part.id) ? { ...part, state: "open" } : part,
          ),
        }
      : turn,
  );
  return { ...thread, turns, asked: [...inLine, ...rest] };
}

// --- what can be asked of a thread

// The run that a Stop button stops: the one under way, else the one about to begin.
export function activeRun(thread) {
  const turn = thread.turns.at(-1);
  if (turn?.status === "running" || turn?.status === "parked") return turn.runId;
  return thread.asked.find((question) => question.state === "accepted")?.runId ?? null;
}

// What is going on, in words for a status line; empty when nothing is.
export function activity(turn) {
  if (turn?.status === "parked") return "Waiting for your answer";
  if (turn?.status !== "running") return "";
  const part = turn.parts.at(-1);
  if (part?.kind === "tool" && part.status === "calling") return `Calling ${part.name}`;
  if (part?.kind === "text" && part.open) return "Answering";
  if (part?.kind === "agent" && part.status === "working") return `${part.name} is working`;
  return turn.steps.at(-1) ?? "Thinking";
}

// How a turn ended, in a sentence or two; empty while it runs.
export function ending({ status, receipt, error, usage }) {
  if (status === "done") {
    const words = ["Done"];
    if (receipt) words.push(`in ${duration(receipt.run_ms)}`);
    const tokens = usage?.reduce((sum, { outputTokens }) => sum + (outputTokens ?? 0), 0);
    return words.join(" ") + (tokens ? `, ${tokens} token${tokens === 1 ? "" : "s"}` : "");
  }
  if (status === "failed") return `The run failed: ${error.message}`;
  if (status !== "stopped") return "";
  const why = stopReason(receipt);
  if (receipt?.overran) return `Stopped${why}, but its cleanup took longer than it may and goes on`;
  const left = (receipt?.threads_abandoned ?? []).map(({ name }) => name);
  if (left.length) return `Stopped${why}, but ${left.join(", ")} would not end and was left behind`;
  const clean = receipt ? `, all cleaned up within ${duration(receipt.elapsed_ms)}` : "";
  return `Stopped${why}${clean}`;
}

// `creche chat` says it in the same words (cli/endings.py).
const REASONS = {
  deadline: "the run took longer than run_timeout",
  budget: "the run spent more than it may",
  disconnect: "nobody was watching",
  superseded: "a later message took its place, or its thread was deleted",
  shutdown: "the server was shut down",
  unanswered: "nobody answered its question in time",
};

// Why a run was stopped, with a colon before it; empty if the user did it.
function stopReason(receipt) {
  const words = REASONS[receipt?.reason];
  if (!words) return "";
  if (receipt.reason !== "deadline") return `: ${words}`;
  const seconds = (receipt.run_ms - receipt.elapsed_ms) / 1000; // without the cleanup
  return `: ${words} (${Math.round(seconds * 10) / 10} s)`;
}

// Milliseconds as a person says them.
export function duration(milliseconds) {
  if (milliseconds < 1000) return `${Math.max(1, Math.round(milliseconds))} ms`;
  const seconds = milliseconds / 1000;
  if (seconds < 59.95) return `${seconds.toFixed(1)} s`;
  return `${Math.floor(seconds / 60)} min ${Math.floor(seconds % 60)} s`;
}
