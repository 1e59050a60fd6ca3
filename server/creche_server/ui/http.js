// What the page asks of the server over HTTP, with its session cookie.

// There is no session, or no longer: only a fresh link helps.
export class SessionEndedError extends Error {}

export class FailedError extends Error {
  constructor(status) {
    super(`the server answered ${status}`);
    this.status = status;
  }
}

async function call(path, method = "GET") {
  const answer = await fetch(path, { method, credentials: "same-origin", cache: "no-store" });
  if (answer.status === 401) throw new SessionEndedError("the session has ended");
  if (!answer.ok) throw new FailedError(answer.status);
  return answer.status === 204 ? null : answer.json();
}

const thread = (id) => `/threads/${encodeURIComponent(id)}`;

export const mintTicket = async () => (await call("/auth/tickets", "POST")).ticket;
export const listAgents = () => call("/agents/search", "POST");
export const listThreads = (limit) => call(`/threads?limit=${limit}`);
export const deleteThread = (id) => call(thread(id), "DELETE");

// A thread's messages and the runs that wait; one that nobody has begun has neither.
export async function stateOf(id) {
  try {
    return await call(`${thread(id)}/state`);
  } catch (error) {
    if (error.status !== 404) throw error;
    return { values: { messages: [] }, active_run: null, queued_runs: [] };
  }
}
