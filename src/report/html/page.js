"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const colours = 6;
const labels = {
  fvu: "FVU", fvu_no_sinks: "FVU without sink tokens", dead_fraction: "Share of dead latents",
  kl_per_token: "KL divergence, nats a token", loss: "Cross-entropy, nats a token",
  sae_mse: "SAE reconstruction MSE", grad_norm: "Gradient norm before clipping",
  tokens_per_s: "Tokens a second", lr: "Learning rate",
};
const stages = { sae: "Stage I", sft: "Stage II" };

function element(name, attributes = {}, ...children) {
  const svg = ["svg", "g", "path", "line", "text", "rect", "title"].includes(name);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", name)
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}
const colour = i => `var(--c${i % colours})`;
function number(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return String(+value.toPrecision(4));
}
function table(head, rows) {
  const cells = (row, kind) => row.map(c => element(kind, {}, c instanceof Node ? c : String(c)));
  return element("div", { class: "scroll" }, element("table", {},
    element("thead", {}, element("tr", {}, ...cells(head, "th"))),
    element("tbody", {}, ...rows.map(row => element("tr", {}, ...cells(row, "td"))))));
}
function key(i) {
  return element("span", { class: "key", style: `--key:${colour(i)}` }, data.runs[i].name);
}

function summary() {
  const rows = [];
  data.runs.forEach((run, i) => {
    for (const curve of run.curves) {
      if (!["fvu", "kl_per_token", "loss", "tokens_per_s"].includes(curve.metric)) continue;
      const n = curve.values.length, tenth = Math.min(10, n);
      const mean = part => part.reduce((a, b) => a + b, 0) / part.length;
      const sorted = [...curve.values].sort((a, b) => a - b);
      rows.push([key(i), stages[curve.stage], labels[curve.metric] + (curve.hookpoint ? `, ${curve.hookpoint}` : ""),
        n, number(mean(curve.values.slice(0, tenth))), number(mean(curve.values.slice(n - tenth))),
        number(sorted[n >> 1])]);
    }
  });
  document.getElementById("summary").append(
    table(["run", "stage", "measure", "steps", "first 10", "last 10", "median"], rows));
}

function evaluation() {
  const rows = data.runs.flatMap((run, i) => run.evaluations.map(e => [key(i), e.name, e.problems,
    e.completions, `${(100 * e.pass_at_1).toFixed(1)} %`,
    `${(100 * e.interval[0]).toFixed(1)} to ${(100 * e.interval[1]).toFixed(1)} %`]));
  if (!rows.length) return;
  const section = document.getElementById("evaluation");
  section.hidden = false;
  section.append(table(["run", "file", "problems", "completions", "Pass@1", "95 % interval"], rows));
}

function settings() {
  const section = document.getElementById("settings");
  const keys = [...new Set(data.runs.flatMap(run => Object.keys(run.settings)))].sort();
  const value = (run, k) => run.settings[k] ?? "–";
  const differ = keys.filter(k => data.runs.some(run => value(run, k) !== value(data.runs[0], k)));
  const of = list => table(["setting", ...data.runs.map((_, i) => key(i))],
    list.map(k => [element("code", {}, k), ...data.runs.map(run => value(run, k))]));
  if (data.runs.length > 1) {
    section.append(differ.length ? of(differ) : element("p", {}, "The runs have the same settings."));
  }
  section.append(element("details", data.runs.length > 1 ? {} : { open: "" },
    element("summary", {}, "All settings"), of(keys)));
}

/** Round numbers that cut [low, high] into about `n` parts. */
function ticks(low, high, n) {
  const raw = (high - low) / n, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(f => f * power).find(s => s >= raw) ?? raw;
  const marks = [];
  for (let t = Math.ceil(low / step) * step; t <= high + step * 1e-9; t += step) marks.push(+t.toPrecision(12));
  return marks;
}
function smoothed(values, keep) {
  let mean = values[0];
  return values.map(v => (mean = keep * mean + (1 - keep) * v));
}

const view = { axis: "steps", log: false, keep: 0 };
const charts = [];

