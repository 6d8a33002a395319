// What both pages share: the data, small builders, light and dark.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);

const byId = (id) => document.getElementById(id);

/// An element with attributes and children; text stays text.
function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "g", "rect", "line", "text", "title", "path"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function showFacts(facts) {
  byId("facts").append(...facts.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
}

const isDark = () => document.documentElement.dataset.theme === "dark";

/// Follows the system until the reader chooses; `redraw` runs after every change.
function followTheme(redraw) {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const button = byId("theme");
  const set = (dark) => {
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    button.textContent = dark ? "Light" : "Dark";
    button.setAttribute("aria-label", dark ? "Switch to light colours" : "Switch to dark colours");
    redraw();
  };
  system.addEventListener("change", () => set(system.matches));
  button.addEventListener("click", () => set(!isDark()));
  set(system.matches);
}

/// Arrow keys, Home and End move inside a row of controls of which one is in the tab order.
function arrowStep(event, index, count) {
  const step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
  if (step !== undefined) return (index + step + count) % count;
  return { Home: 0, End: count - 1 }[event.key];
}

/// A group of buttons of which exactly one is on.
function radioGroup(group, onPick) {
  const buttons = [...group.children];
  const mark = (chosen) => buttons.forEach((button, i) => {
    button.setAttribute("role", "radio");
    button.setAttribute("aria-checked", String(i === chosen));
    button.tabIndex = i === chosen ? 0 : -1;
  });
  buttons.forEach((button, i) => button.addEventListener("click", () => onPick(i)));
  group.setAttribute("role", "radiogroup");
  group.addEventListener("keydown", (event) => {
    const next = arrowStep(event, buttons.indexOf(document.activeElement), buttons.length);
    if (next === undefined) return;
    event.preventDefault();
    buttons[next].focus();
    onPick(next);
  });
  return mark;
}
