// The status page: asks for status.json every two seconds while somebody can see it, and shows what it says.
// All text becomes text nodes: names of models, nodes and GPUs come from elsewhere and are never read as HTML.
"use strict";

const PERIOD_MS = 2000;
const TIMEOUT_MS = 8000;
const CHART_S = 600;
const MOST_DECISIONS = 12;
const SILENT_S = 10; // a replica that says nothing for so long is not counted as serving
const SVG = "http://www.w3.org/2000/svg";

let key = null; // in this page's memory only
let timer = null;
let asking = null;
let isPaused = false;

const byId = (id) => document.getElementById(id);

// -- elements ----------------------------------------------------------------------------------------------------

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

const el = (tag, attributes = {}, ...children) => filled(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) => filled(document.createElementNS(SVG, tag), attributes, children);

// Changes only what differs, so that focus, selection and a reader's place stay where they are.
function patch(old, wanted) {
  if (old.isEqualNode(wanted)) return;
  const isSame = old.nodeType === 1 && wanted.nodeType === 1 && old.tagName === wanted.tagName;
  if (!isSame || old.id !== wanted.id) {
    old.replaceWith(wanted);
    return;
  }
  for (const { name } of [...old.attributes]) {
    if (!wanted.hasAttribute(name) && name !== "open") old.removeAttribute(name);
  }
  for (const { name, value } of wanted.attributes) {
    if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  patchChildren(old, [...wanted.childNodes]);
}

function patchChildren(parent, wanted) {
  [...parent.childNodes].slice(wanted.length).forEach((node) => node.remove());
  const present = [...parent.childNodes];
  wanted.forEach((node, index) => (index < present.length ? patch(present[index], node) : parent.append(node)));
}

const show = (id, ...children) => patchChildren(byId(id), children.flat().map((each) =>
  typeof each === "string" ? document.createTextNode(each) : each));

function say(id, text) {
  if (byId(id).textContent !== text) byId(id).textContent = text;
}

// -- values ------------------------------------------------------------------------------------------------------

const NONE = "\u2013";
const isKnown = (value) => value !== null && value !== undefined;
const known = (value, text) => (isKnown(value) ? text(value) : NONE);
const number = (value) => known(value, (n) => Math.round(n).toLocaleString("en"));
const percent = (share) => known(share, (s) => `${(100 * s).toFixed(1)} %`);
const rate = (value) => known(value, (n) => `${Number((n / 1e9).toPrecision(3))} GB/s`);

function bytes(value) {
  return known(value, (n) => {
    const [size, unit] = n < 2 ** 30 ? [2 ** 20, "MiB"] : [2 ** 30, "GiB"];
    return `${Number((n / size).toPrecision(3))} ${unit}`;
  });
}

function seconds(value) {
  return known(value, (s) => (s < 1 ? `${Number((1000 * s).toPrecision(3))} ms` : `${Number(s.toPrecision(3))} s`));
}

function clockTime(unixS) {
  const at = new Date(1000 * unixS);
  return el("time", { datetime: at.toISOString() }, at.toLocaleTimeString("en-GB"));
}

const sum = (values) => values.reduce((total, value) => total + value, 0);

// -- parts -------------------------------------------------------------------------------------------------------

function bar(share) {
  const width = Math.max(0, Math.min(1, share || 0)) * 100;
  return svg("svg", { class: "bar", viewBox: "0 0 100 8", preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("rect", { class: "all", width: "100", height: "8" }),
    svg("rect", { class: "used", width: String(width), height: "8" }));
}

const used = (part, whole) => [`${bytes(part)} of ${bytes(whole)}`, isKnown(part) && whole ? bar(part / whole) : null];

// Small screens show rows as blocks: roles keep what they are, and labels say which column a cell is of.
function table(caption, columns, rows) {
  if (!rows.length) return el("p", { class: "quiet" }, "None.");
  const head = columns.map((name) => el("th", { scope: "col", role: "columnheader" }, name));
  const body = rows.map((cells) => el("tr", { role: "row" }, ...cells.map((cell, index) => {
    const { content, kind } = cell && cell.kind ? cell : { content: cell, kind: "" };
    const attributes = { "data-label": columns[index], ...(kind ? { class: kind } : {}) };
    const inside = el("span", {}, ...[content].flat());
    return index === 0
      ? el("th", { scope: "row", role: "rowheader", ...attributes }, inside)
      : el("td", { role: "cell", ...attributes }, inside);
  })));
  return el("table", { role: "table", "aria-label": caption },
    el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, ...head)),
    el("tbody", { role: "rowgroup" }, ...body));
}