/** One measure of one stage, a line a run and hookpoint. */
function chart(stage, metric, lines) {
  const [w, h, left, right, top, bottom] = [480, 260, 56, 10, 10, 24];
  const svg = element("svg", { viewBox: `0 0 ${w} ${h}`, role: "img" });
  const readout = element("div", { class: "readout" });
  const title = `${stages[stage]}: ${labels[metric] ?? metric}`;
  const figure = element("figure", { "data-metric": `${stage}.${metric}` },
    element("figcaption", {}, title), svg, readout);
  document.getElementById("charts").append(figure);
  let zoom = null, scale = null;

  function draw() {
    svg.replaceChildren(element("title", {}, title));
    const drawn = lines.map(line => ({ ...line, xs: line.curve[view.axis], ys: smoothed(line.curve.values, view.keep) }));
    const inside = x => !zoom || (x >= zoom[0] && x <= zoom[1]);
    const xs = drawn.flatMap(l => l.xs.filter(inside));
    const useful = y => Number.isFinite(y) && (!view.log || y > 0);
    const ys = drawn.flatMap(l => l.ys.filter((y, i) => inside(l.xs[i]) && useful(y)));
    if (!xs.length || !ys.length) { svg.append(element("text", { x: w / 2, y: h / 2 }, "nothing to draw")); return; }
    const extent = list => list.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
    let [x0, x1] = zoom ?? extent(xs);
    if (x0 === x1) { x0 -= 0.5; x1 += 0.5; }
    const f = view.log ? Math.log10 : v => v;
    let [y0, y1] = extent(ys).map(f);
    const pad = (y1 - y0 || Math.abs(y1) || 1) * 0.05;
    [y0, y1] = [y0 - pad, y1 + pad];
    const X = x => left + (x - x0) / (x1 - x0) * (w - left - right);
    const Y = y => h - bottom - (f(y) - y0) / (y1 - y0) * (h - top - bottom);
    scale = { x0, x1, X, Y, drawn, of: px => x0 + (px - left) / (w - left - right) * (x1 - x0) };
    for (const t of ticks(y0, y1, 4)) {
      const v = view.log ? 10 ** t : t, y = h - bottom - (t - y0) / (y1 - y0) * (h - top - bottom);
      svg.append(element("line", { class: "grid", x1: left, x2: w - right, y1: y, y2: y }),
        element("text", { x: left - 6, y: y + 4, "text-anchor": "end" }, number(v)));
    }
    for (const t of ticks(x0, x1, 5)) {
      svg.append(element("text", { x: X(t), y: h - 8, "text-anchor": "middle" }, number(t)));
    }
    for (const line of drawn) {
      let path = "";
      line.xs.forEach((x, i) => {
        if (inside(x) && useful(line.ys[i])) path += `${path ? "L" : "M"}${X(x).toFixed(2)} ${Y(line.ys[i]).toFixed(2)}`;
      });
      svg.append(element("path", { class: "curve", d: path, style: `stroke:${colour(line.colour)}`, "stroke-dasharray": line.dash }));
    }
  }

  const at = event => {
    const box = svg.getBoundingClientRect();
    return Math.min(w - right, Math.max(left, (event.clientX - box.left) / box.width * w));
  };
  let start = null, cursor = null, band = null;
  const clear = () => { cursor?.remove(); band?.remove(); cursor = band = null; };
  svg.addEventListener("pointerdown", event => { start = at(event); });
  svg.addEventListener("pointermove", event => {
    if (!scale) return;
    clear();
    const px = at(event), x = scale.of(px);
    cursor = element("line", { class: "cursor", x1: px, x2: px, y1: top, y2: h - bottom });
    svg.append(cursor);
    if (start !== null) {
      band = element("rect", { class: "band", x: Math.min(start, px), width: Math.abs(px - start), y: top, height: h - top - bottom });
      svg.append(band);
    }
    const parts = scale.drawn.map(line => {
      let near = 0;
      line.xs.forEach((v, i) => { if (Math.abs(v - x) < Math.abs(line.xs[near] - x)) near = i; });
      return `${line.name}: ${number(line.ys[near])} at ${line.xs[near]}`;
    });
    readout.textContent = parts.join(" · ");
  });
  svg.addEventListener("pointerup", event => {
    if (start !== null && scale && Math.abs(at(event) - start) > 8) {
      zoom = [scale.of(Math.min(start, at(event))), scale.of(Math.max(start, at(event)))];
      draw();
    }
    start = null;
  });
  svg.addEventListener("pointerleave", () => { clear(); start = null; readout.textContent = ""; });
  svg.addEventListener("dblclick", () => { zoom = null; draw(); });
  charts.push({ draw, reset() { zoom = null; draw(); } });
  draw();
}

function curves() {
  const groups = new Map();
  data.runs.forEach((run, i) => {
    run.curves.forEach(curve => {
      if (curve.metric === "kl") return;
      const id = `${curve.stage} ${curve.metric}`;
      if (!groups.has(id)) groups.set(id, []);
      const lines = groups.get(id), own = lines.filter(l => l.colour === i).length;
      const parts = [data.runs.length > 1 ? run.name : null, curve.hookpoint].filter(Boolean);
      lines.push({ curve, colour: i, dash: ["none", "6 3", "2 3", "8 3 2 3"][own % 4], name: parts.join(" ") || labels[curve.metric] });
    });
  });
  const order = Object.keys(labels), rank = id => order.indexOf(id.split(" ")[1]);
  const ids = [...groups.keys()].sort((a, b) => a.split(" ")[0].localeCompare(b.split(" ")[0]) || rank(a) - rank(b));
  ids.forEach(id => chart(...id.split(" "), groups.get(id)));
  const all = method => charts.forEach(c => c[method]());
  document.getElementById("axis").addEventListener("change", e => { view.axis = e.target.value; all("reset"); });
  document.getElementById("log").addEventListener("change", e => { view.log = e.target.checked; all("draw"); });
  document.getElementById("smooth").addEventListener("input", e => { view.keep = +e.target.value; all("draw"); });
}

