// The transcript's DOM: shows a thread, touching only what differs from what it showed before.

import { AsksView } from "./asks.js";
import { make, makeButton, setText } from "./dom.js";
import { Prose } from "./prose.js";
import { activity, duration, ending } from "./thread.js";

// `actions`: {again(question), discard(question), withdraw(question), respond(id, answer)}, from
// buttons in it.
export class Transcript {
  #root;
  #actions;
  #turns = []; // [TurnView], one for each of the thread's
  #asked = new Map(); // {question id: AskedView}

  constructor(root, actions) {
    this.#root = root;
    this.#actions = actions;
  }

  show({ turns, asked }) {
    // After a start over, the turns may be others.
    const other = this.#turns.findIndex((view, at) => view.runId !== turns[at]?.runId);
    if (other >= 0) this.#turns.splice(other).forEach((view) => view.element.remove());

    turns.forEach((turn, at) => {
      let view = this.#turns[at];
      if (!view) {
        view = this.#turns[at] = new TurnView(turn, this.#actions);
        const after = this.#turns[at - 1]?.element;
        this.#root.insertBefore(view.element, after ? after.nextSibling : this.#root.firstChild);
      }
      view.update(turn);
    });

    const gone = new Set(this.#asked.keys());
    for (const question of asked) {
      gone.delete(question.id);
      let view = this.#asked.get(question.id);
      if (!view) {
        view = new AskedView(question, this.#actions);
        this.#asked.set(question.id, view);
        this.#root.append(view.element);
      }
      view.update(question);
    }
    for (const id of gone) {
      this.#asked.get(id).element.remove();
      this.#asked.delete(id);
    }
  }
}

const questionBox = (words) =>
  make("div", "asked", make("span", "unseen", "You asked: "), make("p", "", words));

// One run: what was asked, what was said and done, and how it ended.
class TurnView {
  #turn = null;
  #parts = []; // [view of a part]
  #body = make("div", "parts");
  #end = make("p", "end");

  #actions;

  constructor(turn, actions) {
    this.#actions = actions;
    this.runId = turn.runId;
    const questions = turn.questions.map(({ text }) => questionBox(text));
    const run = make("div", "run", this.#body, this.#end);
    this.element = make("article", "turn", ...questions, run);
  }

  update(turn) {
    if (turn === this.#turn) return;
    this.#turn = turn;
    this.element.dataset.status = turn.status;
    turn.parts.forEach((part, at) => {
      if (!this.#parts[at]) {
        this.#parts[at] = new PARTS[part.kind](part, this.#actions);
        this.#body.append(this.#parts[at].element);
      }
      this.#parts[at].update(part);
    });
    this.#showEnd(turn);
  }

  #showEnd(turn) {
    setText(this.#end, activity(turn) || ending(turn));
    const reference = turn.error?.reference;
    if (reference && !turn.error.message.includes(reference)) {
      this.#end.append(make("span", "reference", "Reference ", make("code", "", reference)));
    }
    if (turn.startedAt) {
      this.#end.title = new Date(turn.startedAt).toLocaleString();
    }
  }
}

class TextView {
  #prose;
  #part = null;

  constructor() {
    this.element = make("div", "prose");
    this.#prose = new Prose(this.element);
  }

  update(part) {
    if (part === this.#part) return;
    this.#part = part;
    this.#prose.update(part.text);
    this.element.classList.toggle("open", part.open);
  }
}

// Thoughts are for who wants them, so they are folded away.
class ThoughtView {
  #part = null;
  #words = make("p");
  #summary = make("summary", "", "Thinking…");

  constructor() {
    this.element = make("details", "thought", this.#summary, this.#words);
  }

  update(part) {
    if (part === this.#part) return;
    this.#part = part;
    const [doing, done] = part.by
      ? [`${part.by} is writing…`, `What ${part.by} wrote`]
      : ["Thinking…", "Thought about it"];
    setText(this.#summary, part.open ? doing : done);
    setText(this.#words, part.text);
  }
}

// A tool call: one line that says it all in short, and the whole of it inside.
class ToolView {
  #part = null;
  #gist = make("span", "gist");
  #outcome = make("span", "outcome");
  #args = make("pre");
  #result = make("pre");
  #label = make("h3", "", "Result");
  #time = make("span", "time");

  constructor(part) {
    const name = make("span", "name", part.name);
    const summary = make("summary", "", name, this.#gist, this.#outcome);
    const asked = make("h3", "", "Arguments");
    const told = make("div", "heading", this.#label, this.#time);
    const detail = make("div", "detail", asked, this.#args, told, this.#result);
    this.#args.tabIndex = this.#result.tabIndex = 0; // they scroll
    this.element = make("details", "tool", summary, detail);
  }

  update(part) {
    if (part === this.#part) return;
    this.#part = part;
    this.element.dataset.status = part.status;
    const args = parsed(part.args);
    setText(this.#gist, gistOf(args, part.args));
    setText(this.#args, args === undefined ? part.args : JSON.stringify(args, null, 2));
    if (part.status === "calling") {
      setText(this.#outcome, "calling…");
      setText(this.#result, "…");
      return;
    }
    const failed = part.status === "failed";
    setText(this.#outcome, part.result.slice(0, 200) || "nothing");
    setText(this.#label, failed ? "Error" : "Result");
    setText(this.#result, pretty(part.result));
    if (part.endedAt && part.startedAt) {
      setText(this.#time, duration(part.endedAt - part.startedAt));
    }
  }
}

class AgentView {
  #part = null;
  #outcome = make("span", "outcome");

  constructor(part) {
    this.element = make("p", "agent-line", make("span", "name", part.name), this.#outcome);
  }

  update(part) {
    if (part === this.#part) return;
    this.#part = part;
    this.element.dataset.status = part.status;
    setText(this.#outcome, part.message ?? { working: "working…", done: "done" }[part.status]);
  }
}

const PARTS = {
  text: TextView,
  thought: ThoughtView,
  tool: ToolView,
  agent: AgentView,
  asks: AsksView,
};

// A question that the log does not tell of yet.
class AskedView {
  #question = null;
  #words = make("p", "end");
  #buttons = make("span", "choices");
  #actions;

  constructor(question, actions) {
    this.#actions = actions;
    const line = make("div", "line", this.#words, this.#buttons);
    this.element = make("article", "turn pending", questionBox(question.text), line);
  }

  update(question) {
    if (question === this.#question) return;
    this.#question = question;
    this.element.dataset.status = question.state;
    setText(this.#words, WAITING[question.state]?.(question) ?? "");
    this.#buttons.replaceChildren(...this.#choices(question));
  }

  #choices(question) {
    const { again, discard, withdraw } = this.#actions;
    if (question.state === "refused") {
      return [
        makeButton("quiet", "Try again", () => again(question)),
        makeButton("quiet", "Discard", () => discard(question)),
      ];
    }
    if (question.state === "waiting" && question.runId) {
      return [makeButton("quiet", "Withdraw", () => withdraw(question))];
    }
    return [];
  }
}

const WAITING = {
  unsent: () => "Will be sent as soon as there is a connection",
  sending: () => "Sending",
  unknown: () => "Sending",
  accepted: () => "Thinking",
  waiting: () => "Waiting for the answer above",
  withdrawn: () => "Withdrawn",
  refused: ({ why }) => `Not sent. ${why}`,
};

function parsed(json) {
  try {
    return JSON.parse(json);
  } catch {
    return undefined; // still being written, or no JSON
  }
}

function pretty(text) {
  const value = parsed(text);
  return value !== null && typeof value === "object" ? JSON.stringify(value, null, 2) : text;
}

// Arguments in one line: the value alone where there is only one.
function gistOf(args, source) {
  if (args === undefined || args === null || typeof args !== "object") return source;
  const words = (value) => (typeof value === "string" ? value : JSON.stringify(value));
  const entries = Object.entries(args);
  if (entries.length === 1) return words(entries[0][1]);
  return entries.map(([key, value]) => `${key}: ${words(value)}`).join(", ");
}
