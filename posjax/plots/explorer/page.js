// What both kinds of pages share: the data, arrays, elements, figures and tables.

const DATA = JSON.parse(document.getElementById("data").textContent);
const BLANK_LAYOUT = {
  autosize: true, margin: { l: 60, r: 12, t: 36, b: 48 }, font: { family: "system-ui, sans-serif", size: 13, color: "#1a1a1a" },
  paper_bgcolor: "#fff", plot_bgcolor: "#fff", legend: { orientation: "h", x: 1, xanchor: "right", y: 1, yanchor: "bottom" }, height: 380,
};
const CONFIG = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d"] };

async function unpacked(text) {
  const packed = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// Values of all 65,536 numbers of type float16, made once: browsers have had Float16Array only since 2025.
const HALVES = (() => {
  const values = new Float32Array(65536);
  for (let bits = 0; bits < 65536; bits++) {
    const exponent = (bits >> 10) & 31, fraction = bits & 1023;
    const size = exponent === 0 ? fraction * 2 ** -24
      : exponent === 31 ? (fraction ? NaN : Infinity) : (1 + fraction / 1024) * 2 ** (exponent - 15);
    values[bits] = bits & 32768 ? -size : size;
  }
  return values;
})();

const opened = new Map();

// Returns a promise of {shape, values} of an array of the page, which is decompressed when it is first wanted.
function arrayOf(number) {
  if (!opened.has(number)) {
    opened.set(number, (async () => {
      const { dtype, shape } = DATA.arrays[number];
      const bytes = await unpacked(document.getElementById(`array-${number}`).textContent);
      const count = bytes.length / 2, isHalf = dtype === "float16";
      const values = isHalf ? new Float32Array(count) : new Uint16Array(count);
      for (let i = 0; i < count; i++) {
        const word = bytes[i] | (bytes[count + i] << 8);
        values[i] = isHalf ? HALVES[word] : word;
      }
      return { shape, values };
    })());
  }
  return opened.get(number);
}

const plotlyReady = (async () => {
  const script = document.createElement("script");
  script.textContent = new TextDecoder().decode(await unpacked(document.getElementById("plotly").textContent));
  document.head.append(script);
  return window.Plotly;
})();

// Creates an element: attributes are set, except that "text" is its content and "on..." are listeners.
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "text") made.textContent = value;
    else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

async function draw(place, traces, layout, label) {
  const Plotly = await plotlyReady;
  place.setAttribute("role", "figure");
  place.setAttribute("aria-label", label);
  await Plotly.react(place, traces, { ...BLANK_LAYOUT, ...layout }, CONFIG);
  return place;
}

async function drawFigures() {
  for (const [number, figure] of DATA.figures.entries()) {
    const place = element("div", { class: "figure" });
    const section = element("section", { "aria-labelledby": `figure-${number}` },
      element("h2", { id: `figure-${number}`, text: figure.title }), element("p", { text: figure.description }), place);
    document.getElementById("figures").append(section);
    await draw(place, figure.data, figure.layout, `${figure.title}. ${figure.description} The numbers are in the tables of this page.`);
  }
}

// Returns a heading and a table below it, which scrolls by itself where it is wider than the page.
function titledTable(title, ...parts) {
  const table = element("table", { "aria-label": title }, ...parts);
  const region = element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": title }, table);
  return element("div", {}, element("h3", { text: title }), region);
}

function factsTable(title, facts) {
  const rows = facts.map(([name, value]) => element("tr", {}, element("th", { scope: "row", text: name }), element("td", { text: value })));
  return element("div", {}, element("h3", { text: title }), element("table", { class: "facts", "aria-label": title }, element("tbody", {}, ...rows)));
}
