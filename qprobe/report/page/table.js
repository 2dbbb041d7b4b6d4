// The filters, and the table of all layers that can be sorted by every column.
const COLUMNS = [
  { title: "layer", value: (layer) => layer.short, left: true, head: true },
  { title: "#", what: "place in execution order", value: (_, i) => i + 1 },
  { title: "tower", value: (layer) => towerName(layer.tower), left: true },
  { title: "bits", value: (layer) => (isKept(layer) ? 16 : 4) },
  {
    title: "16-bit costs", unit: "MiB", what: "more bytes than in 4-bit", text: (v) => signed(v / 2 ** 20, 2),
    value: (layer) => layer.bytes_16bit - layer.bytes_4bit,
  },
  ...DATA.measures.map((m) => ({ title: m.name, unit: m.unit, what: m.what, value: (layer) => layer.values[m.column], text: number })),
];
const IN_ORDER = COLUMNS.findIndex((column) => column.title === "#");
const order = { column: IN_ORDER, falling: false };
const rows = LAYERS.map(rowOf);

function rowOf(layer, i) {
  const cells = COLUMNS.map((column) => {
    const value = column.value(layer, i);
    const text = column.text ? column.text(value) : value;
    if (!column.head) return element("td", column.left ? { class: "left" } : {}, text);
    const button = element("button", { type: "button", title: layer.name }, text);
    button.addEventListener("click", () => { state.held = true; set("layer", i); });
    return element("th", { class: "left stuck", scope: "row" }, button);
  });
  return element("tr", {}, ...cells);
}

function showHeadings() {
  const cells = COLUMNS.map((column, i) => {
    const button = element("button", { type: "button", title: column.what || column.title }, column.title);
    if (column.unit) button.append(" ", element("span", { class: "unit" }, column.unit));
    button.addEventListener("click", () => sortBy(i));
    return element("th", { scope: "col", class: [column.left ? "left" : "", column.head ? "stuck" : ""].join(" ") }, button);
  });
  byId("rows").tHead.replaceChildren(element("tr", {}, ...cells));
}

function sortBy(column) {
  order.falling = order.column === column ? !order.falling : !COLUMNS[column].left && column !== IN_ORDER;
  order.column = column;
  showRows();
}

function showRows() {
  const key = LAYERS.map((layer, i) => COLUMNS[order.column].value(layer, i));
  const sign = order.falling ? -1 : 1;
  const sorted = LAYERS.map((_, i) => i).sort((a, b) => {
    if (key[a] === null || key[b] === null) return (key[a] === null) - (key[b] === null) || a - b;
    const difference = typeof key[a] === "string" ? key[a].localeCompare(key[b], "en", { numeric: true }) : key[a] - key[b];
    return sign * difference || a - b;
  });
  byId("rows").tBodies[0].replaceChildren(...sorted.filter((i) => state.visible[i]).map((i) => rows[i]));
  [...byId("rows").tHead.rows[0].cells].forEach((cell, i) => {
    if (i === order.column) cell.setAttribute("aria-sort", order.falling ? "descending" : "ascending");
    else cell.removeAttribute("aria-sort");
  });
}

function showBits() {
  const column = COLUMNS.findIndex((c) => c.title === "bits");
  rows.forEach((row, i) => {
    row.cells[column].textContent = isKept(LAYERS[i]) ? "16" : "4";
    row.cells[column].className = isKept(LAYERS[i]) ? "chip" : "";
  });
  if (order.column === column) showRows();
}

function filter() {
  const [tower, kind] = [byId("tower").value, byId("kind").value];
  const words = byId("text").value.toLowerCase().split(/\s+/).filter(Boolean);
  set("visible", LAYERS.map((layer) => (!tower || layer.tower === tower) && (!kind || layer.kind === kind)
    && words.every((word) => layer.name.toLowerCase().includes(word) || layer.short.toLowerCase().includes(word))));
}

function countShown() {
  const count = state.visible.filter(Boolean).length;
  byId("shown").textContent = count === LAYERS.length ? plural(count, "layer") : `${count} of ${plural(LAYERS.length, "layer")}`;
}

for (const [id, key, label] of [["tower", "tower", towerName], ["kind", "kind", String]]) {
  const found = [...new Set(LAYERS.map((layer) => layer[key]))];
  byId(id).append(...found.map((value) => element("option", { value }, label(value))));
}
byId("filters").addEventListener("input", filter);
byId("filters").addEventListener("reset", () => setTimeout(filter));
byId("filters").addEventListener("submit", (event) => event.preventDefault());
listeners.visible.push(showRows, countShown);
listeners.position.push(showBits);
listeners.layer.push(() => rows.forEach((row, i) => row.classList.toggle("on", i === state.layer)));
showHeadings();
showRows();
showBits();
countShown();
