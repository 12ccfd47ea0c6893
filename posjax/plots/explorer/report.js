// The report: tables that sort, figures, and where the results come from.

// A cell is a text, or {text, value} with the number by which it sorts; null sorts last.
function textOf(cell) { return cell !== null && typeof cell === "object" ? cell.text : cell ?? ""; }
function valueOf(cell) { return cell !== null && typeof cell === "object" ? cell.value : cell; }

function compared(a, b) {
  if (a === null || b === null) return (a === null) - (b === null);
  return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
}

function sortedTable({ caption, columns, rows }) {
  const body = element("tbody"), heads = [];
  const show = (order) => body.replaceChildren(...order.map((row) =>
    element("tr", {}, ...row.map((cell, place) => element(place ? "td" : "th", place ? { text: textOf(cell) } : { scope: "row", text: textOf(cell) })))));
  const sortBy = (place) => {
    const isRising = heads[place].getAttribute("aria-sort") !== "ascending";
    heads.forEach((head) => head.setAttribute("aria-sort", "none"));
    heads[place].setAttribute("aria-sort", isRising ? "ascending" : "descending");
    const order = [...rows].sort((a, b) => {
      const [x, y] = [valueOf(a[place]), valueOf(b[place])];
      return x === null || y === null || isRising ? compared(x, y) : compared(y, x);
    });
    show(order);
    document.getElementById("status").textContent = `${caption}: sorted by ${columns[place]}, ${isRising ? "ascending" : "descending"}.`;
  };
  columns.forEach((name, place) => heads.push(element("th", { scope: "col", "aria-sort": "none" },
    element("button", { type: "button", text: name, onclick: () => sortBy(place) }))));
  show(rows);
  return titledTable(caption, element("thead", {}, element("tr", {}, ...heads)), body);
}

document.getElementById("title").textContent = DATA.title;
document.getElementById("heading").textContent = DATA.heading;
document.getElementById("tables").append(...DATA.tables.map(sortedTable));
document.getElementById("provenance").append(...DATA.provenance.map(({ caption, facts }) => factsTable(caption, facts)));
drawFigures();
