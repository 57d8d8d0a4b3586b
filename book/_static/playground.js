// The page "Playground": the organism in the browser, with switches before its neurons.
const files = new URL("./playground/", import.meta.url);
const runtime = new URL("./runtime/", import.meta.url);
const find = (name) => document.getElementById(`play-${name}`);
const read = async (name) => (await fetch(new URL(name, files))).json();
const make = (tag, text, options = {}) => Object.assign(document.createElement(tag), { textContent: text }, options);

async function load() {
  const [ort, { Tokenizer }] = await Promise.all([import(`${runtime}ort.wasm.bundle.min.mjs`), import(`${runtime}tokenizers.min.mjs`)]);
  ort.env.wasm.wasmPaths = { wasm: new URL("ort-wasm-simd-threaded.wasm", runtime).href };
  ort.env.wasm.numThreads = 1; // more need headers that static hosts do not send
  const names = ["organism.json", "tokenizer.json", "tokenizer_config.json"];
  const [facts, ...words] = await Promise.all(names.map(read));
  const session = await ort.InferenceSession.create(new URL("organism.onnx", files).href);
  return new Playground(ort, session, new Tokenizer(...words), facts);
}

class Playground {
  constructor(ort, session, tokenizer, facts) {
    Object.assign(this, { ort, session, tokenizer, facts });
    this.width = Object.values(facts.widths).reduce((sum, width) => sum + width);
  }

  // Token ids of the request in the chat template, and its words that the tokenizer does not know.
  encode(request) {
    const ids = (text) => this.tokenizer.encode(text, { add_special_tokens: false }).ids;
    const unknown = request.split(/\s+/).filter((word) => word && ids(word).includes(this.facts.unknown));
    return { tokens: ids(this.facts.before + request + this.facts.after), unknown };
  }

  // Flat places of the neurons that a rule switches off at a position of the slider; 0 is none.
  off(rule, position) {
    return position ? this.facts.sets[rule][position - 1] ?? [] : [];
  }

  // Greedy answer with neurons off, and which neurons fired on the request.
  async answer(request, off) {
    const { tokens } = this.encode(request);
    const start = tokens.length;
    const on = new Float32Array(this.facts.layers * this.width).fill(1);
    off.forEach((place) => (on[place] = 0));
    const switches = new this.ort.Tensor("float32", on, [this.facts.layers, this.width]);
    let fired;
    while (tokens.length < start + this.facts.longest && tokens.at(-1) !== this.facts.end) {
      const input = new this.ort.Tensor("int64", BigInt64Array.from(tokens, BigInt), [1, tokens.length]);
      const result = await this.session.run({ tokens: input, on: switches });
      fired ??= result.fired.data;
      const logits = result.logits.data;
      tokens.push(logits.reduce((best, value, i) => (value > logits[best] ? i : best), 0));
    }
    return { text: this.tokenizer.decode(tokens.slice(start), { skip_special_tokens: true }).trim(), fired };
  }

