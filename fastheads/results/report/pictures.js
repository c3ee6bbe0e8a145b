// The canvases: heatmap, legend, scatter, curves.

const LINES = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]; // Okabe and Ito: told apart by all
const DASHES = [[], [8, 4], [2, 3], [10, 3, 2, 3], [5, 5], [1, 5]];
const STEPS = [1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 200, 500, 1000];
const HIGH = 660; // pixels of the heatmap, about
let grid = null; // where the heatmap's cells are: left, top, w, h
let points = []; // of the scatter: [head, x, y]

const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const within = (x) => Math.min(1, Math.max(0, x));

/** Size a canvas in CSS pixels for the screen's resolution, clear it and return its context. */
function surface(canvas, width, height) {
  const scale = window.devicePixelRatio || 1, context = canvas.getContext("2d");
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.font = "12px system-ui, sans-serif";
  return context;
}
const drawn = new Map(); // what a canvas shows without the chosen head
function keepDrawn(canvas) {
  const copy = document.createElement("canvas");
  copy.width = canvas.width;
  copy.height = canvas.height;
  if (copy.width && copy.height) copy.getContext("2d").drawImage(canvas, 0, 0);
  drawn.set(canvas, copy);
}
function restoreDrawn(canvas) {
  const context = canvas.getContext("2d"), copy = drawn.get(canvas), before = context.getTransform();
  context.resetTransform();
  context.clearRect(0, 0, canvas.width, canvas.height);
  if (copy.width && copy.height) context.drawImage(copy, 0, 0);
  context.setTransform(before);
  return context;
}
function line(context, ...places) {
  context.beginPath();
  places.forEach(([x, y], n) => (n ? context.lineTo(x, y) : context.moveTo(x, y)));
  context.stroke();
}
function disc(context, x, y, radius) {
  context.beginPath();
  context.arc(x, y, radius, 0, 7);
  context.fill();
}
function text(context, words, x, y, align, baseline) {
  context.textAlign = align;
  context.textBaseline = baseline;
  context.fillText(words, x, y);
}
/** Make 256 colours of a palette's stops. */
function palette(stops) {
  return Array.from({ length: 256 }, (_, i) => {
    const x = (i / 255) * (stops.length - 1), k = Math.min(Math.floor(x), stops.length - 2);
    return `rgb(${stops[k].map((a, c) => Math.round(a + (stops[k + 1][c] - a) * (x - k))).join(",")})`;
  });
}

/** How means become places on a palette: at(head) is 0 to 1; low, high: its ends; below, above: whether means lie beyond. */
function scaleOf(metric) {
  const { colours, order } = metric, wanted = $("colours").value, kind = wanted === "auto" ? colours.kind : wanted;
  const [least, most] = order.length ? [metric.mean[order[order.length - 1]], metric.mean[order[0]]] : [0, 1];
  let { low, high } = colours;
  if (wanted === "linear" || wanted === "rank") [low, high] = [least, most];
  if (wanted === "log") [low, high] = [Math.max(least, most / 1e6), most];
  let place = (x) => (x - low) / (high - low || 1);
  if (kind === "log" && low > 0) place = (x) => (x > 0 ? Math.log(x / low) / (Math.log(high / low) || 1) : 0);
  if (kind === "diverging") {
    const { centre } = colours;
    place = (x) => 0.5 + (0.5 * (x - centre)) / (x < centre ? centre - low : high - centre);
  }
  let at = (i) => within(place(metric.mean[i]));
  if (kind === "rank") at = (i) => (metric.ranked > 1 ? 1 - (metric.rank[i] - 1) / (metric.ranked - 1) : 1);
  const stops = kind === "diverging" ? report.puor : report.viridis;
  const room = 1e-6 * Math.max(Math.abs(low), Math.abs(high)); // the means are rounded to single precision, the ends are not
  return { kind, low, high, at, stops, below: least < low - room, above: most > high + room };
}
const step = (n, room) => STEPS.find((s) => n / s <= room) ?? n; // of ticks: a multiple that leaves them legible

