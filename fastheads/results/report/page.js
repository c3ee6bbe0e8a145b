// The page: the table, what is chosen, and what the reader does. Text of the data is inserted as text alone, never as markup.

const $ = (id) => document.getElementById(id);
const HEIGHT = 26; // pixels of a row of the table
const COLUMNS = [
  ["rank", "rank"], ["layer", "layer"], ["head", "head"], ["mean", "mean"], ["sem", "± sem"], ["tied", "tie"], ["kv", "KV"],
  ["interval", "95 % interval"],
];
const NO_HEAD = "Point at a head, or choose one in the table.";
let listed = []; // heads in the order of the table
let onScreen = []; // the first and last of them that are in the document

function make(tag, words = "") {
  const element = document.createElement(tag);
  element.textContent = words;
  return element;
}

// ---- table

function filter() {
  const { metric, profile } = chosen, tenth = Math.round(metric.ranked / 10);
  const [layers, heads] = ["only-layers", "only-heads"].map((id) => {
    const test = numbers($(id).value);
    $(id).setAttribute("aria-invalid", test === undefined);
    return test ?? (() => true);
  });
  const kinds = {
    all: () => true, high: (i) => metric.rank[i] <= tenth, low: (i) => metric.rank[i] > metric.ranked - tenth,
    tied: (i) => metric.tied[i], clear: (i) => !metric.tied[i],
  };
  const kind = kinds[$("only").value], layerOf = (i) => profile.layers[row(i)];
  listed = Array.from(metric.order).filter((i) => kind(i) && layers(layerOf(i)) && heads(column(i)));
  const keys = {
    rank: (i) => metric.rank[i], mean: (i) => -metric.rank[i], layer: layerOf, head: column, sem: (i) => metric.sem[i],
    interval: (i) => metric.sem[i], tied: (i) => -metric.tied[i], kv: (i) => groupOf(i)?.[0] ?? -1,
  };
  const key = keys[chosen.sort], sign = chosen.down ? -1 : 1;
  listed.sort((a, b) => sign * (key(a) - key(b)) || metric.rank[a] - metric.rank[b]);
  $("found").textContent = `${count(listed.length)} of ${count(metric.ranked)}`;
  $("table").setAttribute("aria-rowcount", listed.length + 1);
  drawColumns();
  $("rows").scrollTop = 0;
  fillTable(true);
}
const hasGroups = () => chosen.profile.kv.some(Boolean) && chosen.metric.unit === "head";
function drawColumns() {
  $("columns").replaceChildren(...COLUMNS.filter(([id]) => id !== "kv" || hasGroups()).map(([id, name]) => {
    const here = chosen.sort === id, cell = make("th");
    const button = make("button", (id === "head" ? chosen.metric.unit : name) + (here ? (chosen.down ? " ▼" : " ▲") : ""));
    cell.scope = "col";
    cell.setAttribute("aria-sort", here ? (chosen.down ? "descending" : "ascending") : "none");
    button.type = "button";
    button.dataset.sort = id;
    cell.append(button);
    return cell;
  }));
}
/** Put the rows that can be seen into the document; two spacers stand for the others. */
function fillTable(force) {
  const box = $("rows"), first = Math.max(0, Math.floor(box.scrollTop / HEIGHT) - 6);
  const last = Math.min(listed.length, first + Math.ceil(box.clientHeight / HEIGHT) + 13);
  if (!force && onScreen[0] === first && onScreen[1] === last) return;
  onScreen = [first, last];
  const spacer = (rows) => {
    const line = make("tr"), cell = line.insertCell();
    line.className = "gap";
    line.setAttribute("aria-hidden", "true");
    cell.colSpan = $("columns").children.length;
    cell.style.height = `${rows * HEIGHT}px`;
    return line;
  };
  const lines = listed.slice(first, last).map((i, k) => tableRow(i, first + k + 2));
  $("body").replaceChildren(spacer(first), ...lines, spacer(listed.length - last));
}
function tableRow(i, index) {
  const { metric, profile } = chosen, shown = (x) => number(x, metric.digits), mean = metric.mean[i], sem = metric.sem[i];
  const line = make("tr"), reach = report.tie * sem;
  line.dataset.head = i;
  line.setAttribute("aria-rowindex", index);
  if (i === chosen.head) line.className = "chosen";
  const place = [profile.layers[row(i)], column(i)];
  const cells = [metric.rank[i], ...place, shown(mean), `±${shown(sem)}`, metric.tied[i] ? "~" : ""];
  if (hasGroups()) cells.push(groupOf(i)?.[0] ?? "–");
  cells.push(reach >= 0 ? `${shown(mean - reach)} – ${shown(mean + reach)}` : "–");
  for (const cell of cells) line.insertCell().textContent = cell;
  return line;
}
/** Fill a small table: the first cell of each line is its heading, and may break after an underscore. */
function fillSmall(table, heads, lines) {
  const add = (line, texts, tag) => texts.forEach((words, k) => {
    const cell = make(k ? tag : "th");
    if (cell.tagName === "TH") cell.scope = tag === "th" ? "col" : "row";
    for (const part of String(words).split(/(?<=_)/)) cell.append(part, make("wbr"));
    line.append(cell);
  });
  table.replaceChildren();
  add(table.createTHead().insertRow(), heads, "th");
  const body = table.createTBody();
  for (const line of lines) add(body.insertRow(), line, "td");
}