function facts(pairs) {
  return el("dl", { class: "facts" }, ...pairs.flatMap(([name, ...value]) => [el("dt", {}, name), el("dd", {}, ...value)]));
}

const sentence = (text) => `${text[0].toUpperCase()}${text.slice(1)}.`;

function problem(text) {
  return el("p", { class: "bad" }, text);
}

// -- k over time -------------------------------------------------------------------------------------------------

function chart(replica, nowS) {
  const { k_history: history, num_units: units, k_min: least, k_max: most } = replica;
  const startS = Math.max(nowS - CHART_S, history.length ? history[0][0] : nowS - 1);
  const spanS = Math.max(1, nowS - startS);
  const inView = history.filter(([atS]) => atS > startS);
  const before = history.filter(([atS]) => atS <= startS).pop();
  const points = [...(before ? [[startS, before[1]]] : []), ...inView];
  if (!points.length) points.push([startS, replica.k]);
  const x = (atS) => (600 * (atS - startS)) / spanS;
  const y = (k) => 100 - (100 * k) / Math.max(1, units);
  const steps = points.map(([atS, k], index) =>
    (index ? `H${x(atS).toFixed(1)}V` : `M${x(atS).toFixed(1)},`) + y(k).toFixed(1)).join("") + "H600";
  const ks = points.map(([, k]) => k);
  const changes = Math.max(0, points.length - 1);
  const range = isKnown(most) ? ` The coordinator allows ${least} to ${most}.` : "";
  const text = `k over the last ${ago(spanS)}: now ${ks[ks.length - 1]} of ${units}, from ${Math.min(...ks)} to ` +
    `${Math.max(...ks)}, changed ${changes} ${changes === 1 ? "time" : "times"}.${range}`;
  const top = isKnown(most) ? y(Math.min(units, most)) : 0;
  return el("div", { class: "chart" },
    el("div", { class: "scale", "aria-hidden": "true" }, el("span", {}, String(units)), el("span", {}, "0")),
    svg("svg", { viewBox: "0 -3 600 106", preserveAspectRatio: "none", role: "img", "aria-label": text },
      isKnown(most) ? svg("rect", { class: "band", width: "600", y: top.toFixed(1), height: (y(least) - top).toFixed(1) }) : null,
      svg("path", { class: "line", d: steps })),
    el("div", { class: "times", "aria-hidden": "true" }, el("span", {}, `${ago(spanS)} ago`), el("span", {}, "now")));
}

const ago = (spanS) => (spanS < 90 ? `${Math.round(spanS)} s` : `${Math.round(spanS / 60)} min`);

// -- sections ----------------------------------------------------------------------------------------------------

function against(measuredS, objectiveS) {
  if (!isKnown(objectiveS)) return [`${seconds(measuredS)}, no objective`];
  if (!isKnown(measuredS)) return [`none measured, objective ${seconds(objectiveS)}`];
  const isKept = measuredS <= objectiveS;
  return [`${seconds(measuredS)} of ${seconds(objectiveS)}: `, el("span", { class: isKept ? "good" : "bad" }, isKept ? "kept" : "missed")];
}