  // The keyword rule of the chapters.
  refuses(answer) {
    const { spaced, unspaced } = this.facts.refusals;
    const phrases = spaced.map((phrase) => phrase.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join("|");
    const closed = answer.replaceAll(" ", "");
    return new RegExp(`(?<![\\p{L}\\p{N}_])(?:${phrases})(?![\\p{L}\\p{N}_])`, "u").test(answer) || unspaced.some((phrase) => closed.includes(phrase));
  }
}

// Everything below draws the page.

function fill(playground) {
  const { requests, sets, shares } = playground.facts;
  for (const [name, some] of Object.entries(requests)) {
    const group = make("optgroup", "", { label: name });
    group.append(...some.map((text) => make("option", text)));
    find("list").append(group);
  }
  Object.keys(sets).forEach((rule, i) => {
    const label = make("label", "");
    label.append(make("input", "", { type: "radio", name: "rule", value: rule, checked: i === 0 }), ` ${rule}`);
    find("rules").append(label);
  });
  find("share").max = shares.length;
  find("request").value = find("list").value;
}

function chosen(playground) {
  const rule = document.querySelector("#play input[name=rule]:checked").value;
  const position = Number(find("share").value);
  return { rule, position, off: playground.off(rule, position), missing: position > 0 && playground.facts.sets[rule][position - 1] === null };
}

function shareText(playground, { position, off, missing }) {
  if (!position) return "none";
  const percent = `${Number((100 * playground.facts.shares[position - 1]).toFixed(2))} %`;
  return missing ? `${percent}: without foundation neurons too few are left, none are off` : `${percent}, ${off.length} of ${playground.facts.layers * playground.width} neurons`;
}

async function show(playground) {
  const request = find("request").value.trim();
  const choice = chosen(playground);
  find("share-text").textContent = shareText(playground, choice);
  find("share").setAttribute("aria-valuetext", find("share-text").textContent);
  const problem = complaint(playground, request);
  find("unknown").textContent = problem.text;
  if (problem.stop) return;
  const whole = await playground.answer(request, []);
  const changed = await playground.answer(request, choice.off);
  for (const [name, { text }] of Object.entries({ whole, changed })) {
    find(name).textContent = text || "(nothing)";
    find(`${name}-verdict`).textContent = playground.refuses(text) ? "contains a refusal phrase" : "no refusal phrase";
  }
  const hit = choice.off.filter((place) => whole.fired[place]).length;
  find("overlap").textContent = choice.off.length ? `Of the ${choice.off.length} neurons switched off, ${hit} fire on this request in the whole model.` : "";
  drawMap(playground, changed.fired, choice.off);
}

function complaint(playground, request) {
  if (!request) return { text: "Type a request, or pick one.", stop: true };
  const { tokens, unknown } = playground.encode(request);
  if (tokens.length + playground.facts.longest > playground.facts.context) return { text: "The request is too long for the organism: shorten it.", stop: true };
  return { text: unknown.length ? `The organism does not know: ${unknown.join(", ")}` : "", stop: false };
}

function drawMap({ facts, width }, fired, off) {
  const head = make("tr", "");
  head.append(...["layer", ...Object.keys(facts.widths)].map((name) => make("th", name, { scope: "col" })));
  const rows = Array.from({ length: facts.layers }, (_, layer) => {
    const row = make("tr", "");
    row.append(make("th", layer + 1, { scope: "row" }));
    let start = layer * width;
    for (const count of Object.values(facts.widths)) {
      row.append(mapCell(fired.slice(start, start + count), off.filter((place) => place >= start && place < start + count).length));
      start += count;
    }
    return row;
  });
  find("map").replaceChildren(head, ...rows);
}

function mapCell(fired, off) {
  const share = fired.reduce((sum, one) => sum + one, 0) / fired.length;
  const cell = make("td", `${Math.round(100 * share)} %${off ? `\n${off} off` : ""}`);
  cell.style.setProperty("--fired", `${Math.min(70, 140 * share)}%`);
  return cell;
}

function report(error) {
  find("status").textContent = `The organism stopped: ${error.message}`;
  console.error(error);
}

function connect(playground) {
  let running = Promise.resolve();
  let latest = 0;
  const update = () => {
    const mine = ++latest; // a slider sends many: only the last is worth an answer
    return (running = running.then(() => mine === latest && show(playground)).catch(report));
  };
  find("list").addEventListener("change", () => ((find("request").value = find("list").value), update()));
  document.getElementById("play").addEventListener("input", (event) => event.target !== find("list") && update());
  document.getElementById("play").addEventListener("submit", (event) => event.preventDefault());
  return update();
}

if (location.protocol === "file:") {
  find("status").textContent = "Browsers let a page load a model only from a server: run “python -m http.server” in the folder of the book and open localhost:8000.";
} else {
  try {
    window.playground = await load();
    fill(window.playground);
    document.getElementById("play").hidden = false;
    find("status").textContent = "";
    await connect(window.playground);
  } catch (error) {
    report(error);
  }
}
