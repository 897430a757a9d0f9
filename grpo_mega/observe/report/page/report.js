"use strict";
// Texts of models and users reach the document through text nodes only (`el`), never as HTML.
const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs;
const COLORS = ["#00897b", "#d9480f", "#5c6bc0", "#c2185b", "#7b8a00", "#0288d1", "#8d6e63", "#6a1b9a", "#455a64", "#ef6c00"];
const main = document.getElementById("main"), nav = document.getElementById("nav");

function el(name, attributes, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key === "on") for (const [event, f] of Object.entries(value)) node.addEventListener(event, f);
    else if (value !== null && value !== undefined) node.setAttribute(key, value);
  }
  for (const child of children.flat()) if (child !== null && child !== undefined) node.append(child instanceof Node ? child : String(child));
  return node;
}
function section(id, title, ...children) {
  nav.append(el("a", { href: "#" + id }, title));
  const node = el("section", { id }, el("h2", {}, title), ...children);
  main.append(node);
  return node;
}
function table(head, rows, kind) {
  return el("table", { class: kind || "" }, el("thead", {}, el("tr", {}, head.map(h => el("th", {}, h)))), el("tbody", {}, rows.map(r => el("tr", {}, r.map(c => el("td", {}, c === null || c === undefined ? "" : c))))));
}
const number = v => v === null || v === undefined ? "–" : Math.abs(v) >= 1e5 || (v !== 0 && Math.abs(v) < 1e-3) ? Number(v).toExponential(2) : String(Number(Number(v).toPrecision(5)));
const nameOf = i => RUNS[i].path.split("/").filter(Boolean).pop() || RUNS[i].path;
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// Verdict, differences, problems
const top_ = section("verdict", "Verdict");
RUNS.forEach((run, i) => {
  top_.append(el("p", { class: "verdict" }, RUNS.length > 1 ? nameOf(i) + ": " : "", run.verdict.join(" ")));
  (Array.isArray(run.summary.tuning) ? run.summary.tuning : []).forEach(t => top_.append(el("p", {}, el("strong", {}, "Tuning: "), t + ".")));
  run.problems.forEach(p => top_.append(el("p", { class: "problem" }, p)));
  const rows = [["before training", run.summary.eval_before], ["after training", run.summary.eval_after]].filter(r => r[1]);
  if (rows.length) top_.append(table(["held-out", "accuracy", "greedy accuracy", "mean reward", "mean length", "prompts"], rows.map(([n, e]) => [n, number(e.accuracy), number(e.greedy_accuracy), number(e.reward_mean), number(e.length_mean), e.num_prompts]), "numbers"));
});
if (RUNS.length > 1) section("differences", "Config differences", DATA.differences.length ? table(["key", nameOf(0), nameOf(1)], DATA.differences) : el("p", {}, "The configs are equal."));

