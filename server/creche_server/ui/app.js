// The page: one thread at a time, in the address as #THREAD-ID; what is asked, stopped, deleted.

import { Conversation } from "./conversation.js";
import { make, makeButton, setText } from "./dom.js";
import { deleteThread, listAgents, listThreads } from "./http.js";
import { newId } from "./id.js";
import { showThreads, titleOf } from "./sidebar.js";
import { activeRun, activity, ending } from "./thread.js";
import { Transcript } from "./view.js";

const THREADS_AT_ONCE = 50;
const REFRESH = 4000; // milliseconds, while a run is under way that is not on screen
const NEAR_THE_END = 48; // pixels from the bottom that still count as being there
const EXAMPLES = [
  "What is 37 × 91?",
  "What time is it in Tokyo?",
  "What have we talked about before?",
];

const $ = (id) => document.getElementById(id);
const scroller = $("scroller");
const question = $("question");

let open = null; // the Conversation on screen
let transcript = null; // the view of it
let listed = []; // threads, the latest first
let wanted = THREADS_AT_ONCE; // how many of them
let frame = 0; // the animation frame that is asked for
let atEnd = true; // the reader is at the bottom, and is kept there
const leaving = new Set(); // ids of threads that are being deleted

// --- rendering, once per animation frame at most

function render() {
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    transcript.show(open.thread);
    showControls();
    if (atEnd) scroller.scrollTop = scroller.scrollHeight;
    $("latest").hidden = atEnd;
  });
}

function showControls() {
  const { thread, link, stopping, caughtUp, isNew, live, over } = open;
  const last = thread.turns.at(-1);
  const running = activeRun(thread) !== null;
  const empty = !thread.turns.length && !thread.asked.length;

  $("welcome").hidden = !empty || !(isNew || caughtUp);
  const stop = $("stop");
  if (!running && document.activeElement === stop) question.focus();
  stop.hidden = !running;
  stop.disabled = stopping || link.state !== "open";
  setText($("stop-words"), stopping ? "Stopping" : "Stop");
  $("send").disabled = !question.value.trim() || over;
  showTitle();

  const notice = $("notice");
  notice.dataset.state = link.state;
  notice.hidden = !link.words || leaving.has(open.id);
  setText($("notice-words"), link.words);
  $("notice-action").hidden = !over;
  setText($("notice-action"), link.state === "deleted" ? "New thread" : "Try again");

  // Said aloud is what happens from now on, not the past.
  if (live && last) setText($("status"), activity(last) || ending(last));
}

function showTitle() {
  const known = listed.find((thread) => thread.thread_id === open.id);
  const first = open.thread.turns[0]?.questions[0] ?? open.thread.asked[0];
  const title = known || first ? titleOf(known ?? { title: first.text }) : "";
  setText($("title"), title || "New thread");
  const name = title ? `${title} – creche` : "creche";
  if (document.title !== name) document.title = name;
}

function look() {
  atEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR_THE_END;
  $("latest").hidden = atEnd;
}

scroller.addEventListener("scroll", look);
scroller.addEventListener("toggle", look, true); // who opens a tool call wants to read it
new ResizeObserver(() => {
  if (atEnd) scroller.scrollTop = scroller.scrollHeight;
}).observe(scroller);

$("latest").addEventListener("click", () => {
  scroller.scrollTop = scroller.scrollHeight;
  question.focus();
});
$("notice-action").addEventListener("click", () => {
  if (open.link.state === "deleted") goToNew();
  else open.retry();
});

// --- which thread

function follow() {
  const id = idInAddress();
  if (open && (id ? open.id === id : open.isNew)) return;
  show(id || newId(), !id);
}

function idInAddress() {
  const id = location.hash.slice(1);
  try {
    return decodeURIComponent(id);
  } catch {
    return id; // typed by hand, with a % in it
  }
}

function show(id, isNew) {
  open?.close();
  $("transcript").replaceChildren();
  setText($("status"), "");
  const conversation = new Conversation(id, isNew, {
    onChange: render,
    onThreads: refreshThreads,
  });
  open = conversation;
  transcript = new Transcript($("transcript"), {
    again: (asked) => conversation.again(asked),
    discard: (asked) => conversation.discard(asked),
    withdraw: (asked) => conversation.withdraw(asked),
    respond: (id, answer) => conversation.respond(id, answer),
  });
  atEnd = true;
  closeDrawer();
  render();
  renderThreads();
  if (matchMedia("(pointer: fine)").matches) question.focus();
}

function goToNew() {
  if (open.isNew) {
    closeDrawer();
    question.focus();
    return;
  }
  history.pushState(null, "", location.pathname);
  show(newId(), true);
}

window.addEventListener("hashchange", follow);
window.addEventListener("popstate", follow);
$("new").addEventListener("click", goToNew);

