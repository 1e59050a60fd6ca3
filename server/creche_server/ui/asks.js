// What a run asks a person: a form for the answer, and what became of it.

import { make, makeButton, setText } from "./dom.js";

export class AsksView {
  #part = null;
  #respond;
  #problem = make("p", "problem");
  #outcome = make("p", "given");
  #form;

  constructor(part, actions) {
    const { interrupt } = part;
    this.#respond = (answer) => actions.respond(part.id, answer);
    this.#problem.setAttribute("role", "alert");
    const words = interrupt.message || "The run asks for something.";
    this.#form = make("form", "", ...fieldsOf(interrupt, this.#respond));
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit(interrupt.responseSchema ?? {});
    });
    this.element = make("section", "asks", make("h3", "", words));
    const call = interrupt.metadata?.creche;
    if (call?.tool_name) {
      this.element.append(make("pre", "", `${call.tool_name} ${indented(call.arguments)}`));
    }
    this.element.setAttribute("aria-label", words);
    this.element.append(this.#form, this.#problem, this.#outcome);
  }

  update(part) {
    if (part === this.#part) return;
    this.#part = part;
    this.element.dataset.state = part.state;
    this.#form.hidden = part.state !== "open" && part.state !== "sending";
    for (const control of this.#form.elements) control.disabled = part.state === "sending";
    setText(this.#problem, part.why ?? "");
    setText(this.#outcome, OUTCOMES[part.state]?.(part) ?? "");
  }

  #submit(schema) {
    try {
      this.#respond({ response: read(this.#form, schema) });
    } catch (error) {
      setText(this.#problem, error.message);
    }
  }
}

const OUTCOMES = {
  answered: ({ interrupt, answer }) => {
    if (interrupt.reason === "tool_call") return answer?.approved ? "Approved" : "Refused";
    return `Answered: ${typeof answer === "string" ? answer : JSON.stringify(answer)}`;
  },
  declined: () => "Declined",
  over: ({ why }) => (why ? "" : "Not answered"),
};

// The controls for an answer: buttons for a yes or a no, a field for words, one for each key of
// an object of plain things, and JSON for all else.
function fieldsOf(interrupt, respond) {
  const schema = interrupt.responseSchema ?? {};
  if (interrupt.reason === "tool_call") {
    const digest = interrupt.metadata?.creche?.digest;
    const say = (approved) => respond({ response: { approved, ...(digest && { digest }) } });
    return [choices(makeButton("go", "Approve", () => say(true)), makeButton("", "Refuse", () => say(false)))];
  }
  const decline = makeButton("", "Decline", () => respond({ status: "cancelled" }));
  if (schema.type === "boolean") {
    const say = (response) => respond({ response });
    return [
      choices(makeButton("go", "Yes", () => say(true)), makeButton("", "No", () => say(false)), decline),
    ];
  }
  const send = make("button", "go", "Answer");
  const keys = keysOf(schema);
  const fields = keys
    ? keys.map(([name, field]) => labelled(field.title ?? name, controlFor(name, field, schema)))
    : [labelled(isWords(schema) || schema.enum ? "Answer" : "Answer, as JSON", controlFor("", schema, schema))];
  return [...fields, choices(send, decline)];
}

const choices = (...buttons) => make("div", "choices", ...buttons);
const isWords = (schema) => schema.type === "string";
const PLAIN = new Set(["string", "integer", "number", "boolean"]);

// The keys of an object whose values are all plain; null for anything else.
function keysOf(schema) {
  const entries = Object.entries(schema.properties ?? {});
  const plain = ([, field]) => field.enum || PLAIN.has(field.type);
  return schema.type === "object" && entries.length && entries.every(plain) ? entries : null;
}

function labelled(words, control) {
  return make("label", "field", make("span", "", words), control);
}

function controlFor(name, field, schema) {
  let control;
  if (field.enum) {
    control = make("select", "", ...field.enum.map((value) => new Option(String(value), JSON.stringify(value))));
    if (field.default !== undefined) control.value = JSON.stringify(field.default);
  } else {
    control = make("input");
    control.autocomplete = "off";
    if (field.type === "boolean") {
      control.type = "checkbox";
      control.checked = field.default === true;
    } else {
      if (field.default !== undefined && field.default !== null) control.value = field.default;
      control.required = field !== schema && (schema.required ?? []).includes(name);
    }
  }
  control.name = name || "answer";
  return control;
}

// What stands in the form, as the schema wants it; the server judges it. Throws for what is no JSON.
function read(form, schema) {
  const keys = keysOf(schema);
  if (!keys) return valueOf(form.elements.namedItem("answer"), schema);
  const given = keys.map(([name, field]) => [name, valueOf(form.elements.namedItem(name), field)]);
  return Object.fromEntries(given.filter(([, value]) => value !== undefined));
}

function valueOf(control, field) {
  if (field.enum) return JSON.parse(control.value);
  if (field.type === "boolean") return control.checked;
  if (field.type === "string") return control.value;
  if (!control.value.trim()) return undefined;
  try {
    return JSON.parse(control.value);
  } catch {
    throw new Error(`This is no ${field.type ?? "JSON"}: ${control.value}`);
  }
}

function indented(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json;
  }
}
