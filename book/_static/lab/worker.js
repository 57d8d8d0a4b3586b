// A worker that answers requests: it holds a graph of its own, so that two of them use two cores.
import { Graph } from "./graph.js";

let graph;

async function work({ model, page, task, off, strength }) {
  if (model) return (graph = await Graph.load(model, page)) && {};
  const fixed = graph.setting(off, strength);
  const { tokens, choices } = task;
  return choices ? { chosen: await graph.choose(tokens, choices, fixed) } : { given: await graph.complete(tokens, fixed) };
}

addEventListener("message", async ({ data }) => {
  try {
    postMessage({ id: data.id, result: await work(data) });
  } catch (error) {
    postMessage({ id: data.id, error: error.message });
  }
});