function drawMap() {
  const { profile, metric } = chosen, { rows, heads, widths, layers } = profile;
  const box = $("map-box").clientWidth || 600, scale = scaleOf(metric), canvas = $("map");
  const left = 28 + 8 * String(Math.max(...layers)).length, top = 34;
  const w = Math.max(3, Math.min(46, Math.floor((box - left - 4) / heads)));
  const h = Math.max(4, Math.min(22, Math.floor(HIGH / rows)));
  const context = surface(canvas, left + Math.max(w * heads, 50) + 4, top + Math.max(h * rows, 44) + 4);
  grid = { left, top, w, h };
  canvas.dataset.grid = [left, top, w, h];
  const gap = w >= 5 && h >= 5 ? 1 : 0, empty = style("--empty");
  for (let i = 0; i < rows * heads; i++) {
    const r = row(i), c = column(i), measured = metric.rank[i] > 0 && !Number.isNaN(metric.mean[i]);
    if (!measured && (c >= widths[r] || metric.unit !== "head")) continue;
    context.fillStyle = measured ? scale.stops[Math.round(255 * scale.at(i))] : empty;
    context.fillRect(left + c * w, top + r * h, w - gap, h - gap);
  }
  context.fillStyle = style("--ink");
  const down = step(rows, HIGH / 14), across = step(heads, (w * heads) / 22);
  for (let r = 0; r < rows; r += down) text(context, layers[r], left - 5, top + (r + 0.5) * h, "right", "middle");
  for (let c = 0; c < heads; c += across) text(context, c, left + (c + 0.5) * w, top - 9, "center", "middle");
  text(context, `${metric.unit} →`, left, 8, "left", "middle");
  context.save();
  context.translate(8, top);
  context.rotate(-Math.PI / 2);
  text(context, "← layer", 0, 0, "right", "middle");
  context.restore();
  const grouped = w >= 5 && metric.unit === "head" && drawGroups(context);
  const marked = metric.ranked >= 4 * report.marked && w >= 7 && h >= 5 ? report.marked : 0;
  for (let k = 0; k < marked; k++) {
    mark(context, metric.order[k], true);
    mark(context, metric.order[metric.ranked - 1 - k], false);
  }
  const marks = marked ? `Circles: the ${marked} highest; crosses: the ${marked} lowest.` : "";
  $("marks").textContent = `${marks} ${grouped ? "Lines: between KV groups." : ""}`;
  canvas.setAttribute("aria-label", `Heatmap of the means of ${metric.name}, ${rows} layers by ${heads} heads`);
  $("legend").hidden = !metric.ranked;
  if (metric.ranked) drawLegend(scale, Math.min(420, box));
  keepDrawn(canvas);
  outline();
}
function drawGroups(context) {
  const { left, top, w, h } = grid, { rows, kv, widths } = chosen.profile;
  let some = false;
  for (let r = 0; r < rows; r++) {
    for (let group = 1; kv[r] < widths[r] && group < kv[r]; group++) {
      context.fillRect(left + (group * widths[r] * w) / kv[r] - 1, top + r * h, 1, h);
      some = true;
    }
  }
  return some;
}
/** Mark a head: a circle or a cross, white within black, which is seen on any colour. */
function mark(context, i, high) {
  const { left, top, w, h } = grid, r = Math.min(4, w / 3, h / 3);
  const x = left + (column(i) + 0.5) * w - 0.5, y = top + (row(i) + 0.5) * h - 0.5;
  for (const [colour, width] of [["#000", 3], ["#fff", 1.4]]) {
    context.strokeStyle = colour;
    context.lineWidth = width;
    if (high) {
      context.beginPath();
      context.arc(x, y, r, 0, 7);
      context.stroke();
    } else {
      line(context, [x - r, y - r], [x + r, y + r]);
      line(context, [x - r, y + r], [x + r, y - r]);
    }
  }
}
/** Outline the chosen head in the heatmap. */
function outline() {
  const context = restoreDrawn($("map")), { left, top, w, h } = grid, i = chosen.head;
  if (i < 0) return;
  for (const [colour, width] of [["#000", 4], ["#fff", 2]]) {
    context.strokeStyle = colour;
    context.lineWidth = width;
    context.strokeRect(left + column(i) * w - 1, top + row(i) * h - 1, w + 1, h + 1);
  }
}
function drawLegend(scale, width) {
  const context = surface($("legend"), width, 32), bar = width - 2;
  for (let x = 0; x < bar; x++) {
    context.fillStyle = scale.stops[Math.round((255 * x) / bar)];
    context.fillRect(x, 0, 1.5, 12);
  }
  context.fillStyle = style("--ink");
  const low = (scale.below ? "≤ " : "") + short(scale.low), high = (scale.above ? "≥ " : "") + short(scale.high);
  text(context, low, 0, 16, "left", "top");
  text(context, high, bar, 16, "right", "top");
  const middle = { diverging: `${chosen.metric.colours.centre}, an average head`, log: "logarithmic", rank: "by rank" };
  text(context, middle[scale.kind] ?? "", bar / 2, 16, "center", "top");
  $("legend").setAttribute("aria-label", `Colours from ${low} to ${high}, ${scale.kind}`);
}

