// One chart a measure, layers in execution order on x, towers as bands.
const CHART = { left: 58, right: 8, top: 20, height: 132, bottom: 8 };
const LABEL_ROW = 14; // no less than the height of a line of the labels
const LABEL_GAP = 8;
const charts = byId("charts");
let drawnPanels = [];

function runsOfTowers() {
  const runs = [];
  LAYERS.forEach((layer, i) => {
    const last = runs[runs.length - 1];
    if (last && last.tower === layer.tower) last.end = i;
    else runs.push({ tower: layer.tower, start: i, end: i });
  });
  return runs;
}

function drawCharts() {
  const width = Math.max(220, charts.clientWidth);
  drawnPanels = DATA.panels.map((panel, i) => drawPanel(panel, width, i === 0));
  charts.replaceChildren(...drawnPanels.map((p) => p.svg));
  if (!drawnPanels.length) charts.append("Nothing was measured.");
  markLayers();
  pointAtLayer();
}

function drawPanel(panel, width, isFirst) {
  const values = LAYERS.map((layer) => layer.values[panel.column]);
  const errors = LAYERS.map((layer) => (panel.error ? layer.values[panel.error] : null));
  const usable = (v) => v !== null && (!panel.log || v > 0);
  const present = values.filter(usable);
  const top = CHART.top + (isFirst ? 18 : 0);
  const x = scale(-0.5, LAYERS.length - 0.5, CHART.left, width - CHART.right);
  const labels = placeSpikes(panel, x, width);
  const room = LABEL_ROW * Math.max(0, ...labels.map((label) => label.row + 1)) + (labels.length ? 3 : 0);
  const height = top + room + CHART.height + CHART.bottom;
  const base = height - CHART.bottom;
  const [low, high] = limits(present, panel.log);
  const y = scale(low, high, base, top + room, panel.log);
  const svg = drawn("svg", { class: "panel", width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "data-panel": panel.column });
  svg.append(drawn("title", {}, described(panel, values, usable)));
  drawBands(svg, x, top, base, isFirst, width);
  drawAxis(svg, y, ticks(low, high, panel.log, 3), width, !panel.log);
  svg.append(drawn("text", { x: CHART.left, y: isFirst ? 12 : 13, class: "name" }, panel.label));
  const floor = panel.log ? base : y(0);
  const stems = values.map((v, i) => (usable(v) ? `M${x(i).toFixed(1)} ${floor.toFixed(1)}V${y(v).toFixed(1)}` : "")).join("");
  svg.append(drawn("path", { class: "stem", d: stems }));
  const bars = values.map((v, i) => (usable(v) && errors[i] ? `M${x(i).toFixed(1)} ${y(v - errors[i]).toFixed(1)}V${y(v + errors[i]).toFixed(1)}` : "")).join("");
  if (bars) svg.append(drawn("path", { class: "error", d: bars }));
  const marks = drawn("g");
  const cursor = drawn("g");
  svg.append(marks, cursor);
  nameSpikes(svg, labels, values, x, y, top + room);
  return { panel, svg, marks, cursor, x, y, values, usable, top, base };
}

// What a chart says to those who cannot see it.
function described(panel, values, usable) {
  const largest = values.reduce((best, v, i) => (usable(v) && (best < 0 || v > values[best]) ? i : best), -1);
  const what = `${panel.label} of ${plural(LAYERS.length, "layer")} in execution order`;
  return largest < 0 ? what : `${what}; the largest is ${number(values[largest])}, of ${LAYERS[largest].short}`;
}

function limits(present, log) {
  if (!present.length) return log ? [0.1, 1] : [0, 1];
  const low = Math.min(...present);
  const high = Math.max(...present);
  if (log) { // a decade at least, so that the axis has two labels to read
    const [middle, half] = [Math.sqrt(low * high), Math.max(1.6 * Math.sqrt(high / low), Math.sqrt(10))];
    return [middle / half, middle * half];
  }
  return [Math.min(0, low * 1.15), high > 0 ? high * 1.12 : 1e-9];
}

