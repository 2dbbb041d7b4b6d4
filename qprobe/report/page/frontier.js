// KL over the size of the model: predicted, measured, the lists that were compared, and where the slider stands.
const FRONTIER = { left: 62, right: 14, top: 14, height: 230, bottom: 40 };
const frontier = byId("frontier");

function others() {
  const compared = DATA.chosen ? DATA.chosen.manifest.compared : [];
  return compared.filter((row) => row.kl !== null).map((row) => ({
    name: nameOf(row, compared), x: row.total_bytes, y: row.kl, error: row.kl_se, chosen: row.chosen,
  }));
}

function nameOf(row, compared) {
  const isCalibrated = compared.some((one) => one.name === NAMES.nearest);
  if (row.name === NAMES.nearest) return "standard 4-bit";
  if (row.name === NAMES.nothing) return isCalibrated ? "calibrated 4-bit" : "standard 4-bit";
  return `${listName(row.name)}${row.chosen ? " (chosen)" : ""}`;
}

// All points of the chart: predicted and measured lists along the budget, and the lists that were compared.
function frontierPoints() {
  const open = POSITIONS.filter((p) => !p.isChosen);
  return {
    predicted: open.filter((p) => p.predicted).map((p) => ({ x: p.total_bytes, y: p.predicted.value })),
    measured: open.filter((p) => p.measured).map((p) => ({ x: p.total_bytes, y: p.measured.value, error: p.measured.error })),
    lists: others(),
  };
}

// The scales of the chart: logarithmic where what was measured spans more than a factor of 20.
function frontierScales({ predicted, measured, lists }, width, base) {
  const all = [...predicted, ...measured, ...lists];
  const counted = (measured.length + lists.length ? [...measured, ...lists] : all).map((p) => p.y);
  const log = counted.every((v) => v > 0) && Math.max(...counted) > 20 * Math.min(...counted);
  const seen = all.map((p) => p.y).filter((v) => !log || v > 0);
  const xs = all.map((p) => p.x);
  const [least, most] = [Math.min(...seen), Math.max(...seen)];
  const [low, high] = log ? [least / 1.6, most * 1.6] : [Math.min(0, least) * 1.1, most > 0 ? most * 1.15 : 1e-9];
  return {
    log, low, high, xs, width, base,
    x: scale(Math.min(...xs), Math.max(...xs), FRONTIER.left + 8, width - FRONTIER.right - 6),
    y: scale(low, high, base, FRONTIER.top, log),
    usable: (p) => !log || p.y > 0,
  };
}

function drawFrontier() {
  const points = frontierPoints();
  const all = [...points.predicted, ...points.measured, ...points.lists];
  if (!all.length) {
    frontier.replaceChildren(element("p", { class: "hint" }, `No ${DAMAGE.name} was measured, so there is no frontier to draw.`));
    return;
  }
  const width = Math.max(260, frontier.clientWidth);
  const height = FRONTIER.top + FRONTIER.height + FRONTIER.bottom;
  const f = frontierScales(points, width, height - FRONTIER.bottom);
  const svg = drawn("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img" });
  svg.append(drawn("title", {}, frontierSays(points)));
  drawFrontierAxes(svg, f);
  const [predicted, measured, lists] = [points.predicted, points.measured, points.lists].map((found) => found.filter(f.usable));
  const line = (found) => `M${found.map((p) => `${f.x(p.x)} ${f.y(p.y)}`).join("L")}`;
  if (predicted.length) svg.append(drawn("path", { class: "predicted", d: line(predicted) }));
  if (measured.length) svg.append(drawn("path", { class: "measured", d: line(measured) }));
  for (const p of [...measured, ...lists]) {
    if (p.error) svg.append(drawn("line", { class: "error", x1: f.x(p.x), x2: f.x(p.x), y1: f.y(Math.max(p.y - p.error, f.low)), y2: f.y(p.y + p.error) }));
  }
  for (const p of measured) svg.append(drawn("circle", { class: "dot", cx: f.x(p.x), cy: f.y(p.y), r: 3.5 }));
  const left = drawLists(svg, lists, [predicted, measured], f);
  const now = here();
  const at = now && (now.measured || now.predicted);
  if (at && f.usable({ y: at.value })) svg.append(drawn("circle", { class: "now", cx: f.x(now.total_bytes), cy: f.y(at.value), r: 8 }));
  frontier.replaceChildren(svg);
  const hidden = points.predicted.length - predicted.length;
  byId("frontier-says").textContent = "Solid with dots: measured on held-out samples, with standard errors. Dashed: predicted by the sensitivities. "
    + "Squares: other lists that were measured. Ring: the budget set above."
    + (hidden ? ` ${plural(hidden, "prediction")} at or below 0 cannot be drawn on this scale.` : "")
    + (left.length ? ` Without a name, for want of room: ${left.join("; ")}.` : "");
}