/** The axis of some values: at(value) is 0 to 1; ticks. */
function axis(values, log) {
  let low = values.reduce((a, b) => Math.min(a, b), Infinity), high = values.reduce((a, b) => Math.max(a, b), -Infinity);
  if (!(high > low)) {
    const room = Math.abs(low) || 1;
    [low, high] = log ? [low / 2, high * 2] : [low - room, high + room];
  }
  const f = log ? Math.log10 : (x) => x, a = f(low), b = f(high), pad = (b - a) * 0.04, ticks = [];
  if (log && b - a > 1.2) {
    for (let e = Math.floor(a); e <= b; e++) for (const k of b - a > 4 ? [1] : [1, 3]) ticks.push(k * 10 ** e);
  } else if (log) {
    for (let k = 0; k <= 4; k++) ticks.push(10 ** (a + ((b - a) * k) / 4));
  } else {
    const rough = (b - a) / 5, unit = 10 ** Math.floor(Math.log10(rough));
    const by = unit * [1, 2, 5, 10].find((k) => k * unit >= rough);
    for (let k = Math.ceil(a / by); k * by <= b * (1 + 1e-9); k++) ticks.push(k * by);
  }
  const at = (x) => (f(x) - a + pad) / (b - a + 2 * pad);
  return { at, ticks: ticks.filter((x) => within(at(x)) === at(x)) };
}
/** Draw axes on a canvas in its section, and return the context and functions from values to pixels. */
function axes(id, x, y, names, tall) {
  const inside = getComputedStyle($(`${id}-section`));
  const width = $(`${id}-section`).clientWidth - parseFloat(inside.paddingLeft) - parseFloat(inside.paddingRight);
  const height = Math.max(240, Math.min(tall, width * 0.75)), context = surface($(id), width, height);
  const left = 52, right = width - 10, top = 20, bottom = height - 42;
  const px = (value) => left + (right - left) * x.at(value), py = (value) => bottom - (bottom - top) * y.at(value);
  context.strokeStyle = style("--line");
  context.fillStyle = style("--dim");
  for (const tick of x.ticks) {
    line(context, [px(tick), top], [px(tick), bottom]);
    text(context, short(tick), px(tick), bottom + 5, "center", "top");
  }
  for (const tick of y.ticks) {
    line(context, [left, py(tick)], [right, py(tick)]);
    text(context, short(tick), left - 5, py(tick), "right", "middle");
  }
  context.fillStyle = style("--ink");
  text(context, names[0], right, bottom + 34, "right", "alphabetic");
  text(context, names[1], 0, 11, "left", "alphabetic");
  return { context, px, py };
}

