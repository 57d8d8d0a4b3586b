// Page one: a harmful request, answered by the whole model and without the first case's neurons, when a reader asks for it.
import { Organism, loadPage } from "./lab/organism.js";
import { placesOff, presetState, readState } from "./lab/state.js";

const find = (name) => document.getElementById(`demo-${name}`);

async function show() {
  find("status").textContent = "Loading the model …";
  const parts = await loadPage();
  const first = parts.page.presets[0].state;
  const state = readState(presetState(first), parts.page, first);
  const organism = await Organism.load(state.model, parts);
  const off = placesOff(state, organism);
  find("request").textContent = state.ask;
  find("whole").textContent = (await organism.answer(state.ask)).text;
  find("changed").textContent = (await organism.answer(state.ask, { off })).text;
  find("count").textContent = `${off.length} of ${organism.graph.neurons.toLocaleString("en")}`;
  find("answers").hidden = find("note").hidden = false;
  find("status").textContent = "";
}

find("run").addEventListener("click", () => {
  show().catch((error) => {
    find("status").textContent =
      location.protocol === "file:"
        ? "Browsers let a page load a model only from a server: run “python -m http.server” in the folder of the book and open localhost:8000."
        : `The model could not be loaded: ${error.message}`;
  });
});
