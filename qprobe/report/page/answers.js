// The comparison with its answers, how it all was measured, and the page's first lines.
function showHead() {
  byId("command").textContent = DATA.method.command;
  const manifest = DATA.chosen && DATA.chosen.manifest;
  const quality = manifest && manifest.quality;
  const point = POSITIONS.find((p) => p.isChosen);
  if (!quality || quality.kl_standard_4bit === null || !point) {
    byId("verdict").textContent = manifest ? `No ${DAMAGE.name} was measured on held-out samples; the list was chosen by its score alone.` : "No skip-list was chosen in this run.";
    return;
  }
  const extra = point.total_bytes - DATA.bytes.standard;
  const list = `${plural(point.kept.size, "layer")} kept in 16-bit (${signed((100 * extra) / DATA.bytes.standard, 1)} %, ${signedBytes(extra)})`;
  byId("verdict").textContent = !point.kept.size ? `${costOfNothing(manifest)}; nothing is kept.`
    : point.measured ? `${costOfNothing(manifest)}; with ${list} it is ${withError(point.measured)}.` : `${costOfNothing(manifest)}; ${list}, not measured.`;
}

// What the model costs with no layer kept; of calibrated weights, standard 4-bit is another list.
function costOfNothing(manifest) {
  const row = (name) => manifest.compared.find((one) => one.name === name && one.kl !== null);
  const said = (one) => withError({ value: one.kl, error: one.kl_se });
  const [nearest, nothing] = [row(NAMES.nearest), row(NAMES.nothing)];
  if (nearest && nothing) {
    const unpaid = nothing.kl >= nearest.kl ? ": calibration does not pay here" : "";
    return `Calibrated 4-bit costs ${DAMAGE.what} of ${said(nothing)} ${DAMAGE.unit} (standard 4-bit ${said(nearest)}${unpaid})`;
  }
  return `Standard 4-bit costs ${DAMAGE.what} of ${nothing ? said(nothing) : number(manifest.quality.kl_standard_4bit)} ${DAMAGE.unit}`;
}

function showAnswers() {
  const body = byId("answers-body");
  const found = DATA.comparison;
  const scored = DATA.method.metric;
  const own = scored ? [element("p", {}, scoredIn(scored))] : [];
  if (!found) {
    body.replaceChildren(...own, element("p", { class: "hint" }, "Not compared yet: ", element("code", {}, "qprobe compare --manifest RUN/skiplist.json"),
      " leaves its result in the run folder, and the next report shows it here."));
    return;
  }
  body.replaceChildren(...own);
  if (!DATA.comparison_is_current) body.append(element("p", { class: "chip" }, "This comparison is of another skip-list than the run's present one."));
  const headings = ["model", "parameters", "with 4-bit state", `${DAMAGE.name}, ${DAMAGE.unit}`, "same top token", "same answer",
    ...found.metrics.map((metric) => metric.name)];
  const table = element("table", {}, element("thead", {}, element("tr", {}, ...headings.map((h) => element("th", { scope: "col" }, h)))), element("tbody"));
  for (const row of found.rows) {
    const cells = [bytes(row.parameter_bytes), bytes(row.total_bytes), row.kl === 0 ? "0" : withError(row.kl === null ? null : { value: row.kl, error: row.kl_se }),
      share(row.top1_agreement), share(row.answer_agreement),
      ...found.metrics.map((metric) => meanOf(metric, metric.means[row.name]))];
    table.tBodies[0].append(element("tr", {}, element("th", { scope: "row", class: "left" }, row.name), ...cells.map((c) => element("td", { class: "number" }, c))));
  }
  body.append(element("div", { class: "scroll" }, table));
  body.append(...found.metrics.map((metric) => element("p", { class: "hint" }, differencesOf(metric))));
  const telling = found.samples.filter((s) => new Set(Object.values(s.answers)).size > 1);
  const alike = found.samples.length - telling.length;
  body.append(element("p", { class: "hint" }, `${plural(found.samples.length, "sample")} (compare.json); the models answer alike on ${alike}.${telling.length ? " Where they differ:" : ""}`));
  body.append(...telling.slice(0, 8).map(answersOf));
  if (telling.length > 8) {
    const rest = element("details", {}, element("summary", {}, `${telling.length - 8} more`));
    rest.addEventListener("toggle", () => { if (rest.children.length === 1) rest.append(...telling.slice(8).map(answersOf)); });
    body.append(rest);
  }
}

