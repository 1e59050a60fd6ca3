// Making nodes. Words go in as text nodes: there is no innerHTML anywhere in this page.

// An element with a class and children; a string among them becomes a text node.
export function make(tag, className = "", ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

export function makeButton(className, words, onClick) {
  const button = make("button", className, words);
  button.type = "button";
  button.addEventListener("click", onClick);
  return button;
}

// Set words only where they differ: a live region speaks at each change.
export function setText(element, words) {
  if (element.textContent !== words) element.textContent = words;
}
