"use strict";
// Shows head profiles. Ranks, ties and limits of colours come with the data; nothing is computed here that the library computes.
// Text of the data is inserted by textContent alone.
(() => {
  const $ = (id) => document.getElementById(id);
  const HEIGHT = 26;  // pixels of a row of the table
  const LINES = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"];  // Okabe and Ito
  const DASHES = [[], [8, 4], [2, 3], [10, 3, 2, 3], [5, 5], [1, 5]];
  const STATE = { profile: null, metric: null, sort: "rank", down: false, head: -1, kept: false };
  let report, listed = [], onScreen = [];

  // ---- data

  async function decode(text) {
    const packed = atob(text);
    const bytes = new Uint8Array(packed.length);
    for (let i = 0; i < packed.length; i++) bytes[i] = packed.charCodeAt(i);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const raw = new Uint8Array(await new Response(stream).arrayBuffer());
    const size = new DataView(raw.buffer).getUint32(0, true);
    const header = JSON.parse(new TextDecoder().decode(raw.subarray(4, 4 + size)));
    const types = { f4: Float32Array, f8: Float64Array, u4: Uint32Array, u1: Uint8Array };
    let at = 4 + size;
    for (const profile of header.profiles) for (const metric of profile.metrics) {
      const n = profile.rows * profile.heads;
      for (const [name, type] of metric.planes) {
        const width = types[type].BYTES_PER_ELEMENT, out = new Uint8Array(n * width);
        for (let b = 0; b < width; b++) for (let i = 0; i < n; i++) out[i * width + b] = raw[at++];
        metric[name] = new types[type](out.buffer);
      }
      metric.order = new Int32Array(metric.ranked);  // heads by rank
      for (let i = 0; i < n; i++) if (metric.rank[i]) metric.order[metric.rank[i] - 1] = i;
      metric.ranks = metric.order.length;
    }
    return header;
  }

  const number = (x, d) => !Number.isFinite(x) ? (Number.isNaN(x) ? "–" : String(x)) : d < 0 ? x.toExponential(3) : x.toFixed(d);
  const short = (x) => x === 0 ? "0" : Math.abs(x) >= 1e-3 && Math.abs(x) < 1e4 ? String(+x.toPrecision(3)) : x.toExponential(1);
  function meanAndSem(metric, i) {
    const mean = metric.mean[i], sem = metric.sem[i];
    if (!(sem > 0) || !Number.isFinite(mean)) return `${number(mean, metric.digits)} ± ${number(sem, metric.digits)}`;
    const d = Math.max(0, 1 - Math.floor(Math.log10(sem)));
    return d > 12 || Math.abs(mean) >= 1e7 ? `${mean.toExponential(4)} ± ${sem.toExponential(1)}` : `${mean.toFixed(d)} ± ${sem.toFixed(d)}`;
  }
  const row = (i) => Math.floor(i / STATE.profile.heads), column = (i) => i % STATE.profile.heads;
  const count = (n) => n.toLocaleString("en");
  function groupOf(i) {  // [number, first head, last head] of the KV group; null: unknown, or each head has its own
    const p = STATE.profile, groups = p.kv[row(i)], width = groups && p.widths[row(i)] / groups;
    if (!groups || STATE.metric.unit !== "head" || column(i) >= p.widths[row(i)]) return null;
    const g = Math.floor(column(i) / width);
    return [g, g * width, (g + 1) * width - 1];
  }
  function describe(i) {
    const p = STATE.profile, m = STATE.metric, group = groupOf(i);
    const lines = [`layer ${p.layers[row(i)]}, ${m.unit} ${column(i)}`, `${meanAndSem(m, i)}  (${m.name})`];
    if (!m.rank[i]) return [lines[0], "no samples"];
    lines.push(`rank ${count(m.rank[i])} of ${count(m.ranked)}, 1 is the highest` + (m.tied[i] ? "; a tie with a neighbour" : ""));
    if (group) lines.push(group[1] === group[2] ? `KV group ${group[0]}, its own` : `KV group ${group[0]}: heads ${group[1]} to ${group[2]}`);
    lines.push(`${count(m.count[i])} samples; ${p.sites[row(i)]}`);
    return lines;
  }

  // ---- drawing

  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  /** Size a canvas in CSS pixels for the screen's resolution, clear it and return its context. */
  function surface(canvas, width, height) {
    const scale = window.devicePixelRatio || 1, context = canvas.getContext("2d");
    canvas.width = Math.round(width * scale); canvas.height = Math.round(height * scale);
    canvas.style.width = `${width}px`; canvas.style.height = `${height}px`;
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.font = "12px system-ui, sans-serif";
    return context;
  }
  function palette(stops) {
    return Array.from({ length: 256 }, (_, i) => {
      const x = i / 255 * (stops.length - 1), k = Math.min(Math.floor(x), stops.length - 2);
      return `rgb(${stops[k].map((a, c) => Math.round(a + (stops[k + 1][c] - a) * (x - k))).join(",")})`;
    });
  }
  /** How the metric's values become places from 0 to 1 on a palette: {at(i), of(value), low, high, palette}. */
  function scaleOf(metric) {
    const c = metric.colours, wanted = $("colours").value, kind = wanted === "auto" ? c.kind : wanted;
    let { low, high } = c;
    const values = metric.order.length ? [metric.mean[metric.order[metric.ranks - 1]], metric.mean[metric.order[0]]] : [0, 1];
    if (wanted === "linear") [low, high] = values;
    if (wanted === "log") [low, high] = [Math.max(values[0], values[1] / 1e6), values[1]];
    const within = (t) => Math.min(1, Math.max(0, t));
    if (kind === "rank") return { kind, low: values[0], high: values[1], palette: report.viridis, of: null,
      at: (i) => metric.ranked > 1 ? 1 - (metric.rank[i] - 1) / (metric.ranked - 1) : 1 };
    let of = (v) => within((v - low) / (high - low || 1));
    if (kind === "log" && low > 0) of = (v) => v > 0 ? within(Math.log(v / low) / (Math.log(high / low) || 1)) : 0;
    if (kind === "diverging") of = (v) => within(v < c.centre ? (v - low) / (c.centre - low) / 2 : 0.5 + (v - c.centre) / (high - c.centre) / 2);
    return { kind, low, high, of, palette: kind === "diverging" ? report.puor : report.viridis, at: (i) => of(metric.mean[i]),
      below: values[0] < low, above: values[1] > high };
  }
  function step(n, room) {  // of ticks, a multiple that leaves them legible
    for (const s of [1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 200, 500, 1000, 10000]) if (n / s * 1 <= room) return s;
    return n;
  }
  let grid = null;
  function drawMap() {
    const p = STATE.profile, m = STATE.metric, box = $("map-box").clientWidth || 600, scale = scaleOf(m);
    const left = 14 + 8 * String(Math.max(...p.layers)).length + 14, top = 34;
    const w = Math.max(3, Math.min(46, Math.floor((box - left - 4) / p.heads)));
    const h = Math.max(4, Math.min(22, Math.floor(660 / p.rows)));
    const context = surface($("map"), left + w * p.heads + 4, top + h * p.rows + 4);
    grid = { left, top, w, h };
    $("map").dataset.grid = [left, top, w, h];
    const gap = w >= 5 && h >= 5 ? 1 : 0;
    for (let r = 0; r < p.rows; r++) for (let c = 0; c < p.heads; c++) {
      const i = r * p.heads + c, measured = m.rank[i] > 0 && !Number.isNaN(m.mean[i]);
      if (!measured && (c >= p.widths[r] || m.unit !== "head")) continue;
      context.fillStyle = measured ? scale.palette[Math.round(255 * scale.at(i))] : style("--empty");
      context.fillRect(left + c * w, top + r * h, w - gap, h - gap);
    }
    context.fillStyle = style("--ink"); context.textBaseline = "middle"; context.textAlign = "right";
    for (let r = 0, s = step(p.rows, 660 / 14); r < p.rows; r++) if (r % s === 0 && h * s >= 11) context.fillText(p.layers[r], left - 5, top + (r + 0.5) * h);
    context.textAlign = "center";
    for (let c = 0, s = step(p.heads, w * p.heads / 22); c < p.heads; c += s) context.fillText(c, left + (c + 0.5) * w, top - 9);
    context.textAlign = "left";
    context.fillText(`${m.unit} →`, left, 8);
    context.save(); context.translate(8, top); context.rotate(-Math.PI / 2); context.textAlign = "right"; context.fillText("← layer", 0, 0); context.restore();
    if (w >= 5 && m.unit === "head") {  // lines between KV groups
      context.fillStyle = style("--ink");
      for (let r = 0; r < p.rows; r++) {
        const width = p.kv[r] && p.widths[r] / p.kv[r];
        if (width > 1 && width < p.widths[r]) for (let c = width; c < p.widths[r]; c += width) context.fillRect(left + c * w - 1, top + r * h - (gap ? 0.5 : 0), 1, h);
      }
    }
    const marked = m.ranked >= 4 * report.marked && w >= 7 && h >= 5 ? report.marked : 0;
    for (let k = 0; k < marked; k++) {
      mark(context, m.order[k], "high"); mark(context, m.order[m.ranks - 1 - k], "low");
    }
    $("marks").textContent = (marked ? `Circles: the ${marked} highest; crosses: the ${marked} lowest. ` : "")
      + (p.kv.some((n, r) => n && n < p.widths[r] && n > 1) && m.unit === "head" && w >= 5 ? "Lines: between KV groups. " : "");
    if (STATE.head >= 0) outline(context, STATE.head);
    $("legend").hidden = !m.ranked;
    if (m.ranked) drawLegend(scale, Math.min(420, box));
    $("map").setAttribute("aria-label", `Heatmap of the means of ${m.name}, ${p.rows} layers by ${p.heads} heads`);
  }
  function mark(context, i, kind) {
    const { left, top, w, h } = grid, x = left + (column(i) + 0.5) * w - 0.5, y = top + (row(i) + 0.5) * h - 0.5, r = Math.min(4, w / 3, h / 3);
    for (const [colour, wide] of [["#000", 3], ["#fff", 1.4]]) {
      context.strokeStyle = colour; context.lineWidth = wide; context.beginPath();
      if (kind === "high") context.arc(x, y, r, 0, 7);
      else { context.moveTo(x - r, y - r); context.lineTo(x + r, y + r); context.moveTo(x - r, y + r); context.lineTo(x + r, y - r); }
      context.stroke();
    }
  }
  function outline(context, i) {
    const { left, top, w, h } = grid;
    for (const [colour, wide] of [["#000", 4], ["#fff", 2]]) {
      context.strokeStyle = colour; context.lineWidth = wide;
      context.strokeRect(left + column(i) * w - 1, top + row(i) * h - 1, w + 1, h + 1);
    }
  }
  function drawLegend(scale, width) {
    const context = surface($("legend"), width, 32), m = STATE.metric, bar = width - 2;
    for (let x = 0; x < bar; x++) { context.fillStyle = scale.palette[Math.round(255 * x / bar)]; context.fillRect(x, 0, 1.5, 12); }
    context.fillStyle = style("--ink"); context.textBaseline = "top";
    const say = (text, x, align) => { context.textAlign = align; context.fillText(text, x, 16); };
    say((scale.below ? "≤ " : "") + short(scale.low), 0, "left"); say((scale.above ? "≥ " : "") + short(scale.high), bar, "right");
    const middle = { diverging: `${m.colours.centre}, an average head`, log: "logarithmic", rank: "by rank", linear: "" }[scale.kind];
    say(middle || "", bar / 2, "center");
    $("legend").setAttribute("aria-label", `Colours from ${short(scale.low)} to ${short(scale.high)}, ${scale.kind}`);
  }

  // ---- table

  const COLUMNS = [["rank", "rank"], ["layer", "layer"], ["head", "head"], ["mean", "mean"], ["sem", "± sem"], ["tied", "tie"], ["kv", "KV"], ["interval", "95 % interval"]];
  /** Parse 0-3,8 to a test; null: everything; undefined: not understood. */
  function numbers(text) {
    const parts = text.split(",").map((t) => t.trim()).filter(Boolean).map((t) => t.match(/^(\d+)(?:-(\d+))?$/));
    if (parts.some((t) => !t)) return undefined;
    return parts.length ? (n) => parts.some(([, a, b]) => n >= +a && n <= +(b ?? a)) : null;
  }
  function filter() {
    const m = STATE.metric, p = STATE.profile, only = $("only").value, tenth = Math.round(m.ranked / 10), tests = {};
    for (const id of ["only-layers", "only-heads"]) {
      const test = numbers($(id).value);
      $(id).setAttribute("aria-invalid", test === undefined);
      tests[id] = test;
    }
    const keep = { all: () => true, high: (i) => m.rank[i] <= tenth, low: (i) => m.rank[i] > m.ranked - tenth, tied: (i) => m.tied[i], clear: (i) => !m.tied[i] }[only];
    listed = Array.from(m.order).filter((i) => keep(i) && (!tests["only-layers"] || tests["only-layers"](p.layers[row(i)])) && (!tests["only-heads"] || tests["only-heads"](column(i))));
    const key = { rank: (i) => m.rank[i], mean: (i) => -m.rank[i], layer: (i) => p.layers[row(i)], head: column, sem: (i) => m.sem[i], interval: (i) => m.sem[i],
      tied: (i) => -m.tied[i], kv: (i) => groupOf(i)?.[0] ?? -1 }[STATE.sort];
    const sign = STATE.down ? -1 : 1;
    listed.sort((a, b) => sign * (key(a) - key(b)) || m.rank[a] - m.rank[b]);
    $("found").textContent = `${count(listed.length)} of ${count(m.ranked)}`;
    $("table").setAttribute("aria-rowcount", listed.length + 1);
    drawColumns(); $("rows").scrollTop = 0; fill(true);
  }
  function drawColumns() {
    const shown = COLUMNS.filter(([id]) => id !== "kv" || STATE.profile.kv.some(Boolean) && STATE.metric.unit === "head");
    $("columns").replaceChildren(...shown.map(([id, name]) => {
      const cell = document.createElement("th"), button = document.createElement("button"), here = STATE.sort === id;
      cell.scope = "col";
      cell.setAttribute("aria-sort", here ? (STATE.down ? "descending" : "ascending") : "none");
      button.type = "button"; button.dataset.sort = id;
      button.textContent = (id === "head" ? STATE.metric.unit : name) + (here ? (STATE.down ? " ▼" : " ▲") : "");
      cell.append(button);
      return cell;
    }));
  }
  /** Put the rows into the table that can be seen; spacers stand for the others. */
  function fill(force) {
    const box = $("rows"), first = Math.max(0, Math.floor(box.scrollTop / HEIGHT) - 6);
    const last = Math.min(listed.length, first + Math.ceil(box.clientHeight / HEIGHT) + 13);
    if (!force && onScreen[0] === first && onScreen[1] === last) return;
    onScreen = [first, last];
    const m = STATE.metric, p = STATE.profile, columns = $("columns").children.length, hasGroups = columns === COLUMNS.length;
    const spacer = (rows) => {
      const line = document.createElement("tr"), cell = line.insertCell();
      line.className = "gap"; line.setAttribute("aria-hidden", "true"); cell.colSpan = columns; cell.style.height = `${rows * HEIGHT}px`;
      return line;
    };
    const lines = listed.slice(first, last).map((i, k) => {
      const line = document.createElement("tr");
      line.dataset.head = i; line.setAttribute("aria-rowindex", first + k + 2);
      if (i === STATE.head) { line.className = "chosen"; line.setAttribute("aria-selected", "true"); }
      const e = report.tie * m.sem[i], group = hasGroups ? [groupOf(i)?.[0] ?? "–"] : [];
      const texts = [m.rank[i], p.layers[row(i)], column(i), number(m.mean[i], m.digits), "±" + number(m.sem[i], m.digits), m.tied[i] ? "~" : "",
        ...group, e >= 0 ? `${number(m.mean[i] - e, m.digits)} – ${number(m.mean[i] + e, m.digits)}` : "–"];
      for (const text of texts) line.insertCell().textContent = text;
      return line;
    });
    $("body").replaceChildren(spacer(first), ...lines, spacer(listed.length - last));
  }
  // ---- two metrics

  let points = null;
  function choices(select, chosen) {
    const groups = report.profiles.map((p, k) => [p, k]).filter(([p]) => p.heads === STATE.profile.heads && String(p.layers) === String(STATE.profile.layers));
    const options = ([p, k]) => p.metrics.map((m, j) => { const o = new Option(m.name, `${k}.${j}`); return o; });
    select.replaceChildren(...(groups.length > 1 ? groups.map((g) => { const e = document.createElement("optgroup"); e.label = g[0].name; e.append(...options(g)); return e; }) : options(groups[0])));
    select.value = chosen;
    if (select.selectedIndex < 0) select.selectedIndex = 0;
  }
  const chosenMetric = (id) => { const [k, j] = $(id).value.split("."); return report.profiles[k].metrics[j]; };
  /** Spearman's correlation: Pearson's of the ranks, equal values with their mean rank. */
  function spearman(x, y) {
    const ranks = (v) => {
      const order = v.map((_, i) => i).sort((a, b) => v[a] - v[b]), out = new Float64Array(v.length);
      for (let i = 0, j; i < order.length; i = j) {
        for (j = i; j < order.length && v[order[j]] === v[order[i]];) j++;
        for (let k = i; k < j; k++) out[order[k]] = (i + j - 1) / 2;
      }
      return out;
    };
    const a = ranks(x), b = ranks(y), mean = (x.length - 1) / 2;
    let ab = 0, aa = 0, bb = 0;
    for (let i = 0; i < x.length; i++) { ab += (a[i] - mean) * (b[i] - mean); aa += (a[i] - mean) ** 2; bb += (b[i] - mean) ** 2; }
    return ab / Math.sqrt(aa * bb);
  }
  function axis(values, log) {
    let low = values.reduce((a, b) => Math.min(a, b), Infinity), high = values.reduce((a, b) => Math.max(a, b), -Infinity);
    if (!(high > low)) { low = log ? low / 2 : low - (Math.abs(low) || 1); high = log ? high * 2 : high + (Math.abs(high) || 1); }
    const f = log ? Math.log10 : (v) => v, a = f(low), b = f(high), pad = (b - a) * 0.04, ticks = [];
    const rough = (b - a) / 5, unit = 10 ** Math.floor(Math.log10(rough)), s = unit * [1, 2, 5, 10].find((k) => k * unit >= rough);
    if (log && b - a > 1.2) for (let e = Math.floor(a); e <= b; e++) for (const k of b - a > 4 ? [1] : [1, 3]) { const v = k * 10 ** e; if (f(v) >= a && f(v) <= b) ticks.push(v); }
    else if (!log) for (let v = Math.ceil(a / s) * s; v <= b + s / 1e6; v += s) ticks.push(Math.abs(v) < s / 1e6 ? 0 : v);
    else for (let k = 0; k <= 4; k++) ticks.push(10 ** (a + (b - a) * k / 4));
    return { at: (v) => (f(v) - a + pad) / (b - a + 2 * pad), ticks };
  }
  function axes(context, x, y, box, names) {
    const { left, top, width, height } = box;
    context.strokeStyle = style("--line"); context.fillStyle = style("--dim"); context.lineWidth = 1;
    context.textBaseline = "top"; context.textAlign = "center";
    for (const v of x.ticks) { const at = left + width * x.at(v); context.beginPath(); context.moveTo(at, top); context.lineTo(at, top + height); context.stroke(); context.fillText(short(v), at, top + height + 5); }
    context.textBaseline = "middle"; context.textAlign = "right";
    for (const v of y.ticks) { const at = top + height * (1 - y.at(v)); context.beginPath(); context.moveTo(left, at); context.lineTo(left + width, at); context.stroke(); context.fillText(short(v), left - 5, at); }
    context.fillStyle = style("--ink"); context.textBaseline = "alphabetic"; context.textAlign = "right";
    context.fillText(names[0], left + width, top + height + 34); context.textAlign = "left"; context.fillText(names[1], 0, 11);
  }
  const inner = (id) => { const s = getComputedStyle($(id)); return $(id).clientWidth - parseFloat(s.paddingLeft) - parseFloat(s.paddingRight); };
  function drawScatter() {
    const a = chosenMetric("across"), b = chosenMetric("up"), p = STATE.profile, heads = [];
    for (let i = 0; i < p.rows * p.heads; i++) if (a.rank[i] && b.rank[i] && Number.isFinite(a.mean[i]) && Number.isFinite(b.mean[i])) heads.push(i);
    const width = inner("scatter-section"), height = Math.max(240, Math.min(420, width * 0.75)), context = surface($("scatter"), width, height);
    $("scatter").setAttribute("aria-label", `${b.name} against ${a.name}, a point for each of ${heads.length} heads`);
    $("scatter").hidden = !heads.length; $("scatter-note").textContent = "No head has both.";
    points = null;
    if (!heads.length) return;
    const xs = heads.map((i) => a.mean[i]), ys = heads.map((i) => b.mean[i]);
    const log = (m, v) => m.colours.kind === "log" && v.every((z) => z > 0), x = axis(xs, log(a, xs)), y = axis(ys, log(b, ys));
    const box = { left: 52, top: 20, width: width - 62, height: height - 62 };
    axes(context, x, y, box, [a.name, b.name]);
    const r = heads.length > 3000 ? 2 : 3.2, dark = matchMedia("(prefers-color-scheme: dark)").matches, most = Math.max(1, p.rows - 1);
    points = heads.map((i, k) => [i, box.left + box.width * x.at(xs[k]), box.top + box.height * (1 - y.at(ys[k]))]);
    const dot = ([i, px, py], size) => {
      const depth = row(i) / most;
      context.fillStyle = report.viridis[Math.round(255 * (dark ? 0.25 + 0.75 * depth : 0.88 * depth))];
      context.beginPath(); context.arc(px, py, size, 0, 7); context.fill();
    };
    context.globalAlpha = heads.length > 3000 ? 0.6 : 1;
    for (const point of points) dot(point, r);
    context.globalAlpha = 1;
    const here = points.find(([i]) => i === STATE.head);
    if (here) { dot(here, r + 2); context.strokeStyle = style("--ink"); context.lineWidth = 2; context.stroke(); }
    const rho = heads.length > 2 ? spearman(xs, ys) : NaN;
    $("scatter-note").textContent = `${count(heads.length)} heads` + (Number.isFinite(rho) ? `; Spearman's correlation ${rho.toFixed(2)}` : "")
      + `. Dark points are of the first layers, light ones of the last.`;
  }

  // ---- curve

  function drawCurve() {
    const curves = report.ablation;
    if (!curves) return;
    const lines = curves.lines, all = lines.flatMap((l) => l.points), width = inner("curve-section"), height = Math.max(240, Math.min(380, width * 0.65));
    const context = surface($("curve"), width, height), box = { left: 52, top: 20, width: width - 62, height: height - 62 };
    const x = axis(all.map((q) => q[0]), false), y = axis(all.flatMap((q) => [q[1], q[2], q[3]]).filter(Number.isFinite).concat(0), false);
    axes(context, x, y, box, ["share of the heads", curves.unit]);
    const px = (v) => box.left + box.width * x.at(v), py = (v) => box.top + box.height * (1 - y.at(v));
    lines.forEach((line, k) => {
      pen(context, k);
      context.beginPath(); line.points.forEach((q, n) => n ? context.lineTo(px(q[0]), py(q[1])) : context.moveTo(px(q[0]), py(q[1]))); context.stroke();
      context.setLineDash([]);
      for (const q of line.points) {
        context.beginPath(); context.arc(px(q[0]), py(q[1]), 3, 0, 7); context.fill();
        if (q[2] !== null) { context.lineWidth = 1; context.beginPath(); context.moveTo(px(q[0]), py(q[2])); context.lineTo(px(q[0]), py(q[3])); context.stroke(); }
      }
    });
    $("curve-legend").replaceChildren(...lines.map((line, k) => {
      const item = document.createElement("li"), canvas = document.createElement("canvas"), c = surface(canvas, 34, 10);
      pen(c, k); c.beginPath(); c.moveTo(0, 5); c.lineTo(34, 5); c.stroke();
      canvas.setAttribute("aria-hidden", "true");
      item.append(canvas, line.name);
      return item;
    }));
  }
  function pen(context, k) {
    context.strokeStyle = context.fillStyle = LINES[k % LINES.length]; context.lineWidth = 2; context.setLineDash(DASHES[k % DASHES.length]);
  }
  /** Fill a table: the first cell of each line is its heading, and may break after an underscore. */
  function table(target, heads, lines) {
    const fill = (line, texts, tag) => texts.forEach((text, k) => {
      const cell = document.createElement(k ? tag : "th");
      if (cell.tagName === "TH") cell.scope = tag === "th" ? "col" : "row";
      for (const part of String(text).split(/(?<=_)/)) cell.append(part, document.createElement("wbr"));
      line.append(cell);
    });
    target.replaceChildren();
    fill(target.createTHead().insertRow(), heads, "th");
    const body = target.createTBody();
    for (const line of lines) fill(body.insertRow(), line, "td");
  }

  // ---- choosing

  function choose(i, { keep = false, scroll = true } = {}) {
    STATE.head = i; STATE.kept = keep;
    const p = STATE.profile;
    if (i >= 0) {
      $("head-text").textContent = describe(i).join(" · ");
      const measured = p.metrics.filter((m) => m.rank[i]);
      if (measured.length) table($("head-table"), ["metric", "mean ± sem", "rank", "tie"], measured.map((m) => [m.name, meanAndSem(m, i), `${count(m.rank[i])} of ${count(m.ranked)}`, m.tied[i] ? "~" : ""]));
      else $("head-table").replaceChildren();
    }
    drawMap(); drawScatter();
    const at = listed.indexOf(i), box = $("rows");
    if (scroll && at >= 0 && (at * HEIGHT < box.scrollTop || (at + 2) * HEIGHT > box.scrollTop + box.clientHeight)) box.scrollTop = at * HEIGHT - box.clientHeight / 2;
    fill(true);
  }
  function tip(event, i) {
    const t = $("tip");
    t.hidden = i < 0;
    if (i < 0) return;
    t.replaceChildren(...describe(i).map((text) => { const line = document.createElement("div"); line.textContent = text; return line; }));
    t.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - t.offsetWidth - 8))}px`;
    t.style.top = `${event.clientY + 18 + t.offsetHeight > innerHeight ? event.clientY - t.offsetHeight - 12 : event.clientY + 18}px`;
  }
  function cellAt(event) {
    const box = $("map").getBoundingClientRect(), c = Math.floor((event.clientX - box.left - grid.left) / grid.w), r = Math.floor((event.clientY - box.top - grid.top) / grid.h);
    const p = STATE.profile;
    return r >= 0 && r < p.rows && c >= 0 && c < p.widths[r] && (STATE.metric.unit === "head" || STATE.metric.rank[r * p.heads + c]) ? r * p.heads + c : -1;
  }
  function pointAt(event) {
    const box = $("scatter").getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    let best = -1, least = 144;
    for (const [i, px, py] of points ?? []) { const d = (px - x) ** 2 + (py - y) ** 2; if (d < least) [best, least] = [i, d]; }
    return best;
  }
  function watch(canvas, find) {
    canvas.addEventListener("pointermove", (event) => {
      const i = find(event);
      tip(event, i);
      if (!STATE.kept && i >= 0 && i !== STATE.head) choose(i, { scroll: false });
    });
    canvas.addEventListener("pointerleave", () => { $("tip").hidden = true; });
    canvas.addEventListener("click", (event) => { const i = find(event); if (i >= 0) choose(i, { keep: !(STATE.kept && STATE.head === i) }); });
  }
  function onKey(event, move) {
    if (event.key === "Escape") { $("tip").hidden = true; STATE.kept = false; return; }
    if (event.key === "Enter" && STATE.head >= 0) { choose(STATE.head, { keep: !STATE.kept }); return; }
    const next = move(event.key);
    if (next === undefined) return;
    event.preventDefault();
    choose(next, { keep: STATE.kept });
  }
  function moveInMap(key) {
    const p = STATE.profile;
    let r = STATE.head < 0 ? 0 : row(STATE.head), c = STATE.head < 0 ? -1 : column(STATE.head);
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Home: [0, -p.heads], End: [0, p.heads] }[key];
    if (!steps) return undefined;
    r = Math.max(0, Math.min(p.rows - 1, r + steps[0]));
    c = Math.max(0, Math.min(p.widths[r] - 1, c + steps[1]));
    return r * p.heads + c;
  }
  const moveInList = (order) => (key) => {
    const by = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[key], list = order();
    if (!by || !list.length) return undefined;
    const at = list.indexOf(STATE.head);
    return list[at < 0 ? 0 : Math.max(0, Math.min(list.length - 1, at + by))];
  };

  // ---- the page

  function showProfile() {
    const k = +$("profile").value, p = STATE.profile = report.profiles[k];
    STATE.head = p.metrics[p.start].order[0] ?? -1; STATE.kept = false;
    $("model").textContent = p.model;
    $("summary").textContent = `${p.rows} layers of ${Math.max(...p.widths)} heads; ${p.summary}`;
    $("metric").replaceChildren(...p.metrics.map((m, j) => new Option(m.name, j)));
    $("metric").value = p.start;
    const other = p.metrics.findIndex((m, j) => j !== p.start && m.unit === "head");
    const relative = p.metrics.findIndex((m) => m.name === "relative_head_residual_contribution_norm");
    choices($("across"), `${k}.${p.start}`); choices($("up"), `${k}.${relative >= 0 && relative !== p.start ? relative : Math.max(other, 0)}`);
    $("about").replaceChildren(...[...p.about, ["This report", [["made", report.created], ["by", `fastheads ${report.version}`]]]].map(([heading, lines]) => {
      const part = document.createElement("div"), title = document.createElement("h3"), list = document.createElement("dl");
      title.textContent = heading;
      for (const [name, text] of lines) { const t = document.createElement("dt"), d = document.createElement("dd"); t.textContent = name; d.textContent = text; list.append(t, d); }
      part.append(title, list);
      return part;
    }));
    $("head-text").textContent = "Point at a head, or choose one in the table."; $("head-table").replaceChildren();
    showMetric();
  }
  function showMetric() {
    const p = STATE.profile, m = STATE.metric = p.metrics[+$("metric").value];
    const lost = m.nonfinite ? `${count(m.nonfinite)} samples were NaN or infinite and are left out` : "";
    $("note").textContent = [m.note, m.ranked ? "" : "no head has samples", p.metrics.indexOf(m) === p.start ? p.note : "", lost].filter(Boolean).join("; ");
    $("table-note").textContent = `± sem: the standard error of the mean. ~ a tie: within ${report.tie} standard errors of the difference to a neighbour in the ranking.`
      + (p.tokens ? " Tokens of one text are not independent: the errors are too small." : "");
    if (STATE.head >= 0 && !m.rank[STATE.head]) STATE.head = m.order[0] ?? -1;
    filter();
    choose(STATE.head, { keep: STATE.kept, scroll: false });
  }
  function start() {
    report.viridis = palette(report.palettes.viridis); report.puor = palette(report.palettes.puor);
    $("profile").replaceChildren(...report.profiles.map((p, k) => new Option(p.name, k)));
    $("profile-label").hidden = report.profiles.length < 2;
    if (report.ablation) {
      const lines = report.ablation.lines;
      $("curve-section").hidden = false; $("curve-text").textContent = report.ablation.text;
      table($("curve-table"), ["heads by", "share", "mean", "from", "to"], lines.flatMap((l) => l.points.map((q) => [l.name, ...q.map((v) => v === null ? "–" : short(v))])));
    }
    showProfile();
    const resize = () => { drawMap(); drawScatter(); drawCurve(); fill(true); };
    resize();
    $("profile").addEventListener("change", showProfile);
    $("metric").addEventListener("change", showMetric);
    $("colours").addEventListener("change", drawMap);
    for (const id of ["across", "up"]) $(id).addEventListener("change", drawScatter);
    for (const id of ["only-layers", "only-heads", "only"]) $(id).addEventListener("input", filter);
    $("columns").addEventListener("click", (event) => {
      const id = event.target.dataset?.sort;
      if (!id) return;
      [STATE.down, STATE.sort] = [STATE.sort === id && !STATE.down, id];
      filter();
      $("columns").querySelector(`[data-sort=${id}]`).focus();
    });
    $("rows").addEventListener("scroll", () => requestAnimationFrame(() => fill(false)), { passive: true });
    $("body").addEventListener("click", (event) => { const line = event.target.closest("tr[data-head]"); if (line) choose(+line.dataset.head, { keep: true, scroll: false }); });
    watch($("map"), cellAt); watch($("scatter"), pointAt);
    $("map").addEventListener("keydown", (event) => onKey(event, moveInMap));
    $("rows").addEventListener("keydown", (event) => { if (event.target === $("rows")) onKey(event, moveInList(() => listed)); });
    $("scatter").addEventListener("keydown", (event) => onKey(event, moveInList(() => (points ?? []).slice().sort((a, b) => a[1] - b[1]).map(([i]) => i))));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", resize);
    let width = innerWidth;
    addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; resize(); } });
    document.documentElement.dataset.ready = "yes";
  }
  if (typeof DecompressionStream === "undefined") $("message").textContent = "This browser is too old for this page: it needs DecompressionStream (Chrome 80, Firefox 113, Safari 16.4).";
  else decode($("data").textContent.trim()).then((header) => { report = header; start(); })
    .catch((error) => { $("message").textContent = `The data of this page cannot be read: ${error.message}`; });
})();