// Curves
const curves = section("curves", "Curves", el("p", { class: "soft" }, "Drag to zoom, double-click to reset. The cursor of all charts is at the same step."));
const sync = uPlot.sync("steps");
const STEPS = [0, 1, 2, 3, 4, 5, 6, 7, 8].flatMap(power => [1, 2, 5].map(n => n * 10 ** power)); // distances of marks on the step axis
function chartOf(chart) {
  const shown = [];
  RUNS.forEach((run, i) => chart.names.forEach(n => { if (run.curves[n.name]) shown.push([n, i]); }));
  const steps = [...new Set(RUNS.flatMap(run => run.steps))].sort((a, b) => a - b);
  const columns = shown.map(([n, i]) => { const at = new Map(RUNS[i].steps.map((s, k) => [s, RUNS[i].curves[n.name][k]])); return steps.map(s => at.has(s) ? at.get(s) : null); });
  const box = el("div", { class: "chart", title: chart.names.map(n => n.name + ": " + n.meaning).join("\n") }, el("h4", {}, chart.title, el("span", { class: "soft" }, " " + chart.unit)));
  const axis = { stroke: css("--soft"), grid: { stroke: css("--line"), width: 1 }, ticks: { stroke: css("--line") }, size: 55, values: (u, v) => v.map(number) };
  const options = { width: 330, height: 190, cursor: { sync: { key: sync.key } }, scales: { x: { time: false }, y: { range: (u, low, high) => low === null || low === undefined ? [0, 1] : low === high ? [low - Math.max(0.1, Math.abs(low) / 10), high + Math.max(0.1, Math.abs(high) / 10)] : uPlot.rangeNum(low, high, 0.1, true) } }, axes: [{ ...axis, size: 32, incrs: STEPS }, axis], legend: { live: true },
    series: [{ label: "step" }, ...shown.map(([n, i], k) => ({ label: RUNS.length > 1 ? nameOf(i) + " " + n.name : n.name, stroke: RUNS.length > 1 && chart.names.length === 1 ? css(i ? "--b" : "--a") : COLORS[k % COLORS.length], dash: i ? [6, 4] : [], width: 1.5, spanGaps: true, points: { show: steps.length < 2 || columns[k].filter(v => v !== null).length < 15 }, value: (u, v) => number(v) }))] };
  box.plot = () => { options.width = Math.max(280, box.clientWidth - 16); new uPlot(options, [steps, ...columns], box); box.plot = null; };
  return box;
}
const charts = new Map();
RUNS.forEach(run => run.charts.forEach(c => { const key = c.section + "\0" + c.title; const known = charts.get(key); if (!known) charts.set(key, { ...c, names: [...c.names] }); else c.names.forEach(n => { if (!known.names.some(k => k.name === n.name)) known.names.push(n); }); }));
const sections = new Map();
charts.forEach(c => { if (!sections.has(c.section)) sections.set(c.section, []); sections.get(c.section).push(c); });
let first = true;
sections.forEach((list, name) => {
  const grid = el("div", { class: "grid" });
  const box = el("details", first ? { open: "" } : {}, el("summary", {}, name + " (" + list.length + ")"), grid);
  first = false;
  const fill = () => { if (!box.open || grid.childElementCount) return; list.map(chartOf).forEach(c => { grid.append(c); c.plot(); }); };
  box.addEventListener("toggle", fill);
  curves.append(box);
  fill();
});

// Phase timeline per rank
const PHASES = [...new Set(RUNS.flatMap(r => r.timeline.flatMap(t => Object.values(t.ranks).flatMap(s => s.map(x => x[0])))))];
const phaseColor = p => COLORS[PHASES.indexOf(p) % COLORS.length];
function timeline(run) {
  const box = el("div", {}), info = el("p", { class: "soft" }, "Point at a bar to read it."), holder = el("div", { class: "timeline" });
  const pick = el("input", { type: "range", min: 0, max: run.timeline.length - 1, value: run.timeline.length - 1, "aria-label": "step" });
  const label = el("strong", {});
  function draw() {
    const line = run.timeline[Number(pick.value)], ranks = Object.keys(line.ranks);
    label.textContent = "step " + line.step;
    const end = Math.max(0.001, ...Object.values(line.ranks).flat().map(s => s[1] + s[2]));
    const row = 18, width = Math.max(500, box.clientWidth || 900), left = 110, canvas = el("canvas", { class: "phases", width, height: row * ranks.length + 22 });
    const g = canvas.getContext("2d"), x = t => left + (width - left - 8) * t / end, bars = [];
    g.font = "11px system-ui"; g.fillStyle = css("--ink");
    ranks.forEach((rank, i) => {
      g.fillStyle = css("--ink"); g.fillText("rank " + rank + "  " + String(line.hosts[rank] || "").slice(0, 10), 2, i * row + 13);
      line.ranks[rank].forEach(([phase, start, seconds]) => { g.fillStyle = phaseColor(phase); g.fillRect(x(start), i * row + 2, Math.max(1, x(start + seconds) - x(start)), row - 4); bars.push([x(start), x(start + seconds), i, rank, phase, seconds]); });
    });
    g.fillStyle = css("--soft");
    for (let k = 0; k <= 5; k++) g.fillText(Number((end * k / 5).toPrecision(3)) + " s", Math.min(x(end * k / 5), width - 50), row * ranks.length + 16);
    canvas.addEventListener("mousemove", e => { const hit = bars.find(b => e.offsetX >= b[0] - 1 && e.offsetX <= b[1] + 1 && Math.floor(e.offsetY / row) === b[2]); if (hit) info.textContent = "rank " + hit[3] + ": " + hit[4] + " " + number(hit[5]) + " s"; });
    holder.replaceChildren(canvas);
  }
  pick.addEventListener("input", draw);
  box.append(el("div", { class: "filters" }, pick, label), el("p", {}, PHASES.map(p => el("span", { class: "key" }, el("i", { style: "background:" + phaseColor(p) }), p))), holder, info);
  requestAnimationFrame(draw);
  return box;
}
section("timeline", "Phases by rank", RUNS.map((run, i) => [RUNS.length > 1 ? el("h3", {}, nameOf(i)) : null, run.timeline.length ? timeline(run) : el("p", { class: "soft" }, "The run folder has no timeline.jsonl.")]).flat());

