// KL over the size of the model: predicted, measured, the lists that were compared, and where the slider stands.
const FRONTIER = { left: 62, right: 14, top: 14, height: 230, bottom: 40 };
const frontier = byId("frontier");

function others() {
  const compared = DATA.chosen ? DATA.chosen.manifest.compared : [];
  return compared.filter((row) => row.kl !== null).map((row) => ({
    name: row.name === "nothing kept" ? "standard 4-bit" : row.name,
    x: row.total_bytes, y: row.kl, error: row.kl_se, chosen: row.chosen,
  }));
}

function drawFrontier() {
  const predicted = POSITIONS.filter((p) => p.predicted && !p.isChosen).map((p) => ({ x: p.total_bytes, y: p.predicted.value }));
  const measured = POSITIONS.filter((p) => p.measured && !p.isChosen).map((p) => ({ x: p.total_bytes, y: p.measured.value, error: p.measured.error }));
  const lists = others();
  const values = [...predicted, ...measured, ...lists].map((p) => p.y);
  if (!values.length) {
    frontier.replaceChildren(element("p", { class: "hint" }, "No KL was measured, so there is no frontier to draw."));
    return;
  }
  const counted = [...measured, ...lists].map((p) => p.y);
  const basis = counted.length ? counted : values;
  const log = basis.every((v) => v > 0) && Math.max(...basis) > 20 * Math.min(...basis);
  const usable = (p) => !log || p.y > 0;
  const seen = values.filter((v) => !log || v > 0);
  const width = Math.max(260, frontier.clientWidth);
  const height = FRONTIER.top + FRONTIER.height + FRONTIER.bottom;
  const base = height - FRONTIER.bottom;
  const xs = [...predicted, ...measured, ...lists].map((p) => p.x);
  const x = scale(Math.min(...xs), Math.max(...xs), FRONTIER.left + 8, width - FRONTIER.right - 6);
  const [low, high] = log ? [Math.min(...seen) / 1.6, Math.max(...seen) * 1.6] : [Math.min(0, ...seen) * 1.1, Math.max(...seen) * 1.15];
  const y = scale(low, high, base, FRONTIER.top, log);
  const svg = drawn("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img" });
  svg.append(drawn("title", {}, "KL to the 16-bit model over the size of the model"));
  drawFrontierAxes(svg, x, y, xs, [low, high, log], width, base);
  const line = (points) => `M${points.filter(usable).map((p) => `${x(p.x)} ${y(p.y)}`).join("L")}`;
  if (predicted.filter(usable).length) svg.append(drawn("path", { class: "predicted", d: line(predicted) }));
  if (measured.length) svg.append(drawn("path", { class: "measured", d: line(measured) }));
  for (const p of [...measured, ...lists].filter(usable)) {
    if (p.error) svg.append(drawn("line", { class: "error", x1: x(p.x), x2: x(p.x), y1: y(Math.max(p.y - p.error, log ? low : -Infinity)), y2: y(p.y + p.error) }));
  }
  for (const p of measured.filter(usable)) svg.append(drawn("circle", { class: "dot", cx: x(p.x), cy: y(p.y), r: 3.5 }));
  drawLists(svg, lists.filter(usable), x, y, width, base);
  const now = here();
  const at = now && (now.measured || now.predicted);
  if (at && usable({ y: at.value })) svg.append(drawn("circle", { class: "now", cx: x(now.total_bytes), cy: y(at.value), r: 8 }));
  frontier.replaceChildren(svg);
  const hidden = predicted.length - predicted.filter(usable).length;
  byId("frontier-says").textContent = "Solid with dots: measured on held-out samples, with standard errors. Dashed: predicted by the sensitivities. "
    + "Squares: other lists that were measured. Ring: the budget set above."
    + (hidden ? ` ${plural(hidden, "prediction")} at or below 0 cannot be drawn on this scale.` : "");
}

function drawFrontierAxes(svg, x, y, xs, [low, high, log], width, base) {
  for (const value of ticks(low, high, log, 4)) {
    svg.append(drawn("line", { class: "axis", x1: FRONTIER.left, x2: width - FRONTIER.right, y1: y(value), y2: y(value) }));
    svg.append(drawn("text", { class: "tick", x: FRONTIER.left - 6, y: y(value) + 4, "text-anchor": "end" }, number(Number(value.toPrecision(6)))));
  }
  const [least, most] = [Math.min(...xs), Math.max(...xs)];
  const unit = most >= 2 ** 30 ? [2 ** 30, "GiB"] : most >= 2 ** 20 ? [2 ** 20, "MiB"] : [2 ** 10, "KiB"];
  for (const value of ticks(least / unit[0], most / unit[0], false, width > 420 ? 6 : 3)) {
    svg.append(drawn("text", { class: "tick", x: x(value * unit[0]), y: base + 15, "text-anchor": "middle" }, number(Number(value.toPrecision(6)))));
  }
  svg.append(drawn("text", { class: "unit", x: width - FRONTIER.right, y: base + 32, "text-anchor": "end" }, `size of the model (${unit[1]})`));
  svg.append(drawn("text", { class: "unit", x: 2, y: 10 }, "KL (nats / answer token)"));
}

// Lists that were compared, as squares; a label that would cover another is left to the pointer.
function drawLists(svg, lists, x, y, width, base) {
  const taken = [];
  for (const list of lists) {
    const [cx, cy] = [x(list.x), y(list.y)];
    svg.append(drawn("rect", { class: "candidate", x: cx - 3.5, y: cy - 3.5, width: 7, height: 7 }, drawn("title", {}, `${list.name}: ${number(list.y)}`)));
    const label = list.chosen ? `${list.name} (chosen)` : list.name;
    const room = label.length * 6;
    const left = cx + 10 + room < width ? cx + 9 : cx - 9 - room;
    const spot = [0, -13, 13, -26, 26, -39].map((shift) => cy + 4 + shift)
      .find((at) => at > 12 && at < base - 2 && !taken.some((t) => Math.abs(t.at - at) < 12 && left < t.left + t.room && t.left < left + room));
    if (spot === undefined) continue;
    taken.push({ at: spot, left, room });
    svg.append(drawn("text", { class: "list", x: left, y: spot }, label));
  }
}

if (POSITIONS.length) {
  listeners.position.push(drawFrontier);
  new ResizeObserver(drawFrontier).observe(frontier);
}
