// One socket on one thread: tickets, replies matched to commands, and coming back by itself.
//
// The wire knows nothing of what events mean. After every connect it subscribes from the position
// that its owner tells it, so an owner that keeps (epoch, seq) misses and repeats nothing.

import { mintTicket, SessionEndedError } from "./http.js";

const SUBPROTOCOL = "ag-ui.v1";
const FIRST_DELAY = 400; // milliseconds
const GROWTH = 1.6; // of the delay, at each failure in a row
const LONGEST_DELAY = 15_000;

const RESTARTING = 1012; // RFC 6455's registry: "Service Restart"
const FINAL = {
  4400: "The server does not accept this thread’s address.",
  4401: "Your session has ended. Type “creche link” in a terminal to get a fresh link.",
  4403: "The server does not let this page connect.",
  4404: "There is no such thread.",
  4429: "Too many tabs and terminals are connected. Close one, then try again.",
};

// The server said no; `code` is its word for why.
export class RefusedError extends Error {
  constructor({ error, message }) {
    super(message);
    this.code = error;
  }
}

// The socket went away before the answer: the command may have arrived or not.
export class LostError extends Error {}

// Owned by whoever made it, who must `close()` it. `hooks`:
//   position()     -> {since, epoch} to subscribe with
//   onSubscribed(result), onEvent(event), onDeleted()
//   onLink(link)   {state, words}: connecting, open, lost, restarting, or refused, which is final
export class Wire {
  #threadId;
  #hooks;
  #socket = null;
  #timer = null;
  #connecting = false; // and there is no socket yet
  #failures = 0; // in a row
  #commands = 0;
  #waiting = new Map(); // {command id: {resolve, reject}}
  #ended = new AbortController();

  constructor(threadId, hooks) {
    this.#threadId = threadId;
    this.#hooks = hooks;
    const { signal } = this.#ended;
    window.addEventListener("online", () => this.#hurry(), { signal });
    document.addEventListener("visibilitychange", () => this.#hurry(), { signal });
    this.#connect();
  }

  // Send a command; its result. Throws RefusedError or LostError.
  ask(method, params) {
    if (this.#socket?.readyState !== WebSocket.OPEN) {
      return Promise.reject(new LostError("there is no connection"));
    }
    const id = ++this.#commands;
    this.#socket.send(JSON.stringify({ id, method, params }));
    return new Promise((resolve, reject) => this.#waiting.set(id, { resolve, reject }));
  }

  // Once more, after a refusal that a person may have mended.
  retry() {
    if (this.#connecting || this.#socket || this.#timer) return;
    this.#failures = 0;
    this.#connect();
  }

  close() {
    this.#ended.abort();
    clearTimeout(this.#timer);
    this.#socket?.close(1000);
    this.#lose();
  }

  async #connect() {
    this.#timer = null;
    this.#connecting = true;
    if (!this.#failures) this.#tell("connecting", "Connecting…");
    let ticket;
    try {
      ticket = await mintTicket();
    } catch (error) {
      if (error instanceof SessionEndedError) this.#tell("refused", FINAL[4401]);
      else this.#tryAgain("lost", "The server does not answer. Trying again…");
      return;
    } finally {
      this.#connecting = false;
    }
    if (this.#ended.signal.aborted) return;
    const url = new URL(`/threads/${encodeURIComponent(this.#threadId)}/stream/events`, location);
    url.protocol = url.protocol.replace("http", "ws");
    url.searchParams.set("ticket", ticket);
    const socket = new WebSocket(url, SUBPROTOCOL);
    this.#socket = socket;
    socket.onopen = () => this.#subscribe();
    socket.onmessage = ({ data }) => this.#receive(JSON.parse(data));
    socket.onclose = ({ code, reason }) => {
      if (this.#socket === socket) this.#closed(code, reason);
    };
  }

  async #subscribe() {
    try {
      const params = { channels: [], ...this.#hooks.position() };
      const result = await this.ask("subscription.subscribe", params);
      // Before any event: those are later tasks, and this is the reply's own.
      this.#failures = 0;
      this.#hooks.onSubscribed(result);
      this.#tell("open", "");
    } catch (error) {
      if (error instanceof RefusedError) this.#socket.close(); // and come back later
      else if (!(error instanceof LostError)) throw error;
    }
  }

  #receive(message) {
    if (this.#ended.signal.aborted) return;
    if (message.type !== "success" && message.type !== "error") {
      this.#hooks.onEvent(message);
      return;
    }
    const waiting = this.#waiting.get(message.id);
    this.#waiting.delete(message.id);
    if (message.type === "success") waiting?.resolve(message.result);
    else if (waiting) waiting.reject(new RefusedError(message));
    else if (message.error === "no_such_thread") this.#hooks.onDeleted();
  }

  #closed(code, reason) {
    this.#socket = null;
    this.#lose();
    if (code >= 4400 && code < 4500) {
      this.#tell("refused", FINAL[code] ?? `The server refused the connection: ${reason || code}.`);
    } else if (code === RESTARTING) {
      this.#tryAgain("restarting", "The server is restarting. This page will reconnect by itself.");
    } else {
      this.#tryAgain("lost", "The connection is lost. Reconnecting…");
    }
  }

  #lose() {
    const waiting = [...this.#waiting.values()];
    this.#waiting.clear();
    for (const { reject } of waiting) reject(new LostError("the connection was lost"));
  }

  #tryAgain(state, words) {
    if (this.#ended.signal.aborted) return;
    if (!this.#failures) this.#tell(state, words); // the first reason is the one to know
    const delay = Math.min(LONGEST_DELAY, FIRST_DELAY * GROWTH ** this.#failures);
    this.#failures += 1;
    // Spread out, so that a restarted server does not meet all its pages at once.
    this.#timer = setTimeout(() => this.#connect(), delay * (0.75 + Math.random() / 2));
  }

  #hurry() {
    if (!this.#timer || document.hidden) return;
    clearTimeout(this.#timer);
    this.#connect();
  }

  #tell(state, words) {
    if (!this.#ended.signal.aborted) this.#hooks.onLink({ state, words });
  }
}