function chosenMetric(id) {
  const [k, j] = $(id).value.split(".");
  return report.profiles[k].metrics[j];
}
function drawScatter() {
  const a = chosenMetric("across"), b = chosenMetric("up"), both = (i) => a.rank[i] && b.rank[i];
  const heads = Array.from(a.mean.keys()).filter((i) => both(i) && Number.isFinite(a.mean[i]) && Number.isFinite(b.mean[i]));
  $("scatter").setAttribute("aria-label", `${b.name} against ${a.name}, a point for each of ${heads.length} heads`);
  $("scatter").hidden = !heads.length;
  $("scatter-note").textContent = "No head has both.";
  points = [];
  if (!heads.length) return;
  const xs = heads.map((i) => a.mean[i]), ys = heads.map((i) => b.mean[i]);
  const axisOf = (metric, values) => axis(values, metric.colours.kind === "log" && values.every((x) => x > 0));
  const { context, px, py } = axes("scatter", axisOf(a, xs), axisOf(b, ys), [a.name, b.name], 420);
  points = heads.map((i, k) => [i, px(xs[k]), py(ys[k])]);
  const many = heads.length > 3000;
  context.globalAlpha = many ? 0.6 : 1;
  for (const point of points) dot(context, point, many ? 2 : 3.2);
  context.globalAlpha = 1;
  const rho = heads.length > 2 ? spearman(xs, ys) : NaN;
  const correlation = Number.isFinite(rho) ? `; Spearman's correlation ${rho.toFixed(2)}` : "";
  $("scatter-note").textContent = `${plural(heads.length, "head")}${correlation}. `
    + "Dark points are of the first layers, light ones of the last.";
  keepDrawn($("scatter"));
  ring();
}
function dot(context, [i, x, y], size) {
  const depth = row(i) / Math.max(1, chosen.profile.rows - 1), dark = matchMedia("(prefers-color-scheme: dark)").matches;
  context.fillStyle = report.viridis[Math.round(255 * (dark ? 0.25 + 0.75 * depth : 0.88 * depth))];
  disc(context, x, y, size);
}
/** Ring the chosen head in the scatter. */
function ring() {
  if (!points.length) return;
  const context = restoreDrawn($("scatter")), here = points.find(([i]) => i === chosen.head);
  if (!here) return;
  dot(context, here, 5);
  context.strokeStyle = style("--ink");
  context.lineWidth = 2;
  context.stroke();
}

function pen(context, k) {
  context.strokeStyle = context.fillStyle = LINES[k % LINES.length];
  context.lineWidth = 2;
  context.setLineDash(DASHES[k % DASHES.length]);
}
function drawCurves() {
  const curves = report.ablation;
  if (!curves) return;
  const all = curves.lines.flatMap((curve) => curve.points);
  const rises = all.flatMap(([, ...of]) => of).filter(Number.isFinite);
  const x = axis(all.map(([share]) => share), false), y = axis([0, ...rises], false);
  const { context, px, py } = axes("curve", x, y, ["share of the heads", curves.unit], 380);
  curves.lines.forEach((curve, k) => {
    pen(context, k);
    line(context, ...curve.points.map(([share, mean]) => [px(share), py(mean)]));
    context.setLineDash([]);
    context.lineWidth = 1;
    for (const [share, mean, low, high] of curve.points) {
      disc(context, px(share), py(mean), 3);
      if (low !== null) line(context, [px(share), py(low)], [px(share), py(high)]);
    }
  });
  $("curve-legend").replaceChildren(...curves.lines.map((curve, k) => {
    const item = make("li"), canvas = make("canvas"), sample = surface(canvas, 34, 10);
    pen(sample, k);
    line(sample, [0, 5], [34, 5]);
    canvas.setAttribute("aria-hidden", "true");
    item.append(canvas, curve.name);
    return item;
  }));
}
