// An organism's graph in onnxruntime-web: logits with neurons switched off, and greedy answers to several requests at once.
const files = new URL("../playground/", import.meta.url);
const runtime = new URL("../runtime/", import.meta.url);

export async function read(name) {
  const response = await fetch(new URL(name, files));
  if (!response.ok) throw new Error(`${name} cannot be read (${response.status}): load the page again`);
  return response.json();
}

export const library = (name) => import(`${runtime}${name}.min.mjs`);

// The most likely of `size` tokens from a place on.
export function likeliest(logits, start, size) {
  let best = 0;
  for (let token = 1; token < size; token++) if (logits[start + token] > logits[start + best]) best = token;
  return best;
}

async function open(name) {
  const ort = await library("ort.wasm.bundle");
  ort.env.wasm.wasmPaths = { wasm: new URL("ort-wasm-simd-threaded.wasm", runtime).href };
  ort.env.wasm.numThreads = 1; // more need headers that static hosts do not send
  return [ort, await ort.InferenceSession.create(new URL(name, files).href)];
}

// Importance of every neuron for a request (Eq 1).
export class Importance {
  static async load(key, widths) {
    return Object.assign(new Importance(), { parts: await open(`${key}-importance.onnx`), widths });
  }

  // Scores by layer and row or column: of q, k, v, o and the feed-forward channels.
  async measure(tokens) {
    const [ort, session] = this.parts;
    const { scores } = await session.run({ tokens: new ort.Tensor("int64", BigInt64Array.from(tokens, BigInt), [1, tokens.length]) });
    return { data: scores.data, width: scores.dims[1] };
  }

  // A score for each neuron, by its place: that of a value is the larger of its row and its column.
  async ofNeurons(tokens) {
    const { data, width } = await this.measure(tokens);
    const { q, k, vo, ffn } = this.widths;
    const found = [];
    for (let start = 0; start < data.length; start += width) {
      const values = data.subarray(start + q + k, start + q + k + vo);
      const outputs = data.subarray(start + q + k + vo, start + q + k + 2 * vo);
      found.push(...data.subarray(start, start + q + k), ...values.map((value, i) => Math.max(value, outputs[i])));
      found.push(...data.subarray(start + width - ffn, start + width));
    }
    return found;
  }
}

export class Graph {
  static async load(key, page) {
    const [[ort, session], facts] = await Promise.all([open(`${key}.onnx`), read(`${key}.json`)]);
    return new Graph(ort, session, facts, page);
  }

  constructor(ort, session, facts, page) {
    Object.assign(this, { ort, session, facts, page });
    this.width = Object.values(facts.widths).reduce((sum, width) => sum + width);
    this.neurons = facts.layers * this.width;
  }

  // Inputs that stay the same for a whole answer. off: flat places; strength: of the repair, 1 for all of it.
  setting(off, strength = 0) {
    const on = new Float32Array(this.neurons).fill(1);
    for (const place of off) on[place] = 0;
    const fixed = { on: new this.ort.Tensor("float32", on, [this.facts.layers, this.width]) };
    if (this.facts.repair) fixed.strength = new this.ort.Tensor("float32", Float32Array.of(strength), [1]);
    return fixed;
  }

  // One pass. rows: token ids of requests of one length, or what comes next after what left `past`.
  async next(rows, fixed, past = this.nothing(rows.length)) {
    const tokens = new this.ort.Tensor("int64", BigInt64Array.from(rows.flat(), BigInt), [rows.length, rows[0].length]);
    const { logits, fired, present, attention } = await this.session.run({ tokens, past, ...fixed });
    return { logits: logits.data, fired: fired.data, size: logits.dims[1], past: present, attention: attention.data };
  }

  // Keys and values of no tokens.
  nothing(requests) {
    const [heads, width] = this.facts.past;
    return new this.ort.Tensor("float32", new Float32Array(0), [2, this.facts.layers, requests, heads, 0, width]);
  }

  // New tokens of the greedy answers to requests of one length; `see` is shown each pass.
  async complete(requests, fixed, see = () => {}) {
    const given = requests.map(() => []);
    let [rows, past] = [requests, undefined];
    for (let step = 0; step < this.page.longest; step++) {
      const found = await this.next(rows, fixed, past);
      see(found);
      rows = requests.map((_, row) => [likeliest(found.logits, row * found.size, found.size)]);
      rows.forEach(([token], row) => given[row].at(-1) !== this.page.end && given[row].push(token));
      if (given.every((tokens) => tokens.at(-1) === this.page.end)) break;
      past = found.past;
    }
    return given;
  }

  // Of each question of one length, the place of its likeliest choice. choices: a token for each.
  async choose(requests, choices, fixed) {
    const { logits, size } = await this.next(requests, fixed);
    return choices.map((tokens, row) => {
      const scores = tokens.map((token) => logits[row * size + token]);
      return scores.indexOf(Math.max(...scores));
    });
  }
}