function drawBands(svg, x, top, base, isFirst, width) {
  const half = (x(1) - x(0)) / 2;
  const named = [];
  for (const run of runsOfTowers()) {
    const [from, to] = [x(run.start) - half, x(run.end) + half];
    svg.append(drawn("rect", { class: towerClass(run.tower), "data-tower": run.tower, x: from, y: top, width: to - from, height: base - top }));
    named.push({ tower: run.tower, from, to });
  }
  if (isFirst) nameBands(svg, named, top, width);
}

// Each tower by name above its widest band, if the name fits there.
function nameBands(svg, named, top, width) {
  const widest = new Map();
  for (const band of named) {
    const best = widest.get(band.tower);
    if (!best || band.to - band.from > best.to - best.from) widest.set(band.tower, band);
  }
  const taken = [];
  for (const band of [...widest.values()].sort((a, b) => b.to - b.from - (a.to - a.from))) {
    const room = textWidth(towerName(band.tower));
    const middle = Math.min(Math.max((band.from + band.to) / 2, room / 2), width - room / 2);
    if (taken.some((t) => Math.abs(t.middle - middle) < (t.room + room) / 2 + 8)) continue;
    taken.push({ middle, room });
    svg.append(drawn("text", { class: "tick tower", x: middle, y: top - 5, "text-anchor": "middle" }, towerName(band.tower)));
  }
}

function drawAxis(svg, y, values, width, hasZero) {
  for (const value of values) {
    const at = y(value).toFixed(1);
    svg.append(drawn("line", { class: "axis", x1: CHART.left, x2: width - CHART.right, y1: at, y2: at }));
    svg.append(drawn("text", { class: "tick", x: CHART.left - 5, y: Number(at) + 4, "text-anchor": "end" }, number(Number(value.toPrecision(6)))));
  }
  if (hasZero) svg.append(drawn("line", { class: "zero", x1: CHART.left, x2: width - CHART.right, y1: y(0), y2: y(0) }));
}

// Places for the names of the layers that stand out, in rows above the points (row 0 is the lowest): the way
// that places most of them wins. shifts: how much of a name may lie left of its leader. What finds no place is
// left to the pointer.
function placeSpikes(panel, x, width) {
  const rightmost = [...panel.spikes].sort((a, b) => b - a);
  const ways = [
    [panel.spikes, [0.5, 0, 1]], [rightmost, [0]], [rightmost.slice().reverse(), [1]], [rightmost, [0, 1]],
  ].map(([order, shifts]) => placeInOrder(order, shifts, x, width));
  return ways.reduce((best, way) => (way.length > best.length ? way : best));
}

function placeInOrder(order, shifts, x, width) {
  const placed = [];
  for (const i of order) {
    const room = textWidth(LAYERS[i].short) + LABEL_GAP;
    const [leader, edge] = [x(i), width - CHART.right - room];
    if (edge < CHART.left) continue;
    const spots = [0, 1, 2, 3].flatMap((row) => shifts.map((shift) => (
      { i, row, room, leader, left: Math.max(CHART.left, Math.min(leader - LABEL_GAP / 2 - shift * (room - LABEL_GAP), edge)) })));
    const free = spots.find((spot) => !placed.some((other) => collide(spot, other)));
    if (free) placed.push(free);
  }
  return placed;
}

// True if two names overlap, or the leader to the upper one crosses the lower one.
function collide(a, b) {
  if (a.row === b.row) return a.left < b.left + b.room && b.left < a.left + a.room;
  const [upper, lower] = a.row > b.row ? [a, b] : [b, a];
  return upper.leader > lower.left && upper.leader < lower.left + lower.room;
}

function nameSpikes(svg, labels, values, x, y, bottom) {
  for (const { i, left, row } of labels) {
    const at = bottom - LABEL_ROW * row - 4;
    svg.append(drawn("line", { class: "leader", x1: x(i), x2: x(i), y1: at + 3, y2: y(values[i]) - 5 }));
    svg.append(drawn("text", { class: "spike", x: left + LABEL_GAP / 2, y: at }, LAYERS[i].short));
  }
}

