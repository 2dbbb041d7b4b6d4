// What all parts share: the data, what is selected, and small builders. Text always goes in as text nodes.
const DATA = JSON.parse(document.getElementById("data").textContent);
const LAYERS = DATA.layers;
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

function number(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e-3 && size < 1e4) return String(Number(value.toPrecision(3)));
  return Number(value.toPrecision(3)).toExponential().replace("e+", "e");
}

function withError(kl) {
  if (!kl) return "not measured";
  if (!(kl.error > 0)) return number(kl.value);
  const digits = Math.min(12, Math.max(0, 1 - Math.floor(Math.log10(kl.error))));
  return `${kl.value.toFixed(digits)} ± ${kl.error.toFixed(digits)}`;
}

function bytes(count) {
  for (const [size, unit] of [[2 ** 40, "TiB"], [2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]]) {
    if (Math.abs(count) >= size) return `${(count / size).toFixed(2)} ${unit}`;
  }
  return `${count} B`;
}

const share = (value) => (value === null ? "–" : `${(100 * value).toFixed(1)} %`);
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
const towerName = (tower) => tower.replace(/_/g, "-");

// The budgets of the slider, the smallest first; the run's own list takes the place of an equal one.
const FIXED = new Set(LAYERS.filter((x) => x.fixed).map((x) => x.name));
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
