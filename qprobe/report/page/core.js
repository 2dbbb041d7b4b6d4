// What all parts share: the data, what is selected, and small builders. Text always goes in as text nodes.
const DATA = JSON.parse(document.getElementById("data").textContent);
const LAYERS = DATA.layers;
const NAMES = DATA.names; // of the lists that keep nothing
const DAMAGE = DATA.damage; // in words: what ("a KL"), name ("KL") and unit
const byId = (id) => document.getElementById(id);

function element(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

function drawn(name, attributes = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function filled(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return node;
}

const minus = (text) => text.replaceAll("-", "\u2212");
const SUPERSCRIPTS = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079";

// A power of ten as it is set in print: 10\u207b\u2075.
function powerOfTen(power) {
  const digits = [...String(Math.abs(power))].map((d) => SUPERSCRIPTS[d]).join("");
  return `10${power < 0 ? "\u207b" : ""}${digits}`;
}

// Three digits, without the zeros behind them.
function number(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e-3 && size < 1e4) return minus(String(Number(value.toPrecision(3))));
  const [digits, power] = Number(value.toPrecision(3)).toExponential().split("e");
  return digits === "1" ? powerOfTen(Number(power)) : `${minus(digits)}·${powerOfTen(Number(power))}`;
}

// A value with its standard error, to the digits that the error leaves.
function withError(kl) {
  if (!kl) return "not measured";
  if (!(kl.error > 0)) return `${number(kl.value)} (error unknown)`;
  if (kl.error < 1e-6) return `${number(kl.value)} ± ${number(kl.error)}`;
  const digits = Math.max(0, 1 - Math.floor(Math.log10(kl.error)));
  return `${minus(kl.value.toFixed(digits))} ± ${kl.error.toFixed(digits)}`;
}

function bytes(count) {
  for (const [size, unit] of [[2 ** 40, "TiB"], [2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]]) {
    if (Math.abs(count) >= size) return minus(`${(count / size).toFixed(2)} ${unit}`);
  }
  return minus(`${count} B`);
}

// A difference with its sign; ± where nothing of it is left after rounding.
function signed(value, digits) {
  const size = Math.abs(value).toFixed(digits);
  return `${Number(size) === 0 ? "±" : value < 0 ? "\u2212" : "+"}${size}`;
}

const signedBytes = (count) => (count > 0 ? `+${bytes(count)}` : count < 0 ? bytes(count) : "±0 B");
const share = (value) => (value === null ? "–" : `${(100 * value).toFixed(1)} %`);
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
const towerName = (tower) => tower.replace(/_/g, "-");
const TOWERS = ["vision", "projector", "cross_attention", "language"];
const towerClass = (tower) => (TOWERS.includes(tower) ? tower : "other");

// What a list is called: the name of its measure in place of the column's.
function listName(name) {
  const measure = DATA.measures.find((m) => name.includes(m.column));
  return measure ? name.replace(measure.column, measure.name) : name;
}

// The width of a text of the charts in pixels.
const pen = document.createElement("canvas").getContext("2d");
function textWidth(text) {
  pen.font = "11px system-ui, sans-serif";
  return pen.measureText(text).width;
}

// The budgets of the slider, the smallest first; the run's own list takes the place of an equal one.
const FIXED = new Set(LAYERS.filter((x) => x.fixed).map((x) => x.name)); // in 16-bit in standard 4-bit as well
const POSITIONS = positions();

function positions() {
  const found = DATA.points.map((point, index) => ({ ...point, index, kept: new Set(point.kept) }));
  if (DATA.chosen) {
    const manifest = DATA.chosen.manifest;
    const kept = new Set(manifest.skip_modules.filter((name) => !FIXED.has(name)));
    const same = found.findIndex((p) => p.kept.size === kept.size && [...kept].every((name) => p.kept.has(name)));
    const quality = manifest.quality;
    const mine = manifest.compared.find((row) => row.chosen);
    const measured = quality.kl_dynamic === null ? null
      : { value: quality.kl_dynamic, error: mine ? mine.kl_se : null, samples: quality.samples };
    const chosen = {
      isChosen: true, kept, measured, predicted: DATA.chosen.predicted,
      total_bytes: manifest.budget.total_bytes, limit_bytes: manifest.budget.limit_bytes,
    };
    if (same >= 0) found.splice(same, 1, chosen);
    else found.push(chosen);
  }
  return found.sort((a, b) => a.total_bytes - b.total_bytes || a.kept.size - b.kept.size);
}

const state = {
  position: Math.max(0, POSITIONS.findIndex((p) => p.isChosen)),
  layer: null, // index of the layer that is shown in detail
  held: false, // whether pointing elsewhere leaves it
  visible: LAYERS.map(() => true),
};
const listeners = { position: [], layer: [], visible: [] };

function set(what, value) {
  state[what] = value;
  for (const listener of listeners[what]) listener();
}

const here = () => POSITIONS[state.position];
const isKept = (layer) => Boolean(layer.fixed) || Boolean(here() && here().kept.has(layer.name));

// Ticks for an axis between two values: decades where it is logarithmic, else steps of 1, 2 or 5.
function ticks(low, high, log, wanted = 4) {
  if (!log) {
    const rough = (high - low) / wanted || 1;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((m) => m * power >= rough * 0.99);
    const first = Math.ceil(low / step - 1e-9);
    return Array.from({ length: Math.max(0, Math.floor(high / step + 1e-9) - first + 1) }, (_, i) => (first + i) * step);
  }
  const [from, to] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
  const every = Math.max(1, Math.ceil((to - from) / wanted));
  const inside = (mantissas, step) => {
    const found = [];
    for (let power = from; power <= to; power += step) for (const m of mantissas) found.push(m * 10 ** power);
    return found.filter((v) => v >= low && v <= high);
  };
  const [decades, thirds] = [inside([1], every), inside([1, 3], 1)];
  return decades.length > 1 && every > 1 ? decades : decades.length > 2 ? decades : thirds.length > 1 ? thirds : inside([1, 2, 5], 1);
}

function scale(low, high, from, to, log = false) {
  const f = log ? Math.log10 : (v) => v;
  const span = f(high) - f(low) || 1;
  return (value) => from + ((f(value) - f(low)) / span) * (to - from);
}
