"use strict";
(() => {
  if (window.neuronSparsity) return window.neuronSparsity(); // a notebook that carries this script twice
  const root = document.documentElement;

  // Theme: the system's unless the button, or #theme=dark in the address, says otherwise.
  const button = document.getElementById("theme");
  const themes = ["auto", "light", "dark"];
  const setTheme = (name) => {
    root.dataset.theme = name;
    if (button) button.textContent = "Theme: " + name;
  };
  if (button) {
    button.hidden = false;
    button.addEventListener("click", () => setTheme(themes[(themes.indexOf(root.dataset.theme) + 1) % 3]));
    const asked = /theme=(light|dark)/.exec(location.hash);
    if (asked) setTheme(asked[1]);
  }
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    opened.forEach((part) => (part.open = true));
  });
  addEventListener("afterprint", () => opened.forEach((part) => (part.open = false)));

  const content = (element) => JSON.parse(element.querySelector(":scope > script").textContent);

  // CircuitsVis: each widget replaces its plain text.
  const reachable = (view) => {
    view.querySelectorAll(":scope > div > div:first-child > div").forEach((choice) => {
      if (choice.hasAttribute("tabindex")) return;
      choice.tabIndex = 0;
      choice.setAttribute("role", "button");
      choice.addEventListener("keydown", (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        choice.click();
      });
    });
  };
  let widgets = 0;
  const draw = (element) => {
    const view = element.querySelector(".widget-view");
    view.id = "circuits-vis-" + widgets++;
    if (element.dataset.widget === "ColoredTokensMulti") {
      new MutationObserver(() => reachable(view)).observe(view, { childList: true, subtree: true });
    }
    CircuitsVis.render(view.id, CircuitsVis[element.dataset.widget], content(element));
  };

  // Heat maps: a read-out under the picture, for mouse, touch and arrow keys.
  const unpack = (text) => {
    const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    return Uint16Array.from({ length: bytes.length / 2 }, (_, at) => bytes[2 * at] | (bytes[2 * at + 1] << 8));
  };
  const connect = (element) => {
    const data = content(element);
    const values = unpack(data.values);
    const order = data.order && unpack(data.order);
    const field = element.querySelector(".field");
    const cursor = element.querySelector(".cursor");
    const readout = element.querySelector(".readout");
    const idle = "Hover over the map, or focus it and use the arrow keys, to read single values.";
    let row = 0, column = 0;
    readout.textContent = idle;
    const show = () => {
      const at = row * data.columns + column;
      const raw = values[at];
      const value = raw === 65535 ? "n/a" : (data.low + (raw / 65534) * (data.high - data.low)).toFixed(4);
      let name = data.column + " " + column;
      if (order) name = "neuron " + order[at] + " (" + data.column + " " + (column + 1).toLocaleString("en") + ")";
      if (data.names) name += " “" + data.names[column] + "”";
      readout.textContent = "layer " + data.rows[row] + ", " + name + ": " + data.quantity + " " + value;
      cursor.hidden = false;
      cursor.style.left = (100 * column) / data.columns + "%";
      cursor.style.width = 100 / data.columns + "%";
      cursor.style.top = (100 * row) / data.rows.length + "%";
      cursor.style.height = 100 / data.rows.length + "%";
    };
    const clamp = (value, count) => Math.max(0, Math.min(count - 1, value));
    field.addEventListener("pointermove", (event) => {
      const box = field.getBoundingClientRect();
      column = clamp(Math.floor(((event.clientX - box.left) / box.width) * data.columns), data.columns);
      row = clamp(Math.floor(((event.clientY - box.top) / box.height) * data.rows.length), data.rows.length);
      show();
    });
    field.addEventListener("focus", show);
    field.addEventListener("blur", () => { cursor.hidden = true; readout.textContent = idle; });
    field.addEventListener("pointerleave", () => {
      if (document.activeElement === field) return;
      cursor.hidden = true;
      readout.textContent = idle;
    });
    field.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (!step) return;
      event.preventDefault();
      const by = event.shiftKey ? 10 : 1;
      row = clamp(row + by * step[0], data.rows.length);
      column = clamp(column + by * step[1], data.columns);
      show();
    });
  };

  // A page is connected once; in a notebook every new output calls for what it brought.
  const fresh = (selector) => [...document.querySelectorAll(selector)].filter((element) => {
    if (element.dataset.connected || !element.querySelector(":scope > script")) return false; // drawn, or without data
    element.dataset.connected = "yes";
    return true;
  });
  // The output that brought the style sheet may be cleared while views of other outputs stay: the document keeps it.
  const styles = (root) => [...root.querySelectorAll("style")].filter((style) => style.textContent.startsWith(".ns-view {"));
  const keepStyle = () => styles(document.body).forEach((style) => {
    if (styles(document.head).some((kept) => kept.textContent === style.textContent)) style.remove();
    else document.head.append(style);
  });
  const hostTheme = () => {
    const { dataset: { jpThemeLight }, className } = document.body;
    if (jpThemeLight) return jpThemeLight === "true" ? "light" : "dark";
    const [kind] = /vscode-(?:high-contrast-)?light/.exec(className) || /vscode-(?:dark|high-contrast)/.exec(className) || [];
    return kind && (kind.endsWith("light") ? "light" : "dark");
  };
  const dress = () => {
    const theme = hostTheme();
    if (theme) document.querySelectorAll(".ns-view").forEach((view) => (view.dataset.theme = theme));
  };
  window.neuronSparsity = () => {
    keepStyle();
    if (window.CircuitsVis) fresh("[data-widget]").forEach(draw);
    fresh("[data-heat]").forEach(connect);
    dress();
  };
  window.neuronSparsity();
  if (!styles(document).length) return; // no notebook
  // Notebooks take outputs out of the document and put them back, and change theme, without a script being run again.
  const isView = (node) => node.nodeType === Node.ELEMENT_NODE && (node.matches(".ns-view") || node.querySelector(".ns-view"));
  new MutationObserver((changes) => {
    if (changes.some((change) => [...change.addedNodes].some(isView))) window.neuronSparsity();
  }).observe(document.body, { childList: true, subtree: true });
  new MutationObserver(dress).observe(document.body, { attributes: true, attributeFilter: ["class", "data-jp-theme-light"] });
})();
