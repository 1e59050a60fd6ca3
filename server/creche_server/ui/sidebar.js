// The list of threads: links to open them, and a button on each to delete it.

import { make, makeButton } from "./dom.js";

const DAY = 24 * 3600 * 1000;

// `threads` as GET /threads gives them, the latest first; `actions`: {remove(thread), more()}.
export function showThreads(root, threads, { current, leaving, full }, actions) {
  const focused = document.activeElement?.closest?.("[data-thread]")?.dataset.thread;
  const groups = new Map(); // {heading: <ul>}
  for (const thread of threads) {
    const heading = ageOf(new Date(thread.updated_at));
    if (!groups.has(heading)) groups.set(heading, make("ul"));
    groups.get(heading).append(row(thread, { current, leaving }, actions));
  }
  const sections = [...groups].map(([heading, list]) =>
    make("section", "", make("h2", "", heading), list),
  );
  if (!threads.length) sections.push(make("p", "none", "Threads you begin are listed here."));
  if (full) sections.push(makeButton("quiet more", "Show more", actions.more));
  root.replaceChildren(...sections);
  if (focused) root.querySelector(`[data-thread="${CSS.escape(focused)}"] a`)?.focus();
}

function row(thread, { current, leaving }, { remove }) {
  const title = titleOf(thread);
  const link = make("a", "", make("span", "words", title));
  link.href = `#${encodeURIComponent(thread.thread_id)}`;
  link.title = title;
  if (thread.status === "busy") {
    link.append(make("span", "busy"), make("span", "unseen", " (running)"));
  }
  const button = makeButton("icon", "×", () => remove(thread));
  button.setAttribute("aria-label", `Delete ${title}`);
  button.title = "Delete";
  const item = make("li", "", link, button);
  item.dataset.thread = thread.thread_id;
  if (thread.thread_id === current) link.setAttribute("aria-current", "page");
  if (leaving.has(thread.thread_id)) item.setAttribute("aria-busy", "true");
  return item;
}

export const titleOf = (thread) => thread.title.split("\n", 1)[0].trim() || "Untitled";

function ageOf(moment) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  if (moment >= midnight) return "Today";
  if (moment >= midnight - DAY) return "Yesterday";
  return moment >= midnight - 6 * DAY ? "This week" : "Earlier";
}