// Rollouts
function colored(answer, mode) {
  if (!answer.pieces || mode === "plain") return el("pre", {}, answer.text);
  const shade = (i) => {
    if (mode === "advantage") { const a = Math.max(-1, Math.min(1, answer.advantage / 2)); return (a >= 0 ? "rgba(26,160,80," : "rgba(220,50,40,") + (0.45 * Math.abs(a)).toFixed(3) + ")"; }
    const m = answer.mismatch ? Math.abs(answer.mismatch[i] || 0) : 0;
    return "rgba(230,120,0," + Math.max(0, Math.min(0.7, (Math.log10(m + 1e-9) + 4) / 5)).toFixed(3) + ")";
  };
  const rest = answer.tokens - answer.pieces.length;
  return el("pre", {}, answer.pieces.map((t, i) => el("span", { style: "background:" + shade(i), title: answer.mismatch ? "mismatch " + number(answer.mismatch[i]) + " nats" : "" }, t)), rest > 0 ? " [" + rest + " more tokens]" : "");
}
function groupView(group, mode) {
  return el("div", {}, el("h3", {}, "Prompt"), el("pre", {}, group.prompt), el("p", {}, el("strong", {}, "reference: "), group.answer, el("span", { class: "soft" }, "  " + group.answers.length + " of " + group.size + " answers")),
    el("div", { class: "answers" }, group.answers.map(a => el("div", { class: "answer" }, el("div", {}, el("strong", { class: a.advantage > 0 ? "good" : a.advantage < 0 ? "bad" : "" }, "reward " + number(a.reward)), " advantage " + number(a.advantage)),
      el("div", { class: "soft" }, Object.entries(a.components).map(([k, v]) => k + " " + number(v)).join(", "), " · " + a.tokens + " tokens · " + a.stop), colored(a, mode)))));
}
function browser(run) {
  const groups = run.rollouts.groups, unique = f => [...new Set(groups.map(f).filter(x => x !== ""))].sort();
  const select = (label, values) => el("select", { "aria-label": label, name: label }, el("option", { value: "" }, label + ": any"), values.map(v => el("option", { value: v }, v)));
  const step = select("step", [...new Set(groups.map(g => g.step))]), set = select("data source", unique(g => g.data_set)), stop = select("stop reason", [...new Set(groups.flatMap(g => g.answers.map(a => a.stop)))]), deg = select("group", ["degenerate", "mixed"]);
  const low = el("input", { type: "number", step: "any", placeholder: "reward from", "aria-label": "lowest reward", style: "width:9em" }), high = el("input", { type: "number", step: "any", placeholder: "to", "aria-label": "highest reward", style: "width:6em" });
  const text = el("input", { type: "search", placeholder: "text in prompt or answers", "aria-label": "text", style: "width:15em" }), mode = el("select", { "aria-label": "color" }, ["mismatch", "advantage", "plain"].map(m => el("option", { value: m }, "color: " + m)));
  [...mode.options].forEach((o, i) => { o.value = ["mismatch", "advantage", "plain"][i]; });
  const count = el("span", { class: "soft", id: "count" }), body = el("tbody", {}), more = el("button", {}, "show more");
  const inRange = a => (low.value === "" || (a.reward !== null && a.reward >= Number(low.value))) && (high.value === "" || (a.reward !== null && a.reward <= Number(high.value)));
  let limit = 50;
  function fill() {
    const wanted = text.value.toLowerCase();
    const found = groups.filter(g => (step.value === "" || g.step === Number(step.value)) && (set.value === "" || g.data_set === set.value) && (deg.value === "" || g.degenerate === (deg.value === "degenerate"))
      && g.answers.some(a => (stop.value === "" || a.stop === stop.value) && inRange(a)) && (wanted === "" || g.prompt.toLowerCase().includes(wanted) || g.answers.some(a => a.text.toLowerCase().includes(wanted))));
    count.textContent = found.length + " of " + groups.length + " groups";
    body.replaceChildren(...found.slice(0, limit).map(g => {
      const rewards = g.answers.map(a => a.reward).filter(r => r !== null);
      const row = el("tr", { class: "group", tabindex: 0, "data-step": g.step }, [g.step, g.data_set || "–", g.prompt_index, rewards.length ? number(rewards.reduce((a, b) => a + b, 0) / rewards.length) : "–", g.degenerate ? "degenerate" : "mixed", g.prompt.slice(-120)].map(c => el("td", {}, c)));
      const open = () => { const next = row.nextSibling; if (next && next.classList && next.classList.contains("opened")) { next.remove(); return; } row.after(el("tr", { class: "opened" }, el("td", { colspan: 6 }, groupView(g, mode.value)))); };
      row.addEventListener("click", open);
      row.addEventListener("keydown", e => { if (e.key === "Enter") open(); });
      return row;
    }));
    more.hidden = found.length <= limit;
  }
  [step, set, stop, deg, low, high, text, mode].forEach(f => f.addEventListener("input", () => { limit = 50; fill(); }));
  more.addEventListener("click", () => { limit += 200; fill(); });
  fill();
  return el("div", {}, el("p", { class: "soft" }, run.rollouts.rule), el("div", { class: "filters" }, step, set, stop, deg, low, high, text, mode, count), el("table", { class: "groups" }, el("thead", {}, el("tr", {}, ["step", "source", "prompt", "mean reward", "group", "end of the prompt"].map(h => el("th", {}, h)))), body), more);
}
section("rollouts", "Rollouts", RUNS.map((run, i) => [RUNS.length > 1 ? el("h3", {}, nameOf(i)) : null, run.rollouts.groups.length ? browser(run) : el("p", { class: "soft" }, "No rollouts were found.")]).flat());