function card(replica, nowS) {
  const title = `replica-${replica.id}`;
  const head = el("h3", { id: title }, `Replica ${replica.id}`);
  const its = replica.facts;
  const silent = replica.problem ? problem(`${sentence(replica.problem)}${its ? ` What is shown is ${seconds(replica.age_s)} old.` : ""}`) : null;
  if (!its) return el("article", { "aria-labelledby": title }, head, silent);
  const attained = its.attainment;
  const phases = Object.entries(its.startup_s).map(([phase, s]) => `${phase} ${seconds(s)}`).join(", ");
  const range = isKnown(its.k_max) ? `${its.k_min} to ${its.k_max} units, ${rate(its.share_bytes_per_s)}` : "no coordinator's word";
  return el("article", { "aria-labelledby": title }, head, silent,
    el("p", { class: its.state === "running" ? "quiet" : "bad" }, `${its.model}: ${its.state}, ${its.device} device`),
    ...its.problems.map(problem),
    el("h4", {}, `k, ${its.unit}s that are offloaded`),
    chart(its, nowS),
    facts([
      ["k now", `${its.k} of ${its.num_units} through ${its.num_slots} slots` + (its.k === its.k_wanted ? "" : `, on the way to ${its.k_wanted}`)],
      ["Limited by", its.limited_by.replaceAll("_", " ")],
      ["Allowed", isKnown(its.k_max) ? `${range} (the band)` : range],
      ["Link gives", rate(its.link_bytes_per_s)],
    ]),
    el("h4", {}, `Objectives, for ${known(attained.percentile, String)} % of requests`),
    facts([
      ["TTFT", ...against(attained.ttft_s, its.ttft_objective_s)],
      ["TPOT", ...against(attained.tpot_s, its.tpot_objective_s)],
      ["Both met", isKnown(attained.attained) ? `${percent(attained.attained)} of the latest; ${number(attained.num_requests)} requests have ended` : "no request has ended yet"],
    ]),
    el("h4", {}, "Room"),
    facts([
      ["Headroom", `${number(its.headroom_tokens)} tokens`],
      ["Requests", `${its.num_running} run, ${its.num_waiting + its.num_at_door} wait`],
      ["KV cache", `${number(its.kv_used_tokens)} of ${number(its.kv_capacity_tokens)} tokens`, bar(its.kv_used_tokens / Math.max(1, its.kv_capacity_tokens))],
      ["Device", ...used(its.device_bytes, its.device_capacity_bytes)],
      ["Offloaded", `${bytes(its.offloaded_bytes)} of ${bytes(its.host_bytes)}`, bar(its.offloaded_bytes / Math.max(1, its.host_bytes))],
      ["Start took", phases || NONE],
    ]));
}

