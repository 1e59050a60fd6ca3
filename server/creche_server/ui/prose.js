// A model's words as DOM nodes: a small part of Markdown, read while it is still being written.
//
// Known are paragraphs, headings, lists, code fences, inline code, bold and italics; the rest is
// text. Nodes are made one by one and words are only ever put into text nodes, so nothing that a
// model or a person writes can become markup.
//
// Text only grows, and a block that another one follows is never read differently later: so each
// update reads from the start of the last block on, and touches nothing before it.

import { make } from "./dom.js";

const FENCE = /^ {0,3}(```+|~~~+)\s*([\w+#.-]*)/;
const HEADING = /^#{1,6}\s+(\S.*)$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
// What is marked up is short: without a bound, words full of marks that nothing closes would be
// searched to their end again at every mark.
const CODE = /(`{1,3})(?!`)(.{1,400}?)(?<!`)\1(?!`)/;
const BOLD = /\*\*(?=\S)(.{1,400}?)(?<=\S)\*\*/;
const ITALIC = /(?<![\w*])\*(?=[^\s*])([^*\n]{1,400}?)(?<=\S)\*(?![\w*])/; // 2*3*4 has none
const INLINE = new RegExp([CODE, BOLD, ITALIC].map(({ source }) => source).join("|"), "g");

// Nothing grows without end, as laying it out again would take longer with every word: from so many
// characters on, a paragraph goes on in another at the next end of a sentence (or of a word, if
// there is none for as long again), and code in another element at the next line.
const LONG = 4096;

// The blocks that `source` is made of: [{kind, source, ...}], their sources in order being the
// whole of it. `goesOn`: it begins within a line of a paragraph that was cut.
export function blocksOf(source, goesOn = false) {
  const blocks = [];
  let block = null;
  const begin = (next) => blocks.push((block = next));
  if (goesOn) begin(paragraph("", true));
  let within = goesOn;
  for (const line of source.match(/[^\n]*\n|[^\n]+$/g) ?? []) {
    const text = line.replace(/\r?\n$/, "");
    if (within) {
      block.body += line;
    } else if (block?.kind === "code" && !block.closed) {
      block.closed = closes(block.fence, text);
      if (!block.closed) block.body += line;
    } else if (!text.trim()) {
      if (!block) begin(paragraph(""));
      block.ended = true;
    } else {
      const next = blockAt(text, block);
      if (next) begin(next);
      if (block.kind === "list") addToList(block, text);
      else if (block.kind === "paragraph") block.body += line;
    }
    within = false;
    block.source += line;
    for (let cut = cutOf(block); cut; cut = cutOf(block)) {
      const rest = paragraph(block.body.slice(cut), true);
      block.body = block.body.slice(0, cut);
      block.source = block.source.slice(0, block.source.length - rest.source.length);
      begin(rest);
    }
  }
  return blocks;
}

const paragraph = (words, goesOn = false) => ({
  kind: "paragraph",
  source: words,
  body: words,
  goesOn,
});

// Where a paragraph that is too long is cut; 0 if it is not.
function cutOf({ kind, body }) {
  if (kind !== "paragraph" || body.length <= LONG) return 0;
  const sentence = body.indexOf(". ", LONG) + 2;
  if (sentence > 1 && sentence < 2 * LONG) return sentence;
  return body.length < 2 * LONG ? 0 : body.indexOf(" ", 2 * LONG) + 1;
}

// The block that begins with this line, or null where the line goes on with the one before.
function blockAt(text, before) {
  const open = before && !before.ended && !before.closed ? before : null;
  const fence = FENCE.exec(text);
  if (fence) return { kind: "code", source: "", fence: fence[1], language: fence[2], body: "" };
  const heading = HEADING.exec(text);
  if (heading) return { kind: "heading", source: "", body: heading[1], ended: true };
  const item = ITEM.exec(text);
  if (item && open?.kind !== "list") {
    const start = parseInt(item[2], 10); // of a bulleted list, NaN
    // In mid-paragraph, a line such as “1986. What a year” is no list.
    if (open?.kind !== "paragraph" || !(start > 1)) {
      return { kind: "list", source: "", start, items: [] };
    }
  }
  return open ? null : paragraph("");
}

function addToList(list, text) {
  const item = ITEM.exec(text);
  if (item) list.items.push({ depth: Math.min(3, item[1].length >> 1), body: item[3] });
  else list.items.at(-1).body += `\n${text.trim()}`;
}

const closes = (fence, text) => {
  const line = text.trim();
  return line.length >= fence.length && line === fence[0].repeat(line.length);
};

// Shows one message in `element`.
export class Prose {
  #element;
  #text = "";
  #settled = 0; // characters before the last block
  #last = null; // {block, body, node} of the last block

  constructor(element) {
    this.#element = element;
  }

  update(text) {
    if (text === this.#text) return;
    if (!text.startsWith(this.#text)) {
      this.#element.replaceChildren();
      this.#settled = 0;
      this.#last = null;
    }
    this.#text = text;
    let before = null;
    const goesOn = this.#last?.block.goesOn;
    for (const block of blocksOf(text.slice(this.#settled), goesOn)) {
      if (before) {
        this.#settled += before.source.length;
        this.#last = null;
      }
      this.#show(block);
      before = block;
    }
  }

  #show(block) {
    const body = bodyOf(block);
    const last = this.#last;
    if (last?.block.kind === block.kind && canAppend(block.kind, last.body, body)) {
      append(last.node, body.slice(last.body.length));
      this.#last = { block, body, node: last.node };
      return;
    }
    const node = render(block, body);
    if (last) last.node.replaceWith(node);
    else this.#element.append(node);
    this.#last = { block, body, node };
  }
}

// What is shown of a block of words, which the newlines at its end are not; null for other blocks.
function bodyOf({ kind, body }) {
  if (kind !== "code" && kind !== "paragraph") return null;
  let end = body.length;
  while (body[end - 1] === "\n") end -= 1;
  return body.slice(0, end);
}

// Whether more words can simply be added: always to code, to a paragraph if they mark nothing up.
function canAppend(kind, before, after) {
  if (!before || !after?.startsWith(before)) return false;
  return kind === "code" || !/[`*]/.test(after.slice(before.length));
}