// The mean of a metric of one model with its error: shares as per cent, other numbers as they are.
function meanOf(metric, mean) {
  if (mean.value === null) return "–";
  return spread(metric, mean) + (metric.is_share ? " %" : "");
}

function spread(metric, { value, se }) {
  const scale = metric.is_share ? 100 : 1;
  return se === 0 ? `${number(scale * value)} ± 0` : withError({ value: scale * value, error: scale * se });
}

// What a metric says: each 4-bit model against 16-bit, and the last one against all, paired by sample.
function differencesOf(metric) {
  if (!metric.samples) return `${metric.name}: no sample counts, so nothing is measured.`;
  const models = Object.keys(metric.means);
  const told = metric.differences.filter((d) => d.against === models[0] || d.model === models.at(-1)).map((d) => {
    const unsure = d.is_found === false ? " (no difference found)" : "";
    return `${d.model} against ${d.against}: ${d.value > 0 ? "+" : ""}${spread(metric, d)}${metric.is_share ? " points" : ""}${unsure}`;
  });
  const of = metric.left_out ? ` of ${metric.samples + metric.left_out}` : "";
  return `${metric.name}, ${metric.samples}${of} samples, paired by sample: ${told.join("; ")}.`;
}

// The metric that a scan was asked for, of its held-out samples and the list that it chose.
function scoredIn(metric) {
  const means = Object.entries(metric.means).map(([model, mean]) => `${model} ${meanOf(metric, mean)}`);
  return `In the scan, held out, with the list that it chose: ${means.join(", ")}. ${differencesOf(metric)}`;
}

function answersOf(sample) {
  const first = Object.values(sample.answers)[0];
  const list = facts(element("dl"), Object.entries(sample.answers).map(([name, text]) => [name, text || "(nothing)"]));
  [...list.querySelectorAll("dd")].slice(1).forEach((dd, i) => {
    if (Object.values(sample.answers)[i + 1] === first) dd.className = "same";
  });
  return element("article", {}, element("h3", {}, `${sample.id}: ${sample.prompt}`), list);
}

function showMethod() {
  const m = DATA.method;
  const residual = m.attribution_residual;
  facts(byId("method-facts"), [
    ["command", element("code", {}, m.command)],
    ["model", `${DATA.model.id}${DATA.model.revision ? ` at ${DATA.model.revision}` : ""}, ${DATA.model.architecture}`],
    ["format", `${DATA.format.name}, blocks of ${DATA.format.blocksize}${DATA.format.double_quant ? ", double quantization" : ""}, ${DATA.format.compute_dtype} elsewhere`],
    ["samples", `${m.samples.calibration} for the measures, ${m.samples.held_out} held out for the selection`],
    m.seed === null || m.seed === undefined ? null : ["seed", m.seed],
    residual === null ? null : ["attribution residual", `${signed(100 * residual, 2)} % of the measured ${DAMAGE.name} (${plural(m.nodes, "node")} to begin with)`],
    m.device ? ["device", m.device] : null,
    ["versions", Object.entries(m.versions).map(([name, version]) => `${name} ${version}`).join(", ") || "not noted"],
    Object.keys(m.seconds).length ? ["time", Object.entries(m.seconds).map(([stage, s]) => `${stage} ${s.toFixed(1)} s`).join(", ")] : null,
    m.peak_bytes ? ["peak memory", bytes(m.peak_bytes)] : null,
    ["report by", `qprobe ${DATA.qprobe}`],
  ]);
  // A scan writes its page last of all, its list chosen, and only then calls itself finished.
  const open = m.status === "finished" || DATA.chosen ? [] : ["The scan is not finished, so these figures are of what it has measured so far."];
  const missing = m.missing.length ? [`Not measured in this run, so left out: ${m.missing.join(", ")}.`] : [];
  byId("missing").textContent = [...open, ...missing].join(" ");
  byId("notes").replaceChildren(...[...open, ...missing, ...m.notes].map((note) => element("li", {}, note)));
}

showHead();
showAnswers();
showMethod();