function overview(status) {
  const there = status.replicas.map((replica) => replica.facts).filter(Boolean);
  const serving = status.replicas.filter((each) => each.facts && each.facts.state === "running" && each.age_s < SILENT_S).length;
  const waiting = sum(there.map((its) => its.num_waiting + its.num_at_door)) + sum(status.ingresses.map((each) => each.num_waiting));
  const counted = [...there, ...status.ingresses].map((each) => each.attainment).filter((each) => isKnown(each.attained));
  const weights = counted.map((each) => Math.min(1024, each.num_requests));
  const met = sum(weights) ? sum(counted.map((each, index) => each.attained * weights[index])) / sum(weights) : null;
  const tiles = [
    ["Replicas that serve", `${serving} of ${status.replicas.length}`],
    ["Requests that run", number(sum(there.map((its) => its.num_running)))],
    ["Requests that wait", number(waiting)],
    ["Objectives met", percent(met)],
    ["Headroom, tokens", number(sum(there.map((its) => its.headroom_tokens)))],
    ["Units offloaded", `${sum(there.map((its) => its.k))} of ${sum(there.map((its) => its.num_units))}`],
  ];
  show("overview", tiles.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
  show("problems", status.problems.map((text) => el("li", { class: "bad" }, text)));
  say("state", `${serving} of ${status.replicas.length} ${status.replicas.length === 1 ? "replica serves" : "replicas serve"}`);
}

function nodes(status) {
  const there = status.nodes.filter((node) => node.facts);
  show("nodes", table("Nodes", ["Node", "Host memory available", "Tasks waited for memory", "Reserved by replicas", "Sample's age"],
    status.nodes.map((node) => node.facts ? [
      node.name,
      `${bytes(node.facts.host_available_bytes)} of ${bytes(node.facts.host_limit_bytes)}`,
      known(node.facts.pressure_percent, (share) => `${share} % of 10 s`),
      `${bytes(node.facts.ledger_reserved_bytes)}${isKnown(node.facts.ledger_capacity_bytes) ? ` of ${bytes(node.facts.ledger_capacity_bytes)}` : ""}`,
      seconds(node.facts.age_s),
    ] : [node.name, el("span", { class: "bad" }, node.problem), NONE, NONE, NONE])));
  show("buses", table("Host buses", ["Bus", "Node", "Carries", "Committed to replicas", "Replicas"],
    there.flatMap((node) => node.facts.buses.map((bus) => [
      bus.name, node.name, `${rate(bus.bytes_per_s)}, ${bus.rate_from.replaceAll("_", " ")}`,
      [rate(bus.committed_bytes_per_s), isKnown(bus.committed_bytes_per_s) && bus.bytes_per_s ? bar(bus.committed_bytes_per_s / bus.bytes_per_s) : null],
      number(bus.num_replicas),
    ]))));
  show("gpus", table("GPUs", ["GPU", "Node", "Memory", "Compute", "PCIe link", "From host", "Temperature", "Power"],
    there.flatMap((node) => node.facts.gpus.map((gpu) => [
      [`${gpu.index}: ${gpu.name || "name not known"}`, gpu.trouble ? problem(gpu.trouble) : null], node.name,
      used(gpu.memory_used_bytes, gpu.memory_total_bytes), known(gpu.compute_percent, (n) => `${n} %`),
      known(gpu.pcie_generation, (n) => `generation ${n}, ${known(gpu.pcie_width, String)} lanes`),
      rate(gpu.pcie_rx_bytes_per_s), known(gpu.temperature_c, (n) => `${n} \u00b0C`), known(gpu.power_w, (n) => `${n.toFixed(0)} W`),
    ]))));
}

function front(status) {
  show("ingresses", table("Ingresses", ["Ingress", "Requests that wait", "Refused", "Left while waiting"],
    status.ingresses.map((each) => [
      each.id + (each.id === status.ingress_id && status.ingresses.length > 1 ? " (this answer)" : ""),
      number(each.num_waiting), number(each.attainment.outcomes.refused || 0), number(each.attainment.outcomes.cancelled || 0),
    ])));
  const its = status.coordinator;
  say("coordinator", its.problem ? `Coordinator: ${its.problem}.`
    : `Coordinator: ${its.num_nodes} nodes report, ${its.num_replicas} replicas share buses, oldest report ${seconds(its.oldest_report_s)} old, ` +
      `${its.num_refused} reports made no sense${its.is_settling ? "; it has just started, and raises no share yet" : ""}.`);
}

function render(status) {
  overview(status);
  show("replicas", status.replicas.length ? status.replicas.map((replica) => card(replica, status.unix_s)) : problem("No replica runs."));
  show("decisions", table("Recent decisions", ["Time", "Decision and reason", "Id"], status.decisions.slice(0, MOST_DECISIONS).map((each) => [
    { content: clockTime(each.unix_s), kind: "time" },
    [`${each.summary}`],
    { content: el("code", {}, each.id), kind: "id" },
  ])));
  nodes(status);
  front(status);
  show("fresh", "As of ", clockTime(status.unix_s));
  byId("data").hidden = false;
  byId("key-form").hidden = true;
}

// -- asking ------------------------------------------------------------------------------------------------------

function askForKey() {
  const isWrong = key !== null;
  key = null;
  byId("data").hidden = true;
  say("key-problem", isWrong ? "This key was not accepted." : "");
  say("state", "An API key is needed");
  if (byId("key-form").hidden || isWrong) {
    byId("key-form").hidden = false;
    byId("key").focus();
  }
}

async function ask() {
  asking = new AbortController();
  const { signal } = asking;
  const late = setTimeout(() => asking && asking.abort(), TIMEOUT_MS);
  try {
    const headers = key === null ? {} : { Authorization: `Bearer ${key}` };
    const answer = await fetch("status.json", { headers, signal, cache: "no-store", credentials: "omit" });
    if (answer.status === 401) return askForKey();
    if (!answer.ok) throw new Error(`HTTP ${answer.status}`);
    render(await answer.json());
  } catch (error) {
    if (isPaused || document.hidden) return;
    console.warn(error);
    say("state", `No status now (${error.name === "AbortError" ? "no answer" : error.message}); trying again`);
  } finally {
    clearTimeout(late);
    asking = null;
    again();
  }
}

function again() {
  clearTimeout(timer);
  const isKeyMissing = !byId("key-form").hidden && key === null;
  if (!isPaused && !document.hidden && !isKeyMissing) timer = setTimeout(ask, PERIOD_MS);
}

function stopOrGoOn() {
  clearTimeout(timer);
  if (isPaused || document.hidden) {
    if (asking) asking.abort();
  } else if (!asking) {
    ask();
  }
}

byId("pause").addEventListener("click", () => {
  isPaused = !isPaused;
  byId("pause").setAttribute("aria-pressed", String(isPaused));
  stopOrGoOn();
});
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = byId("key").value.trim();
  byId("key").value = "";
  if (/^[\x21-\x7e]+$/.test(key)) ask();
  else askForKey(); // it could not be sent
});
document.addEventListener("visibilitychange", stopOrGoOn);
ask();
