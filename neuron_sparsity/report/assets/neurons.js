"use strict";
(() => {
  const ROW = 30, SPARE = 8, NONE = 65535;
  const CLASSES = ["dead", "rare", "alive", "always on"], CLASS_STYLES = ["dead", "rare", "alive", "always_on"];

  // Everything that comes from data enters the document here, as text.
  const make = (tag, attributes, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value !== undefined && value !== null) element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  };
  const SVG = "http://www.w3.org/2000/svg";
  const draw = (tag, attributes, ...children) => {
    const element = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };

  const count = (value) => value.toLocaleString("en");
  const number = (value, digits = 3) => {
    if (!Number.isFinite(value)) return "n/a";
    if (value === 0) return "0";
    const size = Math.floor(Math.log10(Math.abs(Number(value.toPrecision(digits)))));
    if (size < -4) return value.toExponential(digits - 1).replaceAll("-", "−");
    const places = Math.max(digits - 1 - size, 0);
    return value.toLocaleString("en", { minimumFractionDigits: places, maximumFractionDigits: places }).replace("-", "−");
  };
  const written = (value, unit) => {
    if (!Number.isFinite(value)) return "n/a";
    if (unit === "percent") return number(100 * value) + " %";
    if (unit === "rise") { // of the loss, in nats; shown as what it does to perplexity
      const percent = 100 * Math.expm1(value);
      return percent > 1000 ? "over +1,000 %" : (percent > 0 ? "+" : "") + number(percent) + " %";
    }
    return unit === "count" ? count(Math.round(value)) : number(value);
  };

  // The layout is that of `_packed.py`.
  const unpack = async (text) => {
    const raw = atob(text.trim()), bytes = new Uint8Array(raw.length);
    for (let at = 0; at < raw.length; at++) bytes[at] = raw.charCodeAt(at);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    const data = new Uint8Array(await new Response(stream).arrayBuffer());
    const length = new DataView(data.buffer).getUint32(0, true);
    const header = JSON.parse(new TextDecoder().decode(data.subarray(4, 4 + length)));
    const sections = {};
    for (const [name, { type, length: n, offset }] of Object.entries(header.sections)) {
      const start = 4 + length + offset, width = Number(type[1]);
      if (width === 1) { sections[name] = data.subarray(start, start + n); continue; }
      const values = width === 2 ? new Uint16Array(n) : new Uint32Array(n);
      for (let plane = 0; plane < width; plane++) {
        const from = start + plane * n, shift = 8 * plane;
        for (let at = 0; at < n; at++) values[at] |= data[from + at] << shift;
      }
      sections[name] = values;
    }
    return { header, sections };
  };

  const decoder = ({ scale, low, high, step }) => (code) => {
    if (code === NONE) return NaN;
    if (scale === "log" && code === 0) return 0;
    const at = low + ((code - 1) / 65533) * (high - low);
    return scale === "log" ? Math.exp(at) : step * Math.sinh(at);
  };

  const explore = (root, { header, sections }, words) => {
    const { n, width, layers } = header;
    const form = root.querySelector("form"), scroller = root.querySelector(".rows-scroll");
    const thead = root.querySelector("thead"), tbody = root.querySelector("tbody");
    const detail = root.querySelector(".detail"), found = root.querySelector(".found");
    const name = (at) => "L" + layers[Math.floor(at / width)] + " · N" + (at % width);
    const decode = Object.fromEntries(header.columns.map((column) => [column.key, decoder(column)]));
    const value = (key, at) => decode[key](sections[key][at]);
    const kindsOf = (at) => header.kinds.filter((_, bit) => sections.kind[at] & (1 << bit));
    const slots = new Map();
    sections.chosen.forEach((at, slot) => slots.set(at, slot));

    // Columns: how a cell reads, and what it sorts by; what has no value comes last in either direction.
    const columns = [
      { key: "neuron", label: "neuron", cell: name, sort: (at) => at },
      { key: "class", label: "class", sort: (at) => sections.class[at],
        cell: (at) => [make("span", { class: "swatch class-" + CLASS_STYLES[sections.class[at]] }), CLASSES[sections.class[at]]] },
      ...header.columns.map(({ key, short, unit }) => ({
        key, label: short, number: true,
        cell: (at) => (key === "n_triggers" && value(key, at) === 0 ? "–" : written(value(key, at), unit)),
        sort: (at) => (sections[key][at] === NONE ? NaN : sections[key][at]),
      })),
    ];
    if (sections.kind) {
      columns.push({ key: "kind", label: "kind", cell: (at) => kindsOf(at).join(", "), sort: (at) => sections.kind[at] || NaN });
    }
    if (sections.removal) {
      columns.push({ key: "removal", label: "can go as", number: true,
        cell: (at) => (sections.removal[at] ? "no. " + count(sections.removal[at]) : "stays"), sort: (at) => sections.removal[at] || NaN });
    }

    // What says most comes first, to be seen on a phone too; kinds where there are none come last.
    const rank = ({ key }) => {
      if (key === "kind" && !sections.kind.some(Boolean)) return columns.length;
      const place = ["neuron", "class", "mean", "removal", "rise", "frequency", "largest", "share", "kind"].indexOf(key);
      return place < 0 ? columns.length - 1 : place;
    };
    columns.sort((a, b) => rank(a) - rank(b));

    let shown = Uint32Array.from({ length: n }, (_, at) => at);
    let order = { key: "mean", down: true }, active = 0, opened = -1;

    const widths = { neuron: name(n - 1).length + 1.2, class: 11.6, mean: 11, rise: 12, frequency: 8, largest: 11, share: 9, kind: 16, logit_kurtosis: 10 };
    const wide = (column) => widths[column.key] || 9;
    scroller.querySelector("table").style.minWidth = columns.reduce((sum, column) => sum + wide(column), 0) + "ch";
    const head = make("tr", { role: "row" });
    columns.forEach((column) => {
      const button = make("button", { type: "button", "data-sort": column.key }, column.label);
      button.addEventListener("click", () => {
        order = { key: column.key, down: order.key === column.key ? !order.down : Boolean(column.number && column.key !== "removal") };
        arrange();
      });
      head.append(make("th", { role: "columnheader", scope: "col", "data-key": column.key, class: column.number ? "number" : null, style: "width:" + wide(column) + "ch" }, button));
    });
    thead.append(head);

    const arrange = () => {
      const column = columns.find(({ key }) => key === order.key), sign = order.down ? -1 : 1;
      const keys = new Float64Array(n);
      for (const at of shown) keys[at] = column.sort(at);
      shown.sort((a, b) => {
        const x = keys[a], y = keys[b];
        if (x === y) return a - b;
        if (x !== x || y !== y) return x !== x ? (y !== y ? a - b : 1) : -1;
        return sign * (x - y);
      });
      head.querySelectorAll("th").forEach((cell) => {
        cell.setAttribute("aria-sort", cell.dataset.key !== order.key ? "none" : order.down ? "descending" : "ascending");
      });
      active = 0;
      scroller.scrollTop = 0;
      render();
    };

    // Search: a place (3:17, L3 N17), a neuron (17), or a text among the tokens of the neurons that bring them along.
    const matcher = (query) => {
      const layer = /^(?:l|layer)\s*(\d+)$/i.exec(query);
      if (layer) return (at) => layers[Math.floor(at / width)] === Number(layer[1]);
      const place = /^(?:l|layer\s*)?(\d+)(?:\s*[:,./·]\s*n?|\s+n?|n)(\d+)$/i.exec(query);
      if (place) {
        const [layer, neuron] = [Number(place[1]), Number(place[2])];
        return (at) => layers[Math.floor(at / width)] === layer && at % width === neuron;
      }
      const single = /^n?(\d+)$/i.exec(query);
      const wanted = query.replaceAll(" ", "·").toLowerCase(), codes = new Set();
      header.strings.forEach((text, index) => { if (text.toLowerCase().includes(wanted)) codes.add(index + 1); });
      const { count: examples, context, at: centre } = header.examples, hits = new Set();
      slots.forEach((slot, at) => {
        for (let k = 0; k < examples; k++) {
          if (codes.has(sections.example_token[(slot * examples + k) * context + centre])) return hits.add(at);
        }
        for (const [list, most] of Object.entries(header.lists)) {
          for (let k = 0; k < most; k++) if (codes.has(sections[list][slot * most + k])) return hits.add(at);
        }
      });
      return single ? (at) => at % width === Number(single[1]) || hits.has(at) : (at) => hits.has(at);
    };

    const filter = () => {
      const data = new FormData(form), query = String(data.get("find")).trim();
      const classes = new Set(data.getAll("class").map(Number)), layer = data.get("layer"), kind = data.get("kind");
      const matches = query ? matcher(query) : null, kept = [];
      const [start, end] = layer === "" ? [0, n] : [Number(layer) * width, (Number(layer) + 1) * width];
      for (let at = start; at < end; at++) {
        if (!classes.has(sections.class[at])) continue;
        if (kind && !(sections.kind[at] & (1 << Number(kind)))) continue;
        if (data.has("removable") && !sections.removal[at]) continue;
        if (data.has("chosen") && !slots.has(at)) continue;
        if (matches && !matches(at)) continue;
        kept.push(at);
      }
      shown = Uint32Array.from(kept);
      found.textContent = count(shown.length) + " of " + count(n);
      scroller.setAttribute("aria-rowcount", shown.length + 1);
      arrange();
    };

    const render = () => {
      const height = scroller.clientHeight || 330;
      const first = Math.max(0, Math.floor(scroller.scrollTop / ROW) - SPARE);
      const last = Math.min(shown.length, Math.ceil((scroller.scrollTop + height) / ROW) + SPARE);
      const space = (rows) => make("tr", { "aria-hidden": "true", class: "space", style: "height:" + rows * ROW + "px" });
      const rows = [space(first)];
      for (let index = first; index < last; index++) {
        const at = shown[index];
        const row = make("tr", { role: "row", id: "neuron-" + at, "data-index": index, "aria-rowindex": index + 2,
          "aria-selected": at === opened, class: index === active ? "active" : null });
        columns.forEach((column, place) => {
          const content = [column.cell(at)].flat();
          row.append(make(place ? "td" : "th", { role: place ? "gridcell" : "rowheader", class: column.number ? "number" : null }, ...content));
        });
        rows.push(row);
      }
      rows.push(space(shown.length - last));
      if (!shown.length) rows.push(make("tr", { role: "row" }, make("td", { role: "gridcell", colspan: columns.length, class: "none" }, "No neuron fits.")));
      tbody.replaceChildren(...rows);
      if (shown.length) scroller.setAttribute("aria-activedescendant", "neuron-" + shown[active]);
      else scroller.removeAttribute("aria-activedescendant");
    };

    const move = (to) => {
      if (!shown.length) return;
      active = Math.max(0, Math.min(shown.length - 1, to));
      const top = active * ROW, visible = scroller.clientHeight - thead.offsetHeight;
      if (top < scroller.scrollTop) scroller.scrollTop = top;
      if (top + ROW > scroller.scrollTop + visible) scroller.scrollTop = top + ROW - visible;
      render();
    };

    // The details of one neuron.
    const heading = (text) => make("h5", {}, text);
    const slotOf = (at) => slots.get(at);
    const tokens = (slot, k) => {
      const { context, at: centre } = header.examples, from = (slot * header.examples.count + k) * context;
      const line = make("div", { class: "tokens" });
      for (let place = 0; place < context; place++) {
        const code = sections.example_token[from + place];
        if (code) line.append(make(place === centre ? "mark" : "span", {}, header.strings[code - 1]));
      }
      return line;
    };
    const missing = (at, what) => {
      const place = layers[Math.floor(at / width)] + ":" + (at % width);
      return make("p", { class: "note" }, what + " of this neuron not in this page: ",
        make("code", {}, "neuron-sparsity report RUNFOLDER --neurons " + place), " brings them along.");
    };
    const examples = (at) => {
      const part = make("div", { class: "examples" }, heading("Top examples")), slot = slotOf(at);
      if (slot === undefined) { part.append(missing(at, "Examples")); return part; }
      const read = decoder({ scale: "log", ...header.examples });
      let any = false;
      for (let k = 0; k < header.examples.count; k++) {
        const place = slot * header.examples.count + k, code = sections.example_value[place];
        if (code === NONE) continue;
        any = true;
        const where = "window " + count(sections.example_window[place]) + ", position " + count(sections.example_pos[place]);
        part.append(make("div", { class: "example" }, make("p", { class: "value-tag", title: where }, number(read(code))), tokens(slot, k)));
      }
      if (!any) part.append(make("p", { class: "note" }, "No example: it contributed on no token after a window's first."));
      else part.append(make("p", { class: "small" }, "Contribution on the marked token; the tokens around it are context."));
      return part;
    };
    const list = (at, key) => {
      const slot = slotOf(at), most = header.lists[key];
      const line = make("p", { class: "chips" });
      for (let k = 0; k < most; k++) {
        const code = sections[key][slot * most + k];
        if (code) line.append(make("span", { class: "chip" }, header.strings[code - 1]));
      }
      return line;
    };
    const texts = (at) => {
      const part = make("div", { class: "texts" }), slot = slotOf(at), lists = header.lists;
      if (!Object.keys(lists).length) return part;
      if (slot === undefined) { part.append(missing(at, "Triggers and logit tokens")); return part; }
      if (lists.triggers) {
        const line = list(at, "triggers");
        part.append(heading("Triggers"), line.childElementCount ? line : make("p", { class: "note" }, "No small set of n-grams covers its activations."));
      }
      if (lists.top_logit_tokens || lists.bottom_logit_tokens) part.append(heading("Direct effect on logits"));
      if (lists.top_logit_tokens) part.append(make("p", { class: "small" }, "pushed up, most first"), list(at, "top_logit_tokens"));
      if (lists.bottom_logit_tokens) part.append(make("p", { class: "small" }, "pushed down, most first"), list(at, "bottom_logit_tokens"));
      return part;
    };

    const histogram = (at) => {
      const { every, bins, edges, thresholds } = header.histogram, part = make("div", { class: "histogram" }, heading("Contributions"));
      const slot = every ? at : slotOf(at);
      if (slot === undefined) { part.append(missing(at, "The histogram")); return part; }
      const codes = sections.histogram.subarray(slot * bins, (slot + 1) * bins), most = Math.log1p(header.tokens);
      const W = 460, H = 190, left = 62, bottom = 40, top = 10, wide = (W - left - 8) / bins, high = H - bottom - top;
      const read = (code) => Math.expm1((code / 255) * most);
      const svg = draw("svg", { class: "chart", viewBox: "0 0 " + W + " " + H, role: "img", "aria-label": "Histogram of the contributions of " + name(at) });
      for (let ten = 1; ten <= header.tokens; ten *= 10) {
        const y = top + high * (1 - Math.log1p(ten) / most);
        svg.append(draw("line", { class: "grid", x1: left, x2: W - 8, y1: y, y2: y }), draw("text", { class: "ytick", x: left - 7, y: y + 4 }, count(ten)));
      }
      const edge = (k) => (edges[k] === null ? "∞" : number(edges[k], 2));
      codes.forEach((code, k) => {
        if (!code) return;
        const tall = (high * code) / 255;
        const said = "about " + count(Math.round(Number(read(code).toPrecision(2)))) + " tokens from " + edge(k) + " to " + edge(k + 1);
        svg.append(draw("rect", { class: "bar", x: left + k * wide + 0.5, y: top + high - tall, width: Math.max(wide - 1, 1), height: tall }, draw("title", {}, said)));
      });
      for (let k = 0; k < bins; k++) {
        if (edges[k] > 0 && Number.isInteger(Math.log2(edges[k]) / 4)) {
          const power = Math.log2(edges[k]);
          svg.append(draw("text", { class: "xtick", x: left + k * wide, y: H - bottom + 16 }, power < 0 && power > -4 ? number(edges[k], 2) : power >= 0 ? String(edges[k]) : "2" + [...String(power)].map((c) => (c === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[c])).join("")));
        }
      }
      if (!svg.querySelector(".xtick[x='" + (left + wide) + "']")) {
        svg.append(draw("text", { class: "xtick", x: left + wide / 2, y: H - bottom + 16 }, "≈0"));
      }
      const cut = thresholds[Math.floor(at / width)];
      if (cut > 0) {
        let k = edges.findIndex((low, index) => low <= cut && (edges[index + 1] === null || cut < edges[index + 1]));
        if (k >= 0) {
          const from = Math.log2(Math.max(edges[k], 2 ** -21)), to = edges[k + 1] ? Math.log2(edges[k + 1]) : from + 1;
          k += Math.max(0, Math.min(1, (Math.log2(cut) - from) / (to - from)));
          svg.append(draw("line", { class: "target", x1: left + k * wide, x2: left + k * wide, y1: top, y2: top + high }, draw("title", {}, "threshold " + number(cut))));
        }
      }
      svg.append(draw("line", { class: "axis", x1: left, x2: W - 8, y1: H - bottom, y2: H - bottom }),
        draw("text", { class: "label", x: left + (W - left) / 2, y: H - 6 }, "contribution" + (cut > 0 ? ", dashed: threshold " + number(cut) : "")),
        draw("text", { class: "label", transform: "translate(11 " + (top + high / 2) + ") rotate(-90)" }, "tokens"));
      part.append(svg);
      return part;
    };

    // Whether the largest contribution is on a token that is never an example, as far as the digits that are shown tell.
    const onFirst = (at) => {
      const slot = slotOf(at);
      if (slot === undefined || !sections.example_first[slot]) return false;
      const top = sections.example_value[slot * header.examples.count];
      return top === NONE || number(decoder({ scale: "log", ...header.examples })(top)) !== number(value("largest", at));
    };
    const facts = (at) => {
      const items = [["class", CLASSES[sections.class[at]]]];
      if (sections.kind && sections.kind[at]) items.push(["kind", kindsOf(at).join(", ")]);
      header.columns.forEach(({ key, label, unit }) => {
        let said = written(value(key, at), unit) + (unit === "bits" ? " bits" : "");
        if (unit === "rise") said = "perplexity " + said + ", " + words.alone;
        if (key === "n_triggers" && value(key, at) === 0) said = "no set of at most 5 tokens covers it";
        if (key === "largest" && onFirst(at)) said += " (on a window's first token, never an example)";
        if (key === "frequency") said += value(key, at) === 0 ? " of " + count(header.tokens) + " tokens; at most " + words.never + " (95 %)" : " of " + count(header.tokens) + " tokens";
        items.push([label, said]);
      });
      if (!words.alone) items.push(["removed alone", "not predicted: this needs gradients, which neuron-sparsity ablate leaves in the run folder"]);
      if (!sections.removal) items.push(["removed with others", "not measured: neuron-sparsity ablate finds what can go"]);
      else {
        const place = sections.removal[at];
        items.push(["removed with others", place
          ? "can go: number " + count(place) + " of " + count(words.nRemovable) + " " + words.removal
          : "stays: not among the " + count(words.nRemovable) + " that can go " + words.removal + (words.alone
            ? ". The set is chosen in the order of the ranking, and the cost alone is not the cost together with others" : "")]);
      }
      return make("dl", {}, ...items.map(([term, text]) => make("div", {}, make("dt", {}, term), make("dd", {}, text))));
    };

    const open = (at, focus) => {
      opened = at;
      const title = make("h4", { tabindex: "-1" }, name(at));
      const close = make("button", { type: "button", class: "close" }, "Close");
      close.addEventListener("click", shut);
      detail.replaceChildren(make("div", { class: "detail-head" }, title, close),
        make("div", { class: "detail-body" }, make("div", {}, facts(at), histogram(at)), make("div", {}, examples(at), texts(at))));
      render();
      if (focus) { title.focus({ preventScroll: true }); detail.scrollIntoView({ block: "nearest" }); }
    };
    const shut = () => {
      opened = -1;
      detail.replaceChildren();
      render();
      scroller.focus({ preventScroll: true });
    };

    if (sections.kind) {
      const select = form.elements.kind, totals = new Array(header.kinds.length).fill(0);
      for (const bits of sections.kind) if (bits) totals.forEach((_, bit) => { totals[bit] += (bits >> bit) & 1; });
      totals.forEach((total, bit) => { if (total) select.append(make("option", { value: bit }, header.kinds[bit] + " (" + count(total) + ")")); });
      select.hidden = select.options.length < 2;
    }
    let waiting = 0;
    scroller.addEventListener("scroll", () => { cancelAnimationFrame(waiting); waiting = requestAnimationFrame(render); });
    const frame = scroller.parentElement, hint = () => {
      frame.classList.toggle("more", scroller.scrollLeft + scroller.clientWidth < scroller.scrollWidth - 2);
    };
    scroller.addEventListener("scroll", hint);
    addEventListener("resize", () => { render(); hint(); });
    tbody.addEventListener("click", (event) => {
      const row = event.target.closest("[data-index]");
      if (!row) return;
      active = Number(row.dataset.index);
      open(shown[active], true);
    });
    scroller.addEventListener("keydown", (event) => {
      if (event.target !== scroller) return;
      const page = Math.max(1, Math.floor(scroller.clientHeight / ROW) - 2);
      const to = { ArrowDown: active + 1, ArrowUp: active - 1, PageDown: active + page, PageUp: active - page, Home: 0, End: shown.length - 1 }[event.key];
      if (to !== undefined) { event.preventDefault(); move(to); }
      else if ((event.key === "Enter" || event.key === " ") && shown.length) { event.preventDefault(); open(shown[active], true); }
    });
    root.addEventListener("keydown", (event) => { if (event.key === "Escape" && opened >= 0) shut(); });
    let typing = 0;
    form.addEventListener("input", () => { clearTimeout(typing); typing = setTimeout(filter, 120); });
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", () => setTimeout(filter));
    root.querySelector(".explorer-off").hidden = true;
    root.querySelector(".explorer-on").hidden = false;
    filter();
    hint();
    const asked = /neuron=(\d+):(\d+)/.exec(location.hash), row = asked ? layers.indexOf(Number(asked[1])) : -1;
    if (row >= 0) root.scrollIntoView();
    const place = row >= 0 && Number(asked[2]) < width ? shown.indexOf(row * width + Number(asked[2])) : 0;
    if (shown.length) { move(place); open(shown[active], false); }
  };

  document.querySelectorAll("[data-neurons]").forEach(async (root) => {
    if (typeof DecompressionStream === "undefined") return;
    const [words, data] = root.querySelectorAll(":scope > script");
    explore(root, await unpack(data.textContent), JSON.parse(words.textContent));
    data.textContent = "";
    root.dataset.ready = "true";
  });
})();
