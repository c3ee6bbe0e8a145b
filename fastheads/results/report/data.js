// The data of the page, and text about them. Ranks, ties, limits of colours and decimals come with the data: nothing is computed
// here that the library computes.

const TYPES = { f4: Float32Array, f8: Float64Array, u4: Uint32Array, u1: Uint8Array };
let report; // the header: profiles, curves, palettes
// What is chosen; head: row * heads + column, -1: none; kept: it stays while the mouse moves on.
const chosen = { profile: null, metric: null, sort: "rank", down: false, head: -1, kept: false };

/** Decode the data block: the header, with the planes of each metric as arrays [rows * heads], as payload.py packs them. */
async function decode(text) {
  const packed = atob(text), bytes = new Uint8Array(packed.length);
  for (let i = 0; i < packed.length; i++) bytes[i] = packed.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const raw = new Uint8Array(await new Response(stream).arrayBuffer());
  const size = new DataView(raw.buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(raw.subarray(4, 4 + size)));
  let at = 4 + size;
  for (const profile of header.profiles) {
    const n = profile.rows * profile.heads;
    for (const metric of profile.metrics) {
      for (const [name, type] of metric.planes) {
        const width = TYPES[type].BYTES_PER_ELEMENT, out = new Uint8Array(n * width);
        for (let b = 0; b < width; b++) for (let i = 0; i < n; i++) out[i * width + b] = raw[at++];
        metric[name] = new TYPES[type](out.buffer);
      }
      metric.order = new Int32Array(metric.ranked); // heads by rank
      for (let i = 0; i < n; i++) if (metric.rank[i]) metric.order[metric.rank[i] - 1] = i;
    }
  }
  return header;
}

const row = (i) => Math.floor(i / chosen.profile.heads);
const column = (i) => i % chosen.profile.heads;
const count = (n) => n.toLocaleString("en");
const plural = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;

/** Format a number with `digits` decimals; -1: as a power of ten. */
function number(x, digits) {
  if (Number.isNaN(x)) return "–";
  if (!Number.isFinite(x)) return String(x);
  return digits < 0 ? x.toExponential(3) : x.toFixed(digits);
}
function short(x) {
  if (x === 0) return "0";
  return Math.abs(x) >= 1e-3 && Math.abs(x) < 1e4 ? String(+x.toPrecision(3)) : x.toExponential(1);
}
/** Format mean ± standard error, with two digits of the error. */
function meanAndSem(metric, i) {
  const mean = metric.mean[i], sem = metric.sem[i];
  if (!(sem > 0) || !Number.isFinite(mean)) return `${number(mean, metric.digits)} ± ${number(sem, metric.digits)}`;
  const digits = Math.max(0, 1 - Math.floor(Math.log10(sem)));
  if (digits > 12 || Math.abs(mean) >= 1e7) return `${mean.toExponential(4)} ± ${sem.toExponential(1)}`;
  return `${mean.toFixed(digits)} ± ${sem.toFixed(digits)}`;
}

/** The KV group of a head: [number, first head, last head]; null if it is unknown. */
function groupOf(i) {
  const { kv, widths } = chosen.profile, r = row(i);
  if (!kv[r] || chosen.metric.unit !== "head" || column(i) >= widths[r]) return null;
  const size = widths[r] / kv[r], group = Math.floor(column(i) / size);
  return [group, group * size, (group + 1) * size - 1];
}

/** Describe a head in lines. */
function describe(i) {
  const { profile, metric } = chosen, group = groupOf(i);
  const title = `layer ${profile.layers[row(i)]}, ${metric.unit} ${column(i)}`;
  if (!metric.rank[i]) return [title, "no samples"];
  const tie = metric.tied[i] ? "; a tie with a neighbour" : "";
  const lines = [title, `${meanAndSem(metric, i)}  (${metric.name})`];
  lines.push(`rank ${count(metric.rank[i])} of ${count(metric.ranked)}, 1 is the highest${tie}`);
  if (group) lines.push(`KV group ${group[0]}: ` + (group[1] === group[2] ? "this head" : `heads ${group[1]} to ${group[2]}`));
  lines.push(`${plural(metric.count[i], "sample")}; ${profile.sites[row(i)]}`);
  return lines;
}

/** Parse numbers and ranges, as in 0-3,8, to a test; null: any number passes; undefined: it is not understood. */
function numbers(text) {
  const parts = text.split(",").map((part) => part.trim()).filter(Boolean).map((part) => part.match(/^(\d+)(?:-(\d+))?$/));
  if (parts.some((part) => !part)) return undefined;
  return parts.length ? (n) => parts.some(([, first, last]) => n >= +first && n <= +(last ?? first)) : null;
}

/** Spearman's correlation: Pearson's of the ranks, where equal values have their mean rank. */
function spearman(x, y) {
  const ranks = (values) => {
    const order = values.map((_, i) => i).sort((a, b) => values[a] - values[b]), out = new Float64Array(values.length);
    for (let i = 0, j; i < order.length; i = j) {
      for (j = i; j < order.length && values[order[j]] === values[order[i]]; ) j++;
      for (let k = i; k < j; k++) out[order[k]] = (i + j - 1) / 2 - (values.length - 1) / 2; // centred
    }
    return out;
  };
  const a = ranks(x), b = ranks(y);
  const product = (u, v) => u.reduce((sum, value, i) => sum + value * v[i], 0);
  return product(a, b) / Math.sqrt(product(a, a) * product(b, b));
}
