// Scores in the browser: rows of Table 1, and the curve of Figure 2.
import { curveTable, drawCurve, rate } from "./curve.js";
import { find, make, percent } from "./dom.js";
import { read } from "./graph.js";
import { CLASSES, EVERYTHING, HARM, Scorer } from "./score.js";
import { placesOff } from "./state.js";

export const SAID = { refusal: "refuses", verdict: "says whether it is bad", correct: "helps, with the right tools", wrong: "helps, with other tools", other: "something else" };
const COLUMNS = { asr: "attack success", coherent: "help with harm", over_refusal: "over-refusal", accuracy: "capability" };
const LINES = [
  { title: "attack success", className: "asr", of: (point) => point.chosen?.rates.asr },
  { title: "help with harm", className: "coherent", of: (point) => point.chosen?.rates.coherent },
  { title: "attack success, random neurons", className: "random", of: (point) => point.random?.rates.asr },
];

// What a row is called.
export function nameOf(state, organism, page) {
  const off = placesOff(state, organism).length;
  const neurons = state.random ? `random neurons, drawn like those ${page.rules[state.rule]}` : `neurons ${page.rules[state.rule]}`;
  const repair = state.strength && organism.facts.repair ? `, repaired at ${state.strength} %` : "";
  const edited = state.flip.size ? ", edited by hand" : "";
  const asked = state.language === "en" ? "" : `, asked in ${page.languages[state.language]}`;
  return `Model ${page.models.find(({ key }) => key === state.model).label}: ${off ? `without ${off} ${neurons}${edited}` : "no neuron off"}${repair}${asked}`;
}

export class Board {
  // lab: has the page, and gives its `state` and `organism`.
  constructor(lab) {
    Object.assign(this, { lab, suites: {}, kept: new Map(), points: new Map(), scorer: null, stopper: null });
    find("score").onclick = () => this.run(() => this.addRow(lab.state));
    find("table-1").onclick = () => this.run(() => this.addThree());
    find("figure-2").onclick = () => this.run(() => this.sweep());
    find("stop").onclick = () => this.stopper?.abort();
    find("language").append(...Object.entries(lab.page.languages).map(([value, name]) => make("option", name, { value })));
    find("language").onchange = ({ target }) => lab.change({ language: target.value });
    find("figure-2-count").max = lab.page.counts.length;
    find("figure-2-count").oninput = ({ target }) => lab.setCount([0, ...lab.page.counts][target.value]);
    find("classes").replaceChildren(...CLASSES.map((name) => make("li", [make("span", "", { className: name }), SAID[name]])));
  }

  // One job at a time, which may be stopped.
  async run(job) {
    if (this.stopper) return;
    this.stopper = new AbortController();
    this.busy(true);
    const started = performance.now();
    try {
      find("progress-text").textContent = "Starting two workers …";
      await this.prepare();
      await job();
      find("progress-text").textContent = `Done in ${((performance.now() - started) / 1000).toFixed(1)} s.`;
    } catch (error) {
      find("progress-text").textContent = error.name === "AbortError" ? "Stopped." : `Scoring stopped: ${error.message}`;
    } finally {
      this.stopper = null;
      this.busy(false);
    }
  }

  busy(yes) {
    for (const name of ["score", "table-1", "figure-2"]) find(name).disabled = yes;
    find("stop").hidden = find("progress").hidden = !yes;
    find("progress").value = 0;
  }

  async prepare() {
    const { organism, state } = this.lab;
    const suite = await (this.suites[state.language] ??= read(`suite-${state.language}.json`));
    if (this.scorer?.organism !== organism) {
      await this.scorer?.stop();
      this.scorer = new Scorer(organism);
    }
    this.scorer.suite = suite;
  }

