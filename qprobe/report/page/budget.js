// The slider along the frontier: what a budget buys, and the manifest of that list.
const slider = byId("slider");

function showBudget() {
  const point = here();
  const extra = point.total_bytes - DATA.bytes.standard;
  const more = `${signed((100 * extra) / DATA.bytes.standard, 1)} %`;
  const kept = LAYERS.filter(isKept);
  const always = kept.filter((layer) => layer.fixed);
  const count = plural(kept.length - always.length, "layer");
  slider.setAttribute("aria-valuetext", `${more}, ${count} kept`);
  facts(byId("buys"), [
    ["list", point.isChosen ? "the one this run chose (skiplist.json)" : `best by ${listName(point.by)} for this budget`],
    ["over standard 4-bit", `${signedBytes(extra)} (${more})`],
    ["size of the model", `${bytes(point.total_bytes)} (${point.total_bytes.toLocaleString("en")} bytes)`],
    [`expected ${DAMAGE.name}`, expected(point.predicted)],
    [`measured ${DAMAGE.name}`, point.measured ? `${withError(point.measured)} ${DAMAGE.unit}, on ${plural(point.measured.samples, "held-out sample")}` : "not measured for this list"],
    ["kept in 16-bit", `${count} of ${LAYERS.length}${always.length ? `, besides ${namesOf(always)}` : ""}`],
    ["command", element("code", {}, commandHere())],
  ]);
  byId("list-title").textContent = `The skip-list: ${count}${always.length ? `, and what standard 4-bit keeps as well` : ""}`;
  byId("kept").replaceChildren(...kept.map((layer) => element("li", { title: layer.name }, layer.short,
    ...(layer.fixed ? [element("span", { class: "hint" }, " (in standard 4-bit too)")] : []))));
}

function namesOf(always) {
  const some = always.slice(0, 2).map((layer) => layer.short).join(", ");
  const rest = always.length > 2 ? ` and ${always.length - 2} more` : "";
  return `${some}${rest}, which standard 4-bit keeps as well`;
}

const commandHere = () => (here().isChosen ? DATA.chosen.manifest.made_by.command : DATA.base.commands[here().index]);

function expected(predicted) {
  if (!predicted) return "not known: no sensitivity was measured";
  const small = predicted.value <= 0 ? `; ${DAMAGE.what} is never below 0, so this errs by at least that much` : "";
  return `${withError(predicted)} ${DAMAGE.unit}, from ${plural(predicted.samples, "calibration sample")}${small}`;
}

function manifestHere() {
  const point = here();
  if (point.isChosen) return DATA.chosen.manifest;
  const base = DATA.base;
  const layers = LAYERS.map((layer) => ({
    name: layer.name,
    checkpoint_name: layer.checkpoint_name,
    shape: layer.shape,
    precision: isKept(layer) ? DATA.precisions.sixteen_bit : DATA.precisions.four_bit, // the layout; how its codes were rounded is the format's
    bytes: isKept(layer) ? layer.bytes_16bit : layer.bytes_4bit,
    sensitivity_kl: layer.values.sensitivity_kl,
    reason: layer.reasons[isKept(layer) ? 1 : 0],
  }));
  return {
    ...base.shared,
    budget: {
      requested: String(point.limit_bytes), limit_bytes: point.limit_bytes,
      total_bytes: point.total_bytes, standard_4bit_bytes: DATA.bytes.standard,
    },
    quality: base.qualities[point.index],
    layers,
    skip_modules: LAYERS.filter(isKept).map((layer) => layer.name),
    made_by: { qprobe: DATA.qprobe, command: commandHere() },
    compared: [],
  };
}

byId("download").addEventListener("click", () => {
  const text = `${JSON.stringify(manifestHere(), null, 2)}\n`;
  const address = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  const name = here().isChosen ? "skiplist.json" : `skiplist-${here().total_bytes}.json`;
  const link = element("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
});

if (POSITIONS.length) {
  slider.max = POSITIONS.length - 1;
  slider.value = state.position;
  slider.addEventListener("input", () => set("position", Number(slider.value)));
  listeners.position.push(showBudget);
  showBudget();
  const codes = DATA.base && DATA.base.shared.codes;
  if (codes) byId("download").nextElementSibling.append("; put it beside ", element("code", {}, codes.file), " of the run folder");
} else {
  byId("budget-body").replaceChildren(element("p", {}, "No measure of this run can choose a list, and it has no skiplist.json."));
}