// --- the list of threads

let refreshing = false;
let stale = false; // since the answer that is under way was asked for
let again = null; // the timer of the next look

async function refreshThreads() {
  stale = true;
  if (refreshing) return;
  refreshing = true;
  while (stale) {
    stale = false;
    try {
      listed = await listThreads(wanted);
    } catch {
      // The list stays as it was; the wire says what is wrong.
    }
  }
  refreshing = false;
  renderThreads();
  render();
  clearTimeout(again);
  const busy = listed.filter((thread) => thread.status === "busy" && thread.thread_id !== open.id);
  if (busy.length && !document.hidden) again = setTimeout(refreshThreads, REFRESH);
}

function renderThreads() {
  const shown = listed.map((thread) => {
    if (thread.thread_id !== open.id) return thread;
    return { ...thread, status: activeRun(open.thread) ? "busy" : "idle" }; // we know better
  });
  const state = { current: open.id, leaving, full: listed.length >= wanted && wanted < 1000 };
  showThreads($("threads"), shown, state, { remove: confirmRemoval, more: showMore });
}

function showMore() {
  wanted = Math.min(1000, wanted * 2);
  refreshThreads();
}

document.addEventListener("visibilitychange", () => {
  if (!document.hidden) refreshThreads();
});

const confirmation = $("confirm");
let condemned = null;

function confirmRemoval(thread) {
  condemned = thread;
  const running = thread.status === "busy" ? " What runs on it is stopped." : "";
  setText($("confirm-words"), `“${titleOf(thread)}” and its answers are gone for good.${running}`);
  confirmation.showModal();
}

$("confirm-keep").addEventListener("click", () => confirmation.close());
$("confirm-delete").addEventListener("click", () => {
  confirmation.close();
  remove(condemned);
});

async function remove(thread) {
  const id = thread.thread_id;
  leaving.add(id);
  renderThreads();
  try {
    await deleteThread(id);
    listed = listed.filter((other) => other.thread_id !== id);
    if (open.id === id) {
      history.replaceState(null, "", location.pathname);
      show(newId(), true);
    }
  } catch {
    setText($("status"), "The thread could not be deleted.");
  }
  leaving.delete(id);
  renderThreads();
  refreshThreads();
}

// --- the composer

function submit() {
  const text = question.value.trim();
  if (!text || open.over) return;
  if (open.isNew) history.replaceState(null, "", `#${encodeURIComponent(open.id)}`);
  question.value = "";
  fit();
  atEnd = true;
  open.ask(text, $("agent").value || undefined); // undefined: the server's own default
}

// As tall as its words, up to what the style sheet allows.
function fit() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
question.addEventListener("keydown", (event) => {
  // Enter that ends the composing of a Japanese word, say, is no wish to send.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
question.addEventListener("input", () => {
  fit();
  render();
});
$("stop").addEventListener("click", () => {
  open.stop();
  question.focus(); // a button that is disabled, as this one is now, loses the focus to nowhere
});
$("skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address holds the thread
  question.focus();
});

// --- agents

async function offerAgents() {
  let agents;
  try {
    agents = await listAgents();
  } catch {
    return; // the server's own default it is
  }
  const choice = $("agent");
  choice.replaceChildren(...agents.map((agent) => new Option(agent.name, agent.agent_id)));
  $("agent-choice").hidden = agents.length < 2;
  const describe = () => {
    const agent = agents.find(({ agent_id }) => agent_id === choice.value);
    setText($("about"), agent?.description ?? "");
    const examples = agent?.agent_id === "assistant" ? EXAMPLES : [];
    const buttons = examples.map((words) => makeButton("", words, () => suggest(words)));
    $("examples").replaceChildren(...buttons.map((button) => make("li", "", button)));
  };
  choice.addEventListener("change", describe);
  describe();
}

function suggest(words) {
  question.value = words;
  fit();
  question.focus();
  render();
}

// --- the drawer, which the list is on a narrow screen

function openDrawer() {
  document.body.classList.add("drawer");
  $("scrim").hidden = false;
  $("main").inert = true;
  $("menu").setAttribute("aria-expanded", "true");
  $("new").focus();
}

function closeDrawer() {
  if (!document.body.classList.contains("drawer")) return;
  document.body.classList.remove("drawer");
  $("scrim").hidden = true;
  $("main").inert = false;
  $("menu").setAttribute("aria-expanded", "false");
  $("menu").focus();
}

$("menu").addEventListener("click", openDrawer);
$("scrim").addEventListener("click", closeDrawer);
$("threads").addEventListener("click", (event) => {
  if (event.target.closest("a")) closeDrawer();
});
matchMedia("(min-width: 760px)").addEventListener("change", closeDrawer);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") closeDrawer();
});

follow();
offerAgents();
refreshThreads();