/** Reasoning features a layer: a bar for each study, and its fitted mixture. */
function bars(studies) {
  const [w, h, left, bottom] = [760, 260, 40, 30];
  const svg = element("svg", { viewBox: `0 0 ${w} ${h}`, role: "img" });
  const points = studies.map(s => s.study.hookpoints.map(p => [p.layer, p.reasoning_features]));
  const last = Math.max(...points.flat().map(p => p[0])), most = Math.max(1, ...points.flat().map(p => p[1]));
  const X = x => left + (x + 0.5) / (last + 1) * (w - left - 10);
  const Y = y => h - bottom - y / (most * 1.1) * (h - bottom - 10);
  for (const t of ticks(0, most * 1.1, 4)) {
    svg.append(element("line", { class: "grid", x1: left, x2: w - 10, y1: Y(t), y2: Y(t) }),
      element("text", { x: left - 6, y: Y(t) + 4, "text-anchor": "end" }, number(t)));
  }
  for (let layer = 0; layer <= last; layer += Math.ceil((last + 1) / 16)) {
    svg.append(element("text", { x: X(layer), y: h - 10, "text-anchor": "middle" }, String(layer)));
  }
  const slot = 0.8 * (X(1) - X(0)) / studies.length;
  studies.forEach((s, i) => {
    for (const [layer, count] of points[i]) {
      const rect = element("rect", { x: X(layer) - 0.4 * (X(1) - X(0)) + slot * i, width: slot, y: Y(count),
        height: Y(0) - Y(count), style: `fill:${colour(s.colour)};opacity:${s.compared ? 0.45 : 0.8}` });
      rect.append(element("title", {}, `${s.name}, layer ${layer}: ${count}`));
      svg.append(rect);
    }
    const mixture = s.study.mixture;
    if (!mixture) return;
    const all = points[i].reduce((sum, p) => sum + p[1], 0);
    let path = "";
    for (let x = 0; x <= last; x += 0.05) {
      const density = mixture.components.reduce((sum, c) =>
        sum + c.weight / (c.sd * Math.sqrt(2 * Math.PI)) * Math.exp(-0.5 * ((x - c.mean) / c.sd) ** 2), 0);
      path += `${path ? "L" : "M"}${X(x).toFixed(1)} ${Y(density * all).toFixed(1)}`;
    }
    svg.append(element("path", { class: "curve", d: path, style: `stroke:${colour(s.colour)}` }));
  });
  return element("figure", {}, element("figcaption", {}, "Reasoning features by layer, with the fitted mixture"), svg);
}

function features() {
  const studies = [];
  data.runs.forEach((run, i) => run.features.forEach(study => {
    studies.push({ name: study.model, study, colour: i, compared: false });
    if (study.compare) studies.push({ name: study.compare.model, study: study.compare, colour: i, compared: true });
  }));
  if (!studies.length) return;
  const section = document.getElementById("features");
  section.hidden = false;
  section.append(bars(studies));
  for (const { name, study } of studies) {
    section.append(element("h3", {}, name), table(
      ["layer", "reasoning features", "FVU", "L0", "silent", "loss with SAE", "loss recovered"],
      study.hookpoints.map(p => [p.layer, p.reasoning_features, number(p.fvu), number(p.l0),
        `${(100 * p.silent_fraction).toFixed(1)} %`, number(p.loss_with_sae), `${(100 * p.loss_recovered).toFixed(1)} %`])));
    const found = study.hookpoints.flatMap(p => p.features.map(f => [p.layer, f]));
    if (!found.length) continue;
    const list = element("details", {}, element("summary", {}, "Where each feature fires"));
    for (const [layer, f] of found) {
      list.append(table([`layer ${layer}, latent ${f.latent}`, `${f.firings} firings`], f.contexts.map(c =>
        [element("span", {}, c.before, element("b", {}, c.token), c.after), number(c.activation)])));
    }
    section.append(list);
  }
}

document.getElementById("legend").append(...data.runs.map((_, i) => key(i)));
summary();
evaluation();
curves();
features();
settings();
document.body.dataset.ready = "true";