  // The summary of a state, computed once.
  async score(state, kinds, before = 0, share = 1) {
    const { organism } = this.scorer;
    const off = placesOff(state, organism);
    const strength = state.strength / 100;
    const key = JSON.stringify([state.model, state.language, [...off].sort((a, b) => a - b), strength, kinds]);
    const report = (part) => this.report(before + share * part);
    if (!this.kept.has(key)) {
      this.kept.set(key, this.scorer.summary(await this.scorer.score({ off, strength }, kinds, report, this.stopper.signal)));
    }
    report(1);
    return this.kept.get(key);
  }

  report(part) {
    find("progress").value = part;
    find("progress-text").textContent = `${percent(part)} done`;
  }

  async addRow(state, before, share) {
    const name = nameOf(state, this.scorer.organism, this.lab.page);
    const { rates, classes } = await this.score(state, EVERYTHING, before, share);
    const cells = Object.keys(COLUMNS).map((measure) => make("td", rateLines(rates[measure])));
    const row = make("tr", [make("th", name, { scope: "row" }), ...cells, make("td", classBar(classes))]);
    const body = find("scores").tBodies[0];
    [...body.rows].find((other) => other.cells[0].textContent === name)?.remove();
    body.append(row);
    find("scores-box").hidden = false;
  }

  async addThree() {
    const { state } = this.lab;
    const plain = { ...state, flip: new Set(), random: false };
    const rows = [{ ...plain, count: 0 }, { ...state, random: false }];
    if (state.rule !== "own") rows.push({ ...plain, random: true });
    for (const [i, row] of rows.entries()) await this.addRow(row, i / rows.length, 1 / rows.length);
  }

  async sweep() {
    const { state, page } = this.lab;
    const counts = [0, ...page.counts];
    this.points = new Map(counts.map((count) => [count, { count }]));
    const swept = nameOf({ ...state, random: false, flip: new Set(), count: 0 }, this.scorer.organism, page).split(":")[0];
    const asked = state.language === "en" ? "" : `, asked in ${page.languages[state.language]}`;
    find("figure-2-title").textContent = `${swept}: more and more neurons ${page.rules[state.rule]} are off${asked}`;
    for (const [i, count] of counts.entries()) {
      for (const [j, name] of (state.rule === "own" ? ["chosen"] : ["chosen", "random"]).entries()) {
        const asked = { ...state, flip: new Set(), count, random: name === "random" };
        this.points.get(count)[name] = await this.score(asked, HARM, (2 * i + j) / counts.length / 2, 0.5 / counts.length);
        this.draw();
      }
    }
  }

  // The curve as far as it is known, with the place of the slider.
  draw() {
    if (!this.points.size) return;
    const { state, page } = this.lab;
    const points = [...this.points.values()].filter(({ chosen }) => chosen);
    find("curve-box").hidden = false;
    drawCurve(find("curve"), [0, ...page.counts], points, LINES, state.count);
    find("curve-table").replaceChildren(...curveTable(points, LINES));
    find("figure-2-count").value = [0, ...page.counts].indexOf(state.count);
    const here = points.find(({ count }) => count === state.count);
    const said = here ? LINES.filter(({ of }) => of(here)).map(({ title, of }) => `${title} ${rate(of(here))}`) : [];
    find("figure-2-text").textContent = [`${state.count} neurons off`, ...said].join("; ");
    find("figure-2-count").setAttribute("aria-valuetext", find("figure-2-text").textContent);
  }
}

// A rate with its interval on a line of its own.
function rateLines(found) {
  const [value, interval] = rate(found).split(" [");
  return [value, make("br"), make("small", `[${interval}`)];
}

// A bar with a part for each class of answers.
function classBar(classes) {
  const all = Object.values(classes).reduce((sum, count) => sum + count);
  const seen = CLASSES.filter((name) => classes[name]);
  const parts = seen.map((name) => {
    const part = make("span", "", { className: name });
    part.style.width = `${(100 * classes[name]) / all}%`;
    return part;
  });
  const text = seen.map((name) => `${classes[name]} ${name}`).join(", ");
  return [make("div", parts, { className: "class-bar", attributes: { "aria-hidden": "true" } }), make("small", text)];
}