function append(node, words) {
  if (node.localName === "pre") appendCode(node, words);
  else if (node.lastChild?.nodeType === Node.TEXT_NODE) node.lastChild.appendData(words);
  else node.append(words);
}

function appendCode(pre, words) {
  while (words) {
    let code = pre.lastChild;
    if (!code || (code.firstChild?.length >= LONG && code.firstChild.data.endsWith("\n"))) {
      code = pre.appendChild(make("code", "", "")); // with an empty text node in it
    }
    const text = code.firstChild;
    const line = words.indexOf("\n", Math.max(0, LONG - text.length)) + 1;
    text.appendData(line ? words.slice(0, line) : words);
    words = line ? words.slice(line) : "";
  }
}

function render(block, body) {
  if (block.kind === "code") {
    const pre = make("pre");
    appendCode(pre, body);
    pre.tabIndex = 0; // scrolls sideways, so the keyboard must reach it
    if (block.language) pre.dataset.language = block.language;
    return pre;
  }
  if (block.kind === "heading") return make("p", "heading", ...inline(block.body));
  if (block.kind === "list") {
    const list = make(Number.isNaN(block.start) ? "ul" : "ol");
    if (block.start > 1) list.start = block.start;
    for (const { depth, body: words } of block.items) {
      list.append(make("li", depth ? `deep-${depth}` : "", ...inline(words)));
    }
    return list;
  }
  return make("p", block.goesOn ? "goes-on" : "", ...inline(body));
}

// Words with inline code, bold and italics in them, as nodes and strings.
function inline(words) {
  const nodes = [];
  let at = 0;
  for (const match of words.matchAll(INLINE)) {
    const [whole, , code, bold, italic] = match;
    if (match.index > at) nodes.push(words.slice(at, match.index));
    if (code) nodes.push(make("code", "", code));
    else nodes.push(make(bold ? "strong" : "em", "", ...inline(bold ?? italic)));
    at = match.index + whole.length;
  }
  if (at < words.length) nodes.push(words.slice(at));
  return nodes;
}