function markLayers() {
  const radius = LAYERS.length > 200 ? 1.7 : 3;
  for (const p of drawnPanels) {
    const order = LAYERS.map((_, i) => i).sort((a, b) => isKept(LAYERS[a]) - isKept(LAYERS[b]));
    p.marks.replaceChildren(...order.filter((i) => p.usable(p.values[i])).map((i) => {
      const [cx, cy] = [p.x(i), p.y(p.values[i])];
      const out = state.visible[i] ? "" : " out";
      if (!isKept(LAYERS[i])) return drawn("circle", { class: `quantized${out}`, "data-layer": i, cx, cy, r: radius });
      const r = radius + 2;
      return drawn("path", { class: `${LAYERS[i].fixed ? "always" : "kept"}${out}`, "data-layer": i, d: `M${cx} ${cy - r}L${cx + r} ${cy}L${cx} ${cy + r}L${cx - r} ${cy}Z` });
    }));
  }
}

function pointAtLayer() {
  for (const p of drawnPanels) {
    p.cursor.replaceChildren();
    if (state.layer === null) continue;
    const at = p.x(state.layer);
    p.cursor.append(drawn("line", { class: "cursor", x1: at, x2: at, y1: p.top, y2: p.base }));
    const value = p.values[state.layer];
    if (p.usable(value)) p.cursor.append(drawn("circle", { class: "ring", cx: at, cy: p.y(value), r: 6 }));
  }
}

function layerAt(event) {
  const svg = event.target.closest("svg.panel");
  if (!svg || !drawnPanels.length) return null;
  const box = svg.getBoundingClientRect();
  const { x } = drawnPanels[0];
  const at = Math.round((event.clientX - box.left - x(0)) / (x(1) - x(0)));
  const near = LAYERS.map((_, i) => i).filter((i) => state.visible[i]);
  return near.length ? near.reduce((a, b) => (Math.abs(b - at) < Math.abs(a - at) ? b : a)) : null;
}

charts.addEventListener("pointermove", (event) => {
  const layer = layerAt(event);
  if (!state.held && layer !== null && layer !== state.layer) set("layer", layer);
});
charts.addEventListener("click", (event) => {
  const layer = layerAt(event);
  if (layer === null) return;
  state.held = !(state.held && layer === state.layer);
  set("layer", layer);
});
charts.addEventListener("keydown", (event) => {
  const shown = LAYERS.map((_, i) => i).filter((i) => state.visible[i]);
  const now = state.layer === null ? -1 : shown.findIndex((i) => i >= state.layer);
  const target = {
    ArrowRight: Math.min(now + 1, shown.length - 1), ArrowLeft: Math.max(now - 1, 0), Home: 0, End: shown.length - 1,
  }[event.key];
  if (event.key === "Escape" || event.key === "Enter") {
    state.held = event.key === "Enter" && !state.held;
    set("layer", state.layer);
  } else if (target !== undefined && shown.length) {
    event.preventDefault();
    set("layer", shown[target]);
  }
});

// The towers' tints by name: bands of a layer or two are too narrow for theirs.
byId("towers").replaceChildren(...[...new Set(LAYERS.map((layer) => layer.tower))].map((tower) => element("span", { class: "key" },
  drawn("svg", { viewBox: "0 0 12 12", "aria-hidden": "true" }, drawn("rect", { class: towerClass(tower), width: 12, height: 12 })), ` ${towerName(tower)} `)));
byId("always-key").hidden = !FIXED.size;
listeners.layer.push(pointAtLayer);
listeners.position.push(markLayers);
listeners.visible.push(markLayers);
new ResizeObserver(() => {
  if (drawnPanels.length && Math.abs(drawnPanels[0].svg.clientWidth - charts.clientWidth) > 1) drawCharts();
}).observe(charts);
drawCharts();