// ---- one head

function choose(i, { keep = false, scroll = true } = {}) {
  chosen.head = i;
  chosen.kept = keep;
  $("head-text").textContent = i < 0 ? NO_HEAD : describe(i).join(" · ");
  const measured = i < 0 ? [] : chosen.profile.metrics.filter((metric) => metric.rank[i]);
  const rankIn = (metric) => `${count(metric.rank[i])} of ${count(metric.ranked)}`;
  const lines = measured.map((metric) => [metric.name, meanAndSem(metric, i), rankIn(metric), metric.tied[i] ? "~" : ""]);
  if (lines.length) fillSmall($("head-table"), ["metric", "mean ± sem", "rank", "tie"], lines);
  else $("head-table").replaceChildren();
  outline();
  ring();
  const top = listed.indexOf(i) * HEIGHT, box = $("rows");
  const seen = top >= box.scrollTop && top + 2 * HEIGHT <= box.scrollTop + box.clientHeight;
  if (scroll && top >= 0 && !seen) box.scrollTop = top - box.clientHeight / 2;
  fillTable(true);
}
function showTip(event, i) {
  const tip = $("tip"), { clientX: x, clientY: y } = event;
  tip.hidden = i < 0;
  if (i < 0) return;
  tip.replaceChildren(...describe(i).map((words) => make("div", words)));
  const below = y + 18 + tip.offsetHeight <= innerHeight;
  tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${below ? y + 18 : y - tip.offsetHeight - 12}px`;
}
function cellAt(event) {
  const box = $("map").getBoundingClientRect(), { profile, metric } = chosen;
  const c = Math.floor((event.clientX - box.left - grid.left) / grid.w);
  const r = Math.floor((event.clientY - box.top - grid.top) / grid.h);
  if (r < 0 || r >= profile.rows || c < 0 || c >= profile.widths[r]) return -1;
  const i = r * profile.heads + c;
  return metric.unit === "head" || metric.rank[i] ? i : -1;
}
function pointAt(event) {
  const box = $("scatter").getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
  let best = -1, least = 12 ** 2; // pixels, squared
  for (const [i, px, py] of points) {
    const distance = (px - x) ** 2 + (py - y) ** 2;
    if (distance < least) [best, least] = [i, distance];
  }
  return best;
}
function watch(canvas, find) {
  canvas.addEventListener("pointermove", (event) => {
    const i = find(event);
    showTip(event, i);
    if (!chosen.kept && i >= 0 && i !== chosen.head) choose(i, { scroll: false });
  });
  canvas.addEventListener("pointerleave", () => { $("tip").hidden = true; });
  canvas.addEventListener("click", (event) => {
    const i = find(event);
    if (i >= 0) choose(i, { keep: !(chosen.kept && chosen.head === i) });
  });
}

// ---- keys

function onKey(event, move) {
  if (event.key === "Escape") {
    $("tip").hidden = true;
    chosen.kept = false;
  } else if (event.key === "Enter" && chosen.head >= 0) {
    choose(chosen.head, { keep: !chosen.kept });
  } else {
    const next = move(event.key);
    if (next === undefined) return;
    event.preventDefault();
    choose(next, { keep: chosen.kept });
  }
}
function moveInMap(key) {
  const { rows, heads, widths } = chosen.profile;
  const moves = {
    ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Home: [0, -heads], End: [0, heads],
  };
  if (!moves[key]) return undefined;
  const from = Math.max(chosen.head, 0), r = Math.max(0, Math.min(rows - 1, row(from) + moves[key][0]));
  return r * heads + Math.max(0, Math.min(widths[r] - 1, column(from) + moves[key][1]));
}
const moveIn = (listOf) => (key) => {
  const by = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[key], list = listOf();
  if (!by || !list.length) return undefined;
  const at = list.indexOf(chosen.head);
  return list[at < 0 ? 0 : Math.max(0, Math.min(list.length - 1, at + by))];
};
const byX = () => points.slice().sort((a, b) => a[1] - b[1]).map(([i]) => i);

// ---- profiles and metrics

/** Offer the metrics of all profiles with the same layers and heads as the one that is shown. */
function offerMetrics(select, value) {
  const alike = (p) => p.heads === chosen.profile.heads && String(p.layers) === String(chosen.profile.layers);
  const groups = [...report.profiles.entries()].filter(([, profile]) => alike(profile)).map(([k, profile]) => {
    const group = make("optgroup");
    group.label = profile.name;
    group.append(...profile.metrics.map((metric, j) => new Option(metric.name, `${k}.${j}`)));
    return group;
  });
  select.replaceChildren(...(groups.length > 1 ? groups : groups[0].children));
  select.value = value;
}
function showProfile() {
  const k = +$("profile").value, profile = report.profiles[k], { start, metrics } = profile;
  chosen.profile = profile;
  chosen.head = metrics[start].order[0] ?? -1;
  chosen.kept = false;
  $("model").textContent = profile.model;
  const heads = plural(Math.max(...profile.widths), "head");
  $("summary").textContent = `${plural(profile.rows, "layer")} of ${heads}; ${profile.summary}`;
  $("metric").replaceChildren(...metrics.map((metric, j) => new Option(metric.name, j)));
  $("metric").value = start;
  // The other axis: the metric after the ratio by which heads of all layers can be compared.
  const other = metrics.findIndex((metric, j) => j !== start && metric.name === "relative_head_residual_contribution_norm");
  const any = metrics.findIndex((metric, j) => j !== start && metric.unit === "head");
  offerMetrics($("across"), `${k}.${start}`);
  offerMetrics($("up"), `${k}.${[other, any, start].find((j) => j >= 0)}`);
  const made = ["This report", [["made", report.created], ["by", `fastheads ${report.version}`]]];
  $("about").replaceChildren(...[...profile.about, made].map(([heading, lines]) => {
    const part = make("div"), list = make("dl");
    for (const [name, words] of lines) list.append(make("dt", name), make("dd", words));
    part.append(make("h3", heading), list);
    return part;
  }));
  showMetric();
}
function showMetric() {
  const { profile } = chosen, metric = (chosen.metric = profile.metrics[+$("metric").value]);
  const first = metric === profile.metrics[profile.start];
  const notes = [metric.note, metric.ranked ? "" : "no head has samples", first ? profile.note : ""];
  if (metric.nonfinite) notes.push(`${count(metric.nonfinite)} samples were NaN or infinite and are left out`);
  $("note").textContent = notes.filter(Boolean).join("; ");
  const tokens = profile.tokens ? " Tokens of one text are not independent: the errors are too small." : "";
  $("table-note").textContent = "± sem: the standard error of the mean. "
    + `~ a tie: within ${report.tie} standard errors of the difference to a neighbour in the ranking.${tokens}`;
  if (chosen.head >= 0 && !metric.rank[chosen.head]) chosen.head = metric.order[0] ?? -1;
  filter();
  drawPictures();
  choose(chosen.head, { keep: chosen.kept, scroll: false });
}
function drawPictures() {
  drawMap();
  drawScatter();
  drawCurves();
}

// ---- start

function start() {
  report.viridis = palette(report.palettes.viridis);
  report.puor = palette(report.palettes.puor);
  $("profile").replaceChildren(...report.profiles.map((profile, k) => new Option(profile.name, k)));
  $("profile-label").hidden = report.profiles.length < 2;
  if (report.ablation) {
    $("curve-section").hidden = false;
    $("curve-text").textContent = report.ablation.text;
    const shown = (x) => (x === null ? "–" : short(x));
    const lines = report.ablation.lines.flatMap(({ name, points: of }) => of.map((point) => [name, ...point.map(shown)]));
    fillSmall($("curve-table"), ["heads", "share", "mean", "from", "to"], lines);
  }
  showProfile();
  listen();
  document.documentElement.dataset.ready = "yes";
}
function listen() {
  $("profile").addEventListener("change", showProfile);
  $("metric").addEventListener("change", showMetric);
  $("colours").addEventListener("change", drawMap);
  for (const id of ["across", "up"]) $(id).addEventListener("change", drawScatter);
  for (const id of ["only-layers", "only-heads", "only"]) $(id).addEventListener("input", filter);
  $("columns").addEventListener("click", (event) => {
    const id = event.target.dataset?.sort;
    if (!id) return;
    chosen.down = chosen.sort === id && !chosen.down;
    chosen.sort = id;
    filter();
    $("columns").querySelector(`[data-sort=${id}]`).focus();
  });
  $("rows").addEventListener("scroll", () => requestAnimationFrame(() => fillTable(false)), { passive: true });
  $("body").addEventListener("click", (event) => {
    const line = event.target.closest("tr[data-head]");
    if (line) choose(+line.dataset.head, { keep: true, scroll: false });
  });
  watch($("map"), cellAt);
  watch($("scatter"), pointAt);
  $("map").addEventListener("keydown", (event) => onKey(event, moveInMap));
  $("scatter").addEventListener("keydown", (event) => onKey(event, moveIn(byX)));
  $("rows").addEventListener("keydown", (event) => { if (event.target === $("rows")) onKey(event, moveIn(() => listed)); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawPictures);
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    drawPictures();
    fillTable(true);
  });
}

const tooOld = "This browser is too old for this page, which needs DecompressionStream: Chrome 80, Firefox 113 or Safari 16.4.";
if (typeof DecompressionStream === "undefined") {
  $("message").textContent = tooOld;
} else {
  decode($("data").textContent.trim())
    .then((header) => { report = header; start(); })
    .catch((error) => { $("message").textContent = `The data of this page cannot be read: ${error.message}`; });
}
