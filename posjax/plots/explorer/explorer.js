// The explorer: a text of tokens for each run, colored by what the selected token, as a query, does with the others.

// What can be shown of a pair of tokens. "diverging": numbers of both signs, white at zero.
const QUANTITIES = {
  weight: { label: "attention", digits: 3 },
  gate: { label: "gate", digits: 3, most: 1 },
  position: { label: "contextual position", digits: 2, unit: "tokens" },
  bias: { label: "bias of the score", digits: 3, unit: "nats", diverging: true },
  rotation: { label: "effect of rotation", digits: 3, unit: "nats", diverging: true },
};
const BLUE = [86, 180, 233], ORANGE = [230, 159, 0], MOST_CELLS = 90000;
const TOKENS = DATA.tokens, COUNT = TOKENS.length, ARE_FEW = COUNT * COUNT <= MOST_CELLS;
const state = { query: Math.min(COUNT - 1, Math.floor(COUNT * 0.8)), quantity: "weight" };

function shown(text) {
  return text.replaceAll("\n", "⏎").replaceAll("\r", "␍").replaceAll("\t", "→").replace(/^ +$/, (spaces) => "␣".repeat(spaces.length)) || "∅";
}
function quoted(text) { return `“${shown(text)}”`; }
function spoken(text) {
  return { " ": "space", "\n": "newline", "\t": "tab" }[text] ?? text.trim() ?? "space";
}
function formatted(name, value) {
  const { digits, unit } = QUANTITIES[name];
  return value === null ? "not kept" : value.toFixed(digits) + (unit ? ` ${unit}` : "");
}

// The numbers of one query: {keys, weight, gate, ...}, in the order of the keys. Of masked keys nothing is returned.
async function rowOf(run, layer, head, query) {
  const { arrays } = run.layers[layer];
  const names = Object.keys(QUANTITIES).filter((name) => name in arrays);
  const loaded = await Promise.all(names.map((name) => arrayOf(arrays[name])));
  const width = loaded[0].shape[2], start = (head * COUNT + query) * width;
  const row = Object.fromEntries(names.map((name, place) => [name, loaded[place].values.subarray(start, start + width)]));
  if ("key" in arrays) {
    const keys = (await arrayOf(arrays.key)).values.subarray(start, start + width);
    const end = keys.indexOf(65535), count = end < 0 ? width : end;
    for (const name of names) row[name] = Array.from(row[name].subarray(0, count));
    return { keys: Array.from(keys.subarray(0, count)), ...row };
  }
  const count = run.isCausal ? query + 1 : COUNT;
  for (const name of names) row[name] = Array.from(row[name].subarray(0, count));
  return { keys: Array.from({ length: count }, (_, key) => key), ...row };
}

function colorOf(part, [red, green, blue]) {
  const mixed = (target) => Math.round(255 + (target - 255) * part);
  return `rgb(${mixed(red)} ${mixed(green)} ${mixed(blue)})`;
}

// One run: its controls, its text and its figures.
class Side {
  constructor(run, number) {
    Object.assign(this, { run, number, layer: run.layers.length - 1, head: 0, job: 0 });
    const choice = (label, count, change) => {
      const options = Array.from({ length: count }, (_, n) => element("option", { value: n, text: n + 1 }));
      const id = `${label.toLowerCase()}-${number}`;
      const select = element("select", { id, onchange: () => change(Number(select.value)) }, ...options);
      return [element("span", { class: "field" }, element("label", { for: id, text: label }), select), select];
    };
    const [layerLabel, layers] = choice("Layer", run.layers.length, (layer) => selectHead(this, layer, this.head));
    const [headLabel, heads] = choice("Head", run.heads, (head) => selectHead(this, this.layer, head));
    Object.assign(this, { layers, heads });
    this.spans = TOKENS.map((text, token) => element("span", {
      role: "option", tabindex: "-1", "aria-selected": "false", "data-token": token,
      class: text.startsWith("<") && text.length > 2 && text.endsWith(">") ? "special" : null, text: text.replaceAll("\n", "⏎\n"),
    }));
    this.text = element("div", {
      class: "tokens", role: "listbox", "aria-label": `Tokens of the text, ${run.name}`, "aria-orientation": "horizontal",
      onclick: (event) => { const token = event.target.dataset.token; if (token !== undefined) select(Number(token), this); },
      onkeydown: (event) => this.move(event),
    }, ...this.spans);
    this.note = element("p");
    this.legend = element("div", { class: "legend" });
    this.figure = element("div", { class: "figure" });
    this.rotations = element("div", { class: "figure" });
    this.map = element("div", { class: "figure" });
    this.table = element("div");
    this.rotationPart = element("div", {}, element("h3", { text: "Rotation between the query and each key" }),
      element("p", { text: "Cosine of the angle by which each pair of channels of the query is turned against the key's: 1 is no rotation." }),
      this.rotations);
    this.mapPart = element("div", {}, element("h3", { text: "All queries of this head" }), this.map);
    this.root = element("section", { class: "side", "aria-labelledby": `side-${number}` },
      element("h2", { id: `side-${number}`, text: run.name }), element("div", { class: "controls" }, layerLabel, headLabel),
      this.note, this.text, this.legend, this.figure, this.table, this.rotationPart, this.mapPart);
    this.place = 0;
  }