// What the chart says to those who cannot see it.
function frontierSays({ lists }) {
  const each = lists.map((p) => `${p.name}: ${withError({ value: p.y, error: p.error })} at ${bytes(p.x)}`);
  return [`${DAMAGE.name} to the 16-bit model, ${DAMAGE.unit}, over the size of the model`, ...each].join("; ");
}

function drawFrontierAxes(svg, { x, y, xs, low, high, log, width, base }) {
  for (const value of ticks(low, high, log, 4)) {
    svg.append(drawn("line", { class: "axis", x1: FRONTIER.left, x2: width - FRONTIER.right, y1: y(value), y2: y(value) }));
    svg.append(drawn("text", { class: "tick", x: FRONTIER.left - 6, y: y(value) + 4, "text-anchor": "end" }, number(Number(value.toPrecision(6)))));
  }
  const [least, most] = [Math.min(...xs), Math.max(...xs)];
  const unit = most >= 2 ** 30 ? [2 ** 30, "GiB"] : most >= 2 ** 20 ? [2 ** 20, "MiB"] : [2 ** 10, "KiB"];
  for (const value of ticks(least / unit[0], most / unit[0], false, width > 420 ? 6 : 4)) {
    svg.append(drawn("text", { class: "tick", x: x(value * unit[0]), y: base + 15, "text-anchor": "middle" }, number(Number(value.toPrecision(6)))));
  }
  svg.append(drawn("text", { class: "unit", x: width - FRONTIER.right, y: base + 32, "text-anchor": "end" }, `size of the model (${unit[1]})`));
  svg.append(drawn("text", { class: "unit", x: 2, y: 10 }, `${DAMAGE.name} (${DAMAGE.unit})`));
}

// The lists as squares, each with its name; returns the names that found no place.
function drawLists(svg, lists, lines, f) {
  const at = (p) => [f.x(p.x), f.y(p.y)];
  // What a name must not cover, as small boxes: the lines, the points with the ring that may be around them.
  const taken = lines.flatMap((line) => alongLine(line.map(at))).map(([x, y]) => box(x, y, 1));
  taken.push(...lines[1].map((p) => box(...at(p), 4)), ...lists.map((p) => box(...at(p), p.chosen ? 10 : 5)));
  const missing = [];
  for (const list of lists) {
    const [cx, cy] = at(list);
    svg.append(drawn("rect", { class: "candidate", x: cx - 3.5, y: cy - 3.5, width: 7, height: 7 },
      drawn("title", {}, `${list.name}: ${withError({ value: list.y, error: list.error })}`)));
    const spot = placeName(textWidth(list.name), cx, cy, taken, f);
    if (!spot) {
      missing.push(list.name);
      continue;
    }
    taken.push(spot);
    const near = Math.min(Math.max(cx, spot.left), spot.right);
    if (Math.hypot(near - cx, spot.top + 6 - cy) > 22) svg.append(drawn("line", { class: "leader", x1: cx, y1: cy, x2: near, y2: spot.top + 6 }));
    svg.append(drawn("text", { class: "list", x: spot.left, y: spot.top + 10 }, list.name));
  }
  return missing;
}

const box = (x, y, half) => ({ left: x - half, right: x + half, top: y - half, bottom: y + half });
const overlap = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;

// Points every few pixels along a line through `corners`.
function alongLine(corners) {
  return corners.slice(1).flatMap(([x, y], i) => {
    const [fromX, fromY] = corners[i];
    const steps = Math.max(1, Math.ceil(Math.hypot(x - fromX, y - fromY) / 3));
    return Array.from({ length: steps + 1 }, (_, k) => [fromX + ((x - fromX) * k) / steps, fromY + ((y - fromY) * k) / steps]);
  });
}

// The free place nearest to the point (cx, cy) for a name `room` pixels wide; none where all is taken.
function placeName(room, cx, cy, taken, { width, base }) {
  const spots = [];
  for (let shift = -130; shift <= 130; shift += 7) {
    for (const left of [cx + 12, cx - 12 - room, cx + 40, cx + 80, cx - 40 - room]) {
      const spot = { left, right: left + room, top: cy - 6 + shift, bottom: cy + 7 + shift };
      const fits = spot.left > FRONTIER.left + 2 && spot.right < width - 2 && spot.top > 12 && spot.bottom < base - 2;
      if (fits) spots.push({ ...spot, away: Math.hypot(shift, Math.max(left - cx, cx - spot.right)) });
    }
  }
  return spots.sort((a, b) => a.away - b.away).find((spot) => !taken.some((other) => overlap(spot, other)));
}

if (POSITIONS.length) {
  listeners.position.push(drawFrontier);
  new ResizeObserver(drawFrontier).observe(frontier);
}