// Tables
function guardsOf(run) {
  const off = Object.keys(run.guards).filter(key => key.endsWith(".action") && run.guards[key] === "off").map(key => key.slice(0, -"action".length));
  const on = Object.entries(run.guards).filter(([key]) => !off.some(rule => key.startsWith(rule)));
  return el("div", {}, table(["guard", "value"], on), off.length ? el("p", { class: "soft" }, "Rules that are off: " + off.map(rule => rule.split(".").slice(-2)[0]).join(", ") + ".") : null);
}
const each = f => RUNS.flatMap((run, i) => [RUNS.length > 1 ? el("h3", {}, nameOf(i)) : null, f(run)]);
section("mismatch", "Worst mismatches", each(run => run.worst.length ? table(["step", "prompt", "position", "token", "text", "mismatch (nats)", "log-prob of the engine", "of the policy"], run.worst.map(w => [w.step, w.prompt_index, w.position, w.token, w.text, number(w.mismatch), number(w.sampler), number(w.policy)]), "numbers") : el("p", { class: "soft" }, "No log-probs of the policy are in the rollouts that were read.")));
section("alarms", "Alarms and guards", each(run => [run.alarms.length ? table(["alarm", "since", "until", "what", "look at"], run.alarms.map(a => [a.name, a.since, a.until === null ? "still" : a.until, a.text, a.look_at])) : el("p", { class: "good" }, "No alarm was raised."), guardsOf(run)]).flat());
section("checkpoints", "Checkpoints", each(run => run.checkpoints.length ? table(["step", "state", "folder"], run.checkpoints.map(c => [c.step, c.complete ? "complete" : "incomplete", c.path])) : el("p", { class: "soft" }, "There are none.")));
section("config", "Config against the defaults", each(run => [table(["key", "value", "default"], run.config), el("p", { class: "soft" }, run.num_defaults + " other keys have their defaults."), run.changes.length ? table(["after step", "key", "before", "now"], run.changes.map(c => [c.after_step, c.key, c.before, c.now])) : null]).flat());
section("versions", "Versions, layout and time", each(run => table(["what", "value"], [...Object.entries(run.summary.versions || {}), ...Object.entries(run.summary.layout || {}), ...Object.entries(run.summary.seconds || {}).map(([k, v]) => ["seconds: " + k, number(v)])].map(([k, v]) => [k, v === null ? "not installed" : v]))));
document.body.dataset.milliseconds = Math.round(performance.now());
document.body.dataset.ready = "yes";
