// One thread on screen: its wire, what it looks like so far, and what may be done with it.

import { SessionEndedError, stateOf } from "./http.js";
import { newId } from "./id.js";
import * as threads from "./thread.js";
import { LostError, Wire } from "./wire.js";

const OF_RUNS = new Set(["RUN_STARTED", "RUN_FINISHED", "RUN_ERROR"]);

// Owned by whoever made it, who must `close()` it. `hooks`: onChange(), at each change of what is
// below, and onThreads(), when the list of threads has changed.
export class Conversation {
  thread = threads.EMPTY;
  link = { state: "connecting", words: "" };
  stopping = false;
  live = false; // something has happened that is not a replay of the past
  #caughtUpAt = Infinity; // the `seq` that a replay goes up to
  #hooks;
  #wire;

  // `isNew`: nobody but this page knows of it yet.
  constructor(id, isNew, hooks) {
    this.id = id;
    this.isNew = isNew;
    this.#hooks = hooks;
    this.#wire = new Wire(id, {
      position: () => ({ since: this.thread.seq, epoch: this.thread.epoch }),
      onSubscribed: (result) => this.#subscribed(result),
      onEvent: (event) => this.#receive(event),
      onLink: (link) => this.#become({ link }),
      onDeleted: () => this.#deleted(),
    });
  }

  close() {
    this.#wire.close();
  }

  retry() {
    this.#wire.retry();
  }

  get caughtUp() {
    return this.thread.seq >= this.#caughtUpAt;
  }

  // Whether no connection will come any more, unless a person does something about it.
  get over() {
    return this.link.state === "refused" || this.link.state === "deleted";
  }

  // Show a question, and send it as soon as there is a connection.
  ask(text, agent) {
    this.isNew = false;
    const asked = { id: newId(), text, agent };
    this.#change(threads.ask(this.thread, asked));
    if (this.link.state === "open") this.#send(asked);
  }

  // The same for one that the server did not take.
  again(asked) {
    this.#change(threads.mark(this.thread, asked.id, { state: "unsent" }));
    if (this.link.state === "open") this.#send(asked);
  }

  async #send({ id, text, agent }) {
    const mark = (change) => this.#change(threads.mark(this.thread, id, change));
    mark({ state: "sending" });
    const input = { messages: [{ id, role: "user", content: text }] };
    try {
      const reply = await this.#wire.ask("run.start", { input, assistant_id: agent });
      mark({ state: reply.queued ? "waiting" : "accepted", runId: reply.run_id });
    } catch (error) {
      if (error instanceof LostError) mark({ state: "unknown" });
      else if (error.code === "draining") mark({ state: "unsent" });
      else mark({ state: "refused", why: error.message });
    }
  }

  // Answer what a run asks; `answer` is {response}, or {status: "cancelled"} to decline.
  async respond(id, answer) {
    const mark = (change) => this.#change(threads.markAsks(this.thread, id, change));
    mark({ state: "sending", why: "" });
    try {
      await this.#wire.ask("input.respond", { interrupt_id: id, ...answer });
      mark({ state: answer.status ? "declined" : "answered", answer: answer.response });
    } catch (error) {
      if (error instanceof LostError) mark({ state: "open", why: "The connection broke. Try again." });
      else if (error.code === "invalid_argument") mark({ state: "open", why: error.message });
      else mark({ state: "over", why: error.message });
    }
  }

  // Take back a question that was never taken.
  discard({ id }) {
    this.#change(threads.forget(this.thread, id));
  }

  // Cancel a run that waits for its turn. It says so itself once that has come.
  async withdraw({ id, runId }) {
    const mark = (state) => this.#change(threads.mark(this.thread, id, { state }));
    mark("withdrawn");
    await this.#wire.ask("run.cancel", { run_id: runId }).catch(() => mark("waiting"));
  }

  // Stop the run under way; returns once it has ended.
  async stop() {
    const runId = threads.activeRun(this.thread);
    if (runId === null || this.stopping) return;
    this.#become({ stopping: true });
    // If that fails, it ended by itself or the connection broke: the log will tell.
    await this.#wire.ask("run.cancel", { run_id: runId, wait: true }).catch(() => {});
    this.#become({ stopping: false });
  }

  #become(change) {
    Object.assign(this, change);
    this.#hooks.onChange();
  }

  #change(thread) {
    this.#become({ thread });
  }

  #subscribed(result) {
    this.#caughtUpAt = result.since + result.replayed_events;
    this.#change(threads.subscribed(this.thread, result));
    if (this.caughtUp) this.#settle();
  }

  #receive(event) {
    const replay = !this.caughtUp;
    if (!replay) this.live = true;
    this.#change(threads.apply(this.thread, event));
    if (replay && this.caughtUp) this.#settle();
    if (!replay && OF_RUNS.has(event.type)) this.#hooks.onThreads();
  }

  // The log is read to its end: ask for what it does not tell, and send what could not be sent.
  async #settle() {
    if (this.thread.seq || this.thread.asked.some(({ state }) => state !== "unsent")) {
      try {
        const state = await stateOf(this.id);
        this.#change(threads.reconcile(this.thread, state));
      } catch (error) {
        if (error instanceof SessionEndedError) return; // the wire will say so
      }
    }
    const unsent = this.thread.asked.filter(({ state }) => state === "unsent");
    unsent.forEach((asked) => this.#send(asked));
  }

  #deleted() {
    this.#wire.close();
    this.#become({ link: { state: "deleted", words: "This thread was deleted." } });
    this.#hooks.onThreads();
  }
}
