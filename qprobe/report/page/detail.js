// All figures of one layer, and the sample and token on which it errs most.
const detail = byId("detail");

function facts(list, pairs) {
  list.replaceChildren(...pairs.filter(Boolean).flatMap(([term, value]) => [element("dt", {}, term), element("dd", {}, value)]));
  return list;
}

function showDetail() {
  if (state.layer === null) {
    detail.replaceChildren(element("p", { class: "hint" }, "Point at a layer to see all its figures here."));
    return;
  }
  const layer = LAYERS[state.layer];
  const kept = isKept(layer);
  const heading = element("h3", { title: layer.name }, layer.short);
  const full = element("p", { class: "hint" }, layer.name, state.held ? " (held; Escape or a click lets go)" : "");
  detail.replaceChildren(heading, full, facts(element("dl"), [
    ["tower", towerName(layer.tower)],
    ["shape", layer.shape.join(" × ")],
    ["precision", layer.fixed ? "16-bit, in standard 4-bit too" : kept ? "16-bit" : "4-bit"],
    ["16-bit costs", `+${bytes(layer.bytes_16bit - layer.bytes_4bit)}`],
    ...DATA.measures.map((m) => [m.name, valueOf(layer, m)]),
    rankOf(layer),
  ]), element("p", { class: "hint" }, layer.reasons[kept ? 1 : 0]), ...noteOf(layer), ...expertsOf(layer), ...worstOf(layer));
}

function noteOf(layer) {
  return layer.note ? [element("p", { class: "hint" }, layer.note)] : [];
}

function expertsOf(layer) {
  const found = layer.experts;
  if (!found) return [];
  const head = element("tr", {}, ...["expert", "tokens", "activation error", "weight error"].map((x) => element("th", { scope: "col" }, x)));
  const rows = found.tokens.map((tokens, i) => {
    const unknown = tokens === 0 ? "unknown" : "not measured";
    const cells = [tokens === null ? "none ran" : String(tokens), errorOf(found.activation_nmse[i], unknown), errorOf(found.weight_nmse[i], "not measured")];
    const name = i === found.worst ? element("mark", { title: "errs most" }, String(i)) : String(i);
    return element("tr", {}, element("th", { scope: "row" }, name), ...cells.map((x) => element("td", {}, x)));
  });
  const silent = found.tokens.filter((x) => x === 0).length;
  const says = silent ? `${silent} of ${rows.length} read no token, so the error of their outputs is unknown.` : "Errors on the tokens that were routed to each.";
  return [element("h3", {}, `${rows.length} experts`), element("p", { class: "hint" }, says),
    element("div", { class: "scroll experts", tabindex: "0", role: "region", "aria-label": "Experts of this layer" }, element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows)))];
}

function errorOf(value, otherwise) {
  return value === null ? otherwise : number(value);
}

function valueOf(layer, measure) {
  const error = measure.error ? layer.values[measure.error] : null;
  const value = layer.values[measure.column];
  if (value === null) return "not measured";
  return element("span", { title: measure.what }, error ? withError({ value, error }) : number(value), " ", element("span", { class: "unit" }, measure.unit));
}

function rankOf(layer) {
  if (!layer.rank || layer.rank.rank === null) return null;
  const { rank, rank_low: low, rank_high: high } = layer.rank;
  return ["rank by sensitivity", low === null || low === high ? String(rank) : `${rank} (90 %: ${low} to ${high})`];
}

function worstOf(layer) {
  const worst = layer.worst;
  if (!worst) return [];
  const sample = Object.hasOwn(DATA.samples, worst.sample) ? DATA.samples[worst.sample] : null;
  const parts = [element("h3", {}, "Worst token")];
  if (sample && sample.thumbnail) parts.push(picture(sample, worst.box));
  parts.push(element("p", {}, `sample ${worst.sample}: ${worst.place}`));
  if (worst.text) parts.push(element("blockquote", {}, "… ", worst.before, element("mark", {}, worst.text), worst.after, " …"));
  if (sample) parts.push(element("p", { class: "hint" }, sample.prompt));
  return parts;
}

function picture(sample, box) {
  const frame = element("div", { class: "thumb" }, element("img", { src: sample.thumbnail, alt: `image of sample ${sample.id}` }));
  if (box) {
    const mark = element("span", { class: "mark" });
    ["left", "top", "width", "height"].forEach((side, i) => { mark.style[side] = `${100 * box[i]}%`; });
    frame.append(mark);
  }
  return frame;
}

listeners.layer.push(showDetail);
listeners.position.push(showDetail);
showDetail();