  // Arrow keys move along the text, and between its lines by the nearest token.
  move(event) {
    const from = state.query, last = COUNT - 1;
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    let to = null;
    if (step) to = from + step;
    else if (event.key === "Home") to = 0;
    else if (event.key === "End") to = last;
    else if (event.key === "ArrowUp" || event.key === "ArrowDown") to = this.onNextLine(from, event.key === "ArrowUp" ? -1 : 1);
    if (to === null || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    select(Math.max(0, Math.min(last, to)), this);
  }

  onNextLine(from, step) {
    const { offsetLeft: left, offsetTop: top } = this.spans[from];
    let best = from, line = null;
    for (let token = from + step; token >= 0 && token < COUNT; token += step) {
      const span = this.spans[token];
      if (Math.abs(span.offsetTop - top) < 4) continue;
      line ??= span.offsetTop;
      if (Math.abs(span.offsetTop - line) >= 4) break;
      if (best === from || Math.abs(span.offsetLeft - left) < Math.abs(this.spans[best].offsetLeft - left)) best = token;
    }
    return best;
  }

  get quantity() { return state.quantity in this.run.layers[this.layer].arrays ? state.quantity : null; }

  async update() {
    const job = ++this.job, { run, layer, head } = this, { query } = state;
    this.layers.value = layer;
    this.heads.value = head;
    const row = state.quantity === "loss" ? { keys: [] } : await rowOf(run, layer, head, query);
    if (job !== this.job) return null;
    this.row = row;
    this.colorTokens(row);
    this.describe(row);
    this.fillTable(row);
    await this.drawRow(row);
    if (job === this.job) await this.drawRotations();
    if (job === this.job) await this.drawMap(job);
    return row;
  }

  colorTokens(row) {
    const name = state.quantity, isLoss = name === "loss";
    const values = new Array(COUNT).fill(null);
    if (isLoss) (this.run.loss ?? []).forEach((loss, token) => { values[token] = loss; });
    else if (this.quantity) row.keys.forEach((key, place) => { values[key] = row[name][place]; });
    const known = values.filter((value) => value !== null);
    const { diverging, most: fixed, label, unit } = isLoss ? { label: "loss", unit: "nats" } : QUANTITIES[name];
    const most = Math.max(fixed ?? 0, ...known.map(Math.abs), 1e-9);
    for (let token = 0; token < COUNT; token++) {
      const span = this.spans[token], value = values[token], part = value === null ? 0 : Math.min(1, Math.abs(value) / most);
      const shade = name === "weight" ? Math.sqrt(part) : part;
      span.style.backgroundColor = part === 0 ? "" : colorOf(shade, value < 0 ? ORANGE : BLUE);
      const isSelected = token === state.query, isMasked = !isLoss && this.run.isCausal && token > state.query;
      span.classList.toggle("masked", isMasked);
      if (span.getAttribute("aria-selected") !== String(isSelected)) span.setAttribute("aria-selected", isSelected);
      const number = isMasked ? "after the query" : value === null ? (isLoss ? "no loss" : `${label} not kept`)
        : `${label} ${isLoss ? `${value.toFixed(2)} nats` : formatted(name, value)}`;
      span.setAttribute("aria-label", `${spoken(TOKENS[token])}, token ${token}, ${number}`);
    }
    this.spans[this.place].tabIndex = -1;
    this.place = state.query;
    this.spans[this.place].tabIndex = 0;
    const stops = diverging ? `${colorOf(1, ORANGE)}, white, ${colorOf(1, BLUE)}` : `white, ${colorOf(1, BLUE)}`;
    const ends = known.length ? [diverging ? -most : 0, most].map((end) => (isLoss ? end.toFixed(2) : end.toFixed(QUANTITIES[name].digits))) : ["", ""];
    const bar = element("span", { class: "bar", style: `background: linear-gradient(to right, ${stops})` });
    const words = known.length ? `${label}${unit ? ` (${unit})` : ""}${name === "weight" ? ", color by its square root" : ""}` : "";
    this.legend.replaceChildren(...(known.length ? [element("span", { text: ends[0] }), bar, element("span", { text: ends[1] }), element("span", { text: words })] : []));
  }

  describe(row) {
    const { encoding, share } = this.run.layers[this.layer];
    let words = `Layer ${this.layer + 1}: ${encoding}. `;
    if (DATA.kept === null) words += "All pairs of tokens are in this page.";
    else {
      words += `This page keeps the ${DATA.kept} largest weights of every query: `;
      words += `${(100 * share[this.head]).toFixed(1)} % of this head's attention`;
      if (row.weight) words += `, ${(100 * row.weight.reduce((sum, weight) => sum + weight, 0)).toFixed(1)} % of this query's`;
      words += ".";
    }
    if (state.quantity !== "loss" && !this.quantity) words += ` This layer's encoding has no ${QUANTITIES[state.quantity].label}.`;
    this.note.textContent = words;
  }

  strongest(row, count) {
    const order = row.keys.map((_, place) => place).sort((a, b) => row.weight[b] - row.weight[a]);
    return order.slice(0, count);
  }

  fillTable(row) {
    if (!row.weight) {
      this.table.replaceChildren();
      return;
    }
    const names = Object.keys(QUANTITIES).filter((name) => name in row);
    const heads = ["token", "index", "distance", ...names.map((name) => (name === "weight" ? "attention" : name))];
    const lines = this.strongest(row, 8).map((place) => [
      shown(TOKENS[row.keys[place]]), row.keys[place], state.query - row.keys[place],
      ...names.map((name) => row[name][place].toFixed(QUANTITIES[name].digits)),
    ]);
    const title = `Largest attention of token ${state.query}, ${quoted(TOKENS[state.query])}${sides.length > 1 ? `: ${this.run.name}` : ""}`;
    this.table.replaceChildren(titledTable(title,
      element("thead", {}, element("tr", {}, ...heads.map((text) => element("th", { scope: "col", text })))),
      element("tbody", {}, ...lines.map((line) => element("tr", {}, ...line.map((text, n) => element(n ? "td" : "th", n ? { text } : { scope: "row", text })))))));
  }

  async drawRow(row) {
    this.figure.hidden = state.quantity === "loss" || !this.quantity;
    if (this.figure.hidden) return;
    const name = state.quantity, counts = name === "gate" || name === "position";
    const texts = row.keys.map((key) => `${key}: ${shown(TOKENS[key])}`);
    const bars = (of, color) => ({
      type: "bar", name: QUANTITIES[of].label, x: row.keys, y: row[of], text: texts, textposition: "none",
      hovertemplate: "%{text}<br>%{y:.4f}<extra></extra>", marker: { color, line: { width: 0 } },
    });
    const traces = counts ? [bars("gate", "#56b4e9")] : [bars(name, "#0072b2")];
    if (counts) {
      traces.push({
        mode: COUNT > 400 ? "lines+markers" : "lines", name: QUANTITIES.position.label, x: row.keys, y: row.position, text: texts, yaxis: "y2",
        line: { color: "#d55e00" }, marker: { size: 4 }, hovertemplate: "%{text}<br>%{y:.3f}<extra></extra>",
      });
    }
    const layout = {
      height: 270, bargap: 0.1, showlegend: counts, hovermode: "closest",
      xaxis: { title: { text: "index of the key (tokens)" }, range: [-0.8, COUNT - 0.2], zeroline: false },
      yaxis: { title: { text: counts ? "gate" : labelOf(name) }, zeroline: true, ...(counts ? { range: [0, 1.05] } : {}) },
      ...(counts ? { yaxis2: { title: { text: "position (tokens)" }, overlaying: "y", side: "right", rangemode: "tozero", showgrid: false }, margin: { l: 60, r: 60, t: 36, b: 48 } } : {}),
      shapes: [{ type: "line", x0: state.query, x1: state.query, yref: "paper", y0: 0, y1: 1, line: { color: "#666", width: 1, dash: "dot" } }],
    };
    await draw(this.figure, traces, layout, `${labelOf(name)} of every key for token ${state.query}. The largest are in the table below.`);
  }

  async drawRotations() {
    const { arrays } = this.run.layers[this.layer], names = ["query_cos", "query_sin", "key_cos", "key_sin"];
    this.rotationPart.hidden = state.quantity !== "rotation" || !("query_cos" in arrays);
    if (this.rotationPart.hidden) return;
    const [a, b, c, d] = await Promise.all(names.map((name) => arrayOf(arrays[name])));
    const [, heads, width] = a.shape, head = heads === 1 ? 0 : this.head;
    const end = this.run.isCausal ? state.query + 1 : COUNT, step = Math.ceil(end / 500);
    const keys = [], z = Array.from({ length: width }, () => []);
    const at = (token) => (token * heads + head) * width;
    for (let key = (end - 1) % step; key < end; key += step) {
      keys.push(key);
      const from = at(state.query), to = at(key);
      for (let n = 0; n < width; n++) z[n].push(a.values[from + n] * c.values[to + n] + b.values[from + n] * d.values[to + n]);
    }
    const trace = { type: "heatmap", x: keys, z, zmin: -1, zmax: 1, colorscale: [[0, "#e69f00"], [0.5, "#ffffff"], [1, "#0072b2"]], colorbar: { title: { text: "cosine" }, thickness: 12 } };
    const layout = { height: 280, xaxis: { title: { text: `index of the key (tokens)${step > 1 ? `, every ${step}th` : ""}` } }, yaxis: { title: { text: "pair of channels" } } };
    await draw(this.rotations, [trace], layout, `Cosine of the rotation between token ${state.query} and every key, by pair of channels.`);
  }

  // The whole matrix of a head, for texts that are short enough.
  async drawMap(job) {
    this.mapPart.hidden = !ARE_FEW || state.quantity === "loss" || !this.quantity;
    if (this.mapPart.hidden) return;
    const name = state.quantity, about = `${name} ${this.layer} ${this.head}`;
    const line = [{ type: "rect", xref: "paper", x0: 0, x1: 1, y0: state.query - 0.5, y1: state.query + 0.5, line: { color: "#d55e00", width: 1.5 } }];
    if (this.mapped === about) {
      (await plotlyReady).relayout(this.map, { shapes: line });
      return;
    }
    const rows = await Promise.all(TOKENS.map((_, query) => rowOf(this.run, this.layer, this.head, query)));
    if (job !== this.job) return;
    const z = rows.map((row) => {
      const values = new Array(COUNT).fill(null);
      row.keys.forEach((key, place) => { values[key] = row[name][place]; });
      return values;
    });
    const { diverging } = QUANTITIES[name];
    const scale = diverging ? [[0, "#e69f00"], [0.5, "#ffffff"], [1, "#0072b2"]] : [[0, "#ffffff"], [0.25, "#a9d8f4"], [1, "#00416b"]];
    const most = diverging ? z.flat().reduce((high, value) => Math.max(high, Math.abs(value ?? 0)), 1e-9) : null;
    const trace = { type: "heatmap", z, colorscale: scale, colorbar: { thickness: 12 }, hovertemplate: "query %{y}, key %{x}: %{z:.4f}<extra></extra>", ...(diverging ? { zmin: -most, zmax: most } : {}) };
    const layout = { height: 420, shapes: line, xaxis: { title: { text: "key (tokens)" } }, yaxis: { title: { text: "query (tokens)" }, autorange: "reversed" } };
    const isNew = this.mapped === undefined;
    await draw(this.map, [trace], layout, `${labelOf(name)} of all pairs of tokens; the marked row is the selected token.`);
    this.mapped = about;
    if (isNew) this.map.on("plotly_click", (event) => select(event.points[0].y, this));
  }
}

function labelOf(name) {
  const { label, unit } = QUANTITIES[name];
  return unit ? `${label} (${unit})` : label;
}

const sides = DATA.runs.map((run, number) => new Side(run, number));

async function updateAll() {
  const rows = await Promise.all(sides.map((side) => side.update()));
  if (rows.includes(null)) return; // a later selection is on its way
  const words = sides.map((side, number) => {
    const row = rows[number], name = sides.length > 1 ? `${side.run.name}: ` : "";
    const where = `${name}layer ${side.layer + 1}, head ${side.head + 1}`;
    const loss = side.run.loss?.[state.query];
    if (state.quantity === "loss") return `${name}${loss === null || loss === undefined ? "no loss" : `loss ${loss.toFixed(2)} nats`}`;
    const best = side.strongest(row, 3).map((place) => `${quoted(TOKENS[row.keys[place]])} (token ${row.keys[place]}) ${row.weight[place].toFixed(3)}`);
    return `${where}: most attention to ${best.join(", ")}`;
  });
  document.getElementById("status").textContent = `Token ${state.query}, ${quoted(TOKENS[state.query])}, selected. ${words.join(". ")}.`;
  drawLosses();
}

function select(token, side) {
  state.query = token;
  const span = side.spans[token];
  span.focus({ preventScroll: true });
  for (const one of sides) {
    const { offsetTop: top } = one.spans[token], { scrollTop, clientHeight } = one.text;
    if (top < scrollTop || top > scrollTop + clientHeight - 30) one.text.scrollTop = top - clientHeight / 2;
  }
  return updateAll();
}

function selectHead(side, layer, head) {
  const isTogether = document.getElementById("together")?.checked;
  for (const one of isTogether ? sides : [side]) {
    if (layer < one.run.layers.length) one.layer = layer;
    if (head < one.run.heads) one.head = head;
  }
  return updateAll();
}

async function drawLosses() {
  const known = DATA.runs.filter((run) => run.loss), section = document.getElementById("loss-section");
  section.hidden = known.length === 0;
  if (section.hidden) return;
  const place = document.getElementById("loss-figure"), isNew = place.data === undefined;
  const line = [{ type: "line", x0: state.query, x1: state.query, yref: "paper", y0: 0, y1: 1, line: { color: "#666", width: 1, dash: "dot" } }];
  if (!isNew) { (await plotlyReady).relayout(place, { shapes: line }); return; }
  const texts = TOKENS.map((text, token) => `${token}: ${shown(text)}`);
  const traces = known.map((run, number) => ({
    type: COUNT <= 400 ? "bar" : "scatter", mode: COUNT <= 400 ? undefined : "markers", name: run.name, y: run.loss, text: texts, textposition: "none",
    marker: { color: ["#0072b2", "#e69f00"][number], size: 4 }, hovertemplate: "%{text}<br>%{y:.3f} nats<extra></extra>",
  }));
  const means = known.map((run) => { const losses = run.loss.filter((loss) => loss !== null); return `${run.name}: ${(losses.reduce((a, b) => a + b, 0) / losses.length).toFixed(3)} nats`; });
  const layout = { height: 280, shapes: line, hovermode: "closest", showlegend: known.length > 1, xaxis: { title: { text: "index of the token (tokens)" } }, yaxis: { title: { text: "loss (nats)" }, rangemode: "tozero" } };
  await draw(place, traces, layout, `Loss of every token. Means: ${means.join("; ")}.`);
  place.on("plotly_click", (event) => select(event.points[0].x, sides[0]));
  place.before(element("p", { text: `Mean: ${means.join("; ")}.` }));
}

function start() {
  document.getElementById("title").textContent = DATA.title;
  const has = (name) => DATA.runs.some((run) => run.layers.some((layer) => name in layer.arrays));
  const options = Object.entries(QUANTITIES).filter(([name]) => has(name)).map(([name, { label }]) => element("option", { value: name, text: label }));
  if (DATA.runs.some((run) => run.loss)) options.push(element("option", { value: "loss", text: "loss of each token" }));
  const quantity = element("select", { id: "quantity", onchange: () => { state.quantity = quantity.value; updateAll(); } }, ...options);
  const controls = document.getElementById("controls");
  controls.append(element("span", { class: "field" }, element("label", { for: "quantity", text: "Colors show" }), quantity));
  if (sides.length > 1) {
    controls.append(element("span", { class: "field" }, element("input", { type: "checkbox", id: "together", checked: "" }),
      element("label", { for: "together", text: "Same layer and head on both sides" })));
  }
  document.getElementById("sides").append(...sides.map((side) => side.root));
  document.getElementById("provenance").append(
    ...DATA.runs.map((run) => factsTable(run.name, run.provenance)), factsTable("This page", DATA.provenance));
  drawFigures();
  return updateAll();
}

const started = start(); // tests wait for it
