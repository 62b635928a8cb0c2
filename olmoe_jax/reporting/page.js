"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const value = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const shade = (hex, alpha) =>
  `rgba(${[1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16))},${alpha})`;
const shown = number => number === null ? "–" : Number(number.toPrecision(4)).toLocaleString("en");
const range = count => Array.from({length: count}, (_, i) => i);
const NUMBER = /^([-–+−±<>≥≤~]?\s*[\d.,]*\d[^(:;"]*|[-–]|)$/;
const PALETTE = 7;  // colours --s0 …
const BANDS = 8;  // more curves than this are drawn without bands
const NARROW = 640;  // pixels of a screen that has no room for long legends
const FOUND = 25;  // rows that a search lists

/* Colours of the curves of one frame: the same name has the same everywhere, unless two would meet;
   many curves are layers or checkpoints, whose order a sweep of hues shows. */
function colours(names) {
  if (names.length > PALETTE)
    return names.map((_, i) =>
      `hsl(${260 - 230 * i / (names.length - 1)},70%,${dark.matches ? 68 : 42}%)`);
  let places = names.map(name => data.names.indexOf(name) % PALETTE);
  if (Math.min(...places) < 0 || new Set(places).size < names.length) places = range(names.length);
  return places.map(place => value("--s" + place));
}

function line(name, colour, x, y, low, high, options) {
  const same = {name, legendgroup: name, x};
  const drawn = {...same, y, mode: x.length > 12 ? "lines" : "lines+markers",
    line: {color: colour, width: 2}, marker: {color: colour, size: 6}, ...options};
  if (!low) return [drawn];
  const edge = {...same, mode: "lines", line: {width: 0}, showlegend: false, hoverinfo: "skip"};
  return [{...edge, y: low}, {...edge, y: high, fill: "tonexty",
    fillcolor: colour[0] === "#" ? shade(colour, 0.2) : colour.replace("%)", "%,0.2)")}, drawn];
}

const bars = (y, low, high, colour) => low ? {type: "data", symmetric: false, color: colour,
  array: high.map((v, i) => v === null ? 0 : v - y[i]),
  arrayminus: low.map((v, i) => v === null ? 0 : y[i] - v)} : undefined;

function chartTraces(series, colour) {
  if (!series.points)
    return line(series.name, colour, series.x, series.y, series.low, series.high, {mode: "lines"});
  const marker = {color: series.low || colour[0] !== "#" ? colour : shade(colour, 0.55),
    size: series.low ? 11 : 7, symbol: series.low ? "diamond" : "circle"};
  const error = bars(series.y, series.low, series.high, colour);
  return [{name: series.name, legendgroup: series.name, x: series.x, y: series.y, mode: "markers",
    marker, error_y: error && {...error, thickness: 2, width: 7}}];
}

/* In lines of about thirty characters: titles stand along charts that may be small. */
const wrapped = text => text.split(" ").reduce((lines, word) => {
  const last = lines[lines.length - 1];
  if (!last || (last + word).length > 30) lines.push(word);
  else lines[lines.length - 1] = `${last} ${word}`;
  return lines;
}, []).join("<br>");

function layout(xTitle, yTitle) {
  const text = value("--text"), grid = value("--line");
  const axis = title => ({title: {text: wrapped(title)}, gridcolor: grid, linecolor: grid, zeroline: false,
    automargin: true});
  return {paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hovermode: "closest",
    font: {color: text, family: "system-ui, sans-serif", size: 13},
    margin: {l: 60, r: 30, t: 10, b: 50},
    legend: {orientation: "h", y: 1.02, yanchor: "bottom", x: 0},
    hoverlabel: {bgcolor: value("--panel"), bordercolor: grid, font: {color: text}},
    modebar: {bgcolor: "rgba(0,0,0,0)", color: grid, activecolor: text, orientation: "v"},
    xaxis: axis(xTitle), yaxis: axis(yTitle)};
}

const touch = !matchMedia("(hover: hover)").matches;
function plot(place, traces, frame) {
  frame.dragmode = touch ? false : "zoom";  // a finger on a chart scrolls the page
  Plotly.react(place, traces, frame,
    {responsive: true, displaylogo: false, displayModeBar: touch ? false : "hover"});
}

function drawChart(chart, figure) {
  const frame = layout(chart.x_title, chart.y_title), text = value("--text");
  // left to itself plotly takes "0", "1", "all" for numbers, and drops the last
  const words = chart.series.some(series => series.x.some(x => typeof x === "string"));
  frame.xaxis.type = chart.log_x ? "log" : words ? "category" : undefined;
  Object.assign(frame.yaxis, {zeroline: chart.zero_line, zerolinecolor: text,
    rangemode: chart.zero_line ? "tozero" : "normal"});
  const found = colours(chart.series.map(series => series.name));
  plot(figure.querySelector(".plot"),
    chart.series.flatMap((series, i) => chartTraces(series, found[i])), frame);
}

/* The part of a cube at a selection, as [rows][columns] of each of its arrays; an axis that the
   cube lacks repeats its values. */
function part(number, selection, rows, columns, height, width) {
  const cube = data.cubes[number], step = {};
  let stride = cube.values.length, first = 0;
  for (const [name, labels] of cube.axes) {
    stride /= labels.length;
    step[name] = stride;
    if (name !== rows && name !== columns) first += stride * labels.indexOf(selection[name]);
  }
  const cut = array => array && range(height).map(i => range(width).map(
    j => array[first + i * (step[rows] || 0) + j * (step[columns] || 0)]));
  return {values: cut(cube.values), low: cut(cube.low), high: cut(cube.high)};
}

const labelsOf = (number, name) =>
  (data.cubes[number].axes.find(axis => axis[0] === name) || ["", [""]])[1];

function chosen(figure, start) {
  const selection = {...start};
  for (const control of figure.querySelectorAll("select, input"))
    selection[control.name] = control.value;
  return selection;
}

function orderOf(block, selection, values, count) {
  const name = selection.order;
  if (name === "largest first")
    return range(count).sort((a, b) => (values[0][b] ?? -1) - (values[0][a] ?? -1));
  if (name in block.orders)
    return part(block.orders[name], selection, "", "", 1, 1).values[0][0];
  return range(count);
}

function drawExplorer(block, figure) {
  const selection = chosen(figure, block.start);
  const rows = labelsOf(block.cube, block.series), columns = labelsOf(block.cube, block.x);
  const size = [block.series, block.x, rows.length, columns.length];
  const found = part(block.cube, selection, ...size);
  if (block.kind === "table")
    return fill(figure.querySelector(".wide"), block.columns, found.values[0][0]);
  const yTitle = block.y_title.replace(/{([^}]+)}/g, (_, name) => selection[name]);
  const frame = layout(block.x_title, yTitle);
  const level = block.level === null ? null : part(block.level, selection, ...size).values;
  const order = orderOf(block, selection, found.values, columns.length);
  const draw = {bars: drawBars, lines: drawLines, heat: drawHeat}[block.kind];
  const traces = draw(block, {selection, rows, columns, order, level, yTitle, ...found}, frame);
  if (found.values.every(row => row.every(v => v === null)))
    frame.annotations = [{text: "not in this source", showarrow: false, xref: "paper",
      yref: "paper", x: 0.5, y: 0.5}];
  plot(figure.querySelector(".plot"), traces, frame);
}

function drawBars(block, found, frame) {
  const pick = rows => rows && found.order.map(i => rows[0][i]);
  const x = pick([found.columns]), y = pick(found.values), colour = value("--s0");
  const low = pick(found.low), high = pick(found.high);
  const text = y.map((v, i) => shown(v) + (low && low[i] !== null ?
    ` (95 %: ${shown(low[i])} to ${shown(high[i])})` : ""));
  Object.assign(frame.xaxis, {type: "category", categoryorder: "array", categoryarray: x,
    tickangle: x.every(label => label.length < 4) ? 0 : "auto"});
  frame.yaxis.rangemode = "tozero";
  frame.bargap = x.length < 12 ? 0.5 : 0.15;
  const traces = [{type: "bar", name: block.title, x, y, marker: {color: colour}, text,
    textposition: "none", showlegend: false, hovertemplate: `${block.x} %{x}: %{text}<extra></extra>`,
    error_y: {...bars(y, low, high, value("--text")), thickness: 1, width: 2}}];
  if (found.level) traces.push({name: block.level_name, x, y: pick(found.level), mode: "lines",
    line: {color: value("--s1"), dash: "dash", width: 2},
    hovertemplate: `${block.level_name}: %{y:.4~g}<extra></extra>`});
  return traces;
}

function drawLines(block, found, frame) {
  const scale = block.scales[found.selection["horizontal axis"]];
  const numeric = found.columns.every(label => label !== "" && Number.isFinite(Number(label)));
  const x = scale || (numeric ? found.columns.map(Number) : found.columns);
  if (scale) frame.xaxis.title.text = found.selection["horizontal axis"];
  else if (numeric && x.length <= (innerWidth > NARROW ? 16 : 6)) Object.assign(frame.xaxis, {tickmode: "array", tickvals: x});
  const single = found.rows.length === 1, paint = colours(found.rows);
  const bands = found.low && found.rows.length <= BANDS;
  const traces = found.rows.flatMap((name, i) => line(single ? block.title : name, paint[i], x,
    found.values[i], bands && found.low[i], bands && found.high[i], {showlegend: !single,
      hovertemplate: `${single ? "" : name + ", "}%{x}: %{y:.4~g}<extra></extra>`}));
  if (found.level) {
    const own = found.level.some(row => row.some((v, j) => v !== found.level[0][j]));
    found.level.slice(0, own ? undefined : 1).forEach((y, i) => traces.push({
      name: own ? `${block.level_name}, ${found.rows[i]}` : block.level_name, x, y, mode: "lines",
      line: {color: own ? paint[i] : value("--text"), dash: "dot", width: 1.5}}));
  }
  if (found.rows.length > BANDS) {  // a legend of so many would take the place of the curves
    frame.showlegend = innerWidth > NARROW;
    frame.legend = {orientation: "v", font: {size: 11}};
  }
  return traces;
}

function drawHeat(block, found, frame) {
  const square = found.rows.length === found.columns.length;
  const down = square ? found.order : range(found.rows.length);
  const pick = rows => down.map(i => found.order.map(j => rows[i][j]));
  const z = pick(found.values), centre = block.middle !== null;
  const most = Math.max(1e-9, ...z.flat(), centre ? 2 * block.middle : 0);
  const text = !found.low ? undefined : pick(found.low).map((row, i) => row.map((low, j) =>
    low === null ? "" : ` (95 %: ${shown(low)} to ${shown(pick(found.high)[i][j])})`));
  const scale = centre ? [[0, value("--low")], [block.middle / most, value("--h0")], [1, value("--s0")]]
    : [[0, value("--h0")], [0.5, value("--h1")], [1, value("--h2")]];
  for (const axis of [frame.xaxis, frame.yaxis])
    Object.assign(axis, {type: "category", tickangle: 0, showgrid: false});
  frame.yaxis.autorange = "reversed";
  frame.yaxis.title.text = block.series;
  return [{type: "heatmap", z, x: found.order.map(i => found.columns[i]),
    y: down.map(i => found.rows[i]), text, colorscale: scale, hoverongaps: false,
    zmin: 0, zmax: most,
    colorbar: {title: {text: wrapped(found.yTitle), side: "right"}, thickness: 12, outlinewidth: 0},
    hovertemplate: `${block.series} %{y}, ${block.x} %{x}: %{z:.4~g}` +
      `${text ? "%{text}" : ""}<extra></extra>`}];
}

function add(parent, tag, text, options) {
  const element = Object.assign(document.createElement(tag), {textContent: text, ...options});
  return parent.appendChild(element);
}

/* A table of text, in `place`; `paint` gets each cell and its place. */
function fill(place, columns, rows, paint) {
  place.replaceChildren();
  if (!rows || !rows.length) return add(place, "p", "nothing here", {className: "note"});
  const left = columns.map((_, i) => !rows.every(row => NUMBER.test(row[i])));
  const table = add(place, "table", ""), kind = i => ({className: left[i] ? "text" : ""});
  const head = add(add(table, "thead", ""), "tr", ""), body = add(table, "tbody", "");
  columns.forEach((name, i) => add(head, "th", name, {scope: "col", ...kind(i)}));
  rows.forEach((row, i) => {
    const line = add(body, "tr", "");
    row.forEach((cell, j) => {
      const made = add(line, j ? "td" : "th", cell, kind(j));
      if (!j) made.scope = "row";
      if (paint) paint(made, i, j);
    });
  });
}

const tint = expert =>
  `hsl(${(expert * 137.508) % 360},${dark.matches ? "50%,27%" : "80%,84%"})`;

function drawPassage(block, figure) {
  const select = figure.querySelector("select"), layer = select ? select.selectedIndex : 0;
  const place = figure.querySelector(".pieces"), detail = figure.querySelector(".detail");
  place.replaceChildren();
  const about = i => block.experts[layer][i].map((expert, j) => expert < 0 ? null :
    `expert ${expert} ${shown(100 * block.weights[layer][i][j])} %`).filter(Boolean).join(", ");
  block.pieces.forEach((piece, i) => {
    const first = block.experts[layer][i][0];
    const words = `${JSON.stringify(piece)}: ${about(i)}${block.hints[i] && "; " + block.hints[i]}`;
    const span = add(place, "span", piece.replaceAll("\n", "⏎\n") || "·", {title: words,
      tabIndex: i ? -1 : 0});
    span.style.background = first < 0 ? "none" : tint(first);
    const tell = () => {
      place.querySelectorAll(".chosen").forEach(other => other.classList.remove("chosen"));
      span.classList.add("chosen");
      detail.textContent = words;
    };
    for (const event of ["mouseenter", "focus", "click"]) span.addEventListener(event, tell);
  });
  place.onkeydown = event => {
    const move = {ArrowRight: "nextSibling", ArrowLeft: "previousSibling"}[event.key];
    const next = move && event.target[move];
    if (next) { next.focus(); event.preventDefault(); }
  };
  const counts = new Map();
  for (const [first] of block.experts[layer])
    if (first >= 0) counts.set(first, (counts.get(first) || 0) + 1);
  detail.replaceChildren("First experts: ");
  [...counts].sort((a, b) => b[1] - a[1]).slice(0, FOUND).forEach(([expert, count]) => {
    add(detail, "span", ` ${expert} (${count} times) `, {className: "chip"}).style.background =
      tint(expert);
    detail.append(" ");
  });
}

const bytes = new Map();
function unpacked(text) {
  if (!bytes.has(text)) bytes.set(text, Uint8Array.from(atob(text), c => c.charCodeAt(0)));
  return bytes.get(text);
}

/* Positions of names: the same text first, then those that begin with it, then those that hold it. */
function matches(names, text) {
  const wanted = text.trim().toLowerCase(), groups = [[], [], []];
  names.forEach((name, i) => {
    const at = name.toLowerCase(), bare = at.trim();
    if (!wanted || bare === wanted) groups[0].push(i);
    else if (bare.startsWith(wanted)) groups[1].push(i);
    else if (at.includes(wanted)) groups[2].push(i);
  });
  return groups.flat();
}

function drawSearch(block, figure) {
  const start = Object.fromEntries(block.axes.map(([name, labels]) => [name, labels[0]]));
  const selection = chosen(figure, start);
  let slab = 0, place = 0;
  block.axes.forEach(([name, labels], i) => {
    const at = labels.indexOf(selection[name]), size = block.count_shape[i];
    slab = slab * labels.length + at;
    place = place * size + Math.min(at, size - 1);
  });
  const counts = block.counts[place], wide = block.bytes, count = block.shown;
  const experts = unpacked(block.experts[slab]), shares = unpacked(block.shares[slab]);
  const found = matches(block.names, selection.text).filter(i => counts[i] > 0);
  const id = at => experts[at * wide] + (wide > 1 ? 256 * experts[at * wide + 1] : 0);
  const none = wide > 1 ? 65535 : 255;
  const most = found.slice(0, FOUND), places = j => range(count).map(k => j * count + k);
  const rows = most.map(i => [JSON.stringify(block.names[i]), shown(counts[i]),
    ...places(i).map(at => id(at) === none ? "" :
      `expert ${id(at)}: ${shown(100 * shares[at] / block.share)} %`)]);
  figure.querySelector(".detail").textContent = `${found.length.toLocaleString("en")} of ` +
    `${block.names.length.toLocaleString("en")} tokens` +
    (found.length > FOUND ? `, ${FOUND} of them below` : "");
  const colour = value("--accent");
  const titles = range(count).map(k => k ? "then" : "most often to");
  fill(figure.querySelector(".wide"), ["token", "occurrences", ...titles], rows, (cell, i, j) => {
    if (j > 1) cell.style.background =
      shade(colour, 0.55 * shares[places(most[i])[j - 2]] / block.share);
  });
}

const kinds = [["chart", data.charts, drawChart], ["explorer", data.explorers, drawExplorer],
  ["passage", data.passages, drawPassage], ["search", data.searches, drawSearch]];
function drawAll() {
  for (const [kind, blocks, draw] of kinds)
    blocks.forEach((block, i) => draw(block, document.getElementById(`${kind}-${i}`)));
}
for (const [kind, blocks, draw] of kinds)
  blocks.forEach((block, i) => {
    const figure = document.getElementById(`${kind}-${i}`);
    for (const control of figure.querySelectorAll("select, input"))
      control.addEventListener("input", () => draw(block, figure));
  });
drawAll();
dark.addEventListener("change", drawAll);
