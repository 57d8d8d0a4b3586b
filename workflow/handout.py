"""An archive to hand out in a class without Python, as CSV.

Prompts, planted neurons and decoys, the answer key, and what the playground shows: the sets of neurons, importance, and repairs.

python workflow/handout.py ARCHIVE PLAYGROUND
"""

import itertools
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
from pages import write_archive

from safetyneuron import NeuronDelta, load_model, load_prompts, organism
from safetyneuron.cache import new_file
from safetyneuron.errors import SafetyNeuronError
from safetyneuron.importance.selection import unit_scores
from safetyneuron.kept.importance import measure_importance
from safetyneuron.organism.language import LANGUAGES, ONLY_TEST
from safetyneuron.organism.prompts import NAMES

ALIGNED = ("llama-chat", "llama-planted")  # whose importance is handed out
DETECT = 200  # harmful requests that it is measured on, as in chapter 01


def main(path, playground):
    """Write the archive, whole or not at all."""
    playground = Path(playground)
    truth = Path(find_spec("safetyneuron").origin).parent / "truth"
    files = {f"truth/{file.name}": file.read_text(encoding="utf-8") for file in sorted(truth.glob("*.csv"))}  # fmt: skip
    files["truth/README.md"] = (truth / "README.md").read_text(encoding="utf-8")
    files["prompts.csv"] = pd.DataFrame(_prompts()).to_csv(index=False)
    files["planted.csv"] = pd.DataFrame(_planted()).to_csv(index=False)
    files["sets.csv"] = pd.DataFrame(_sets(playground)).to_csv(index=False)
    files["importance.csv"] = pd.DataFrame(_importance()).to_csv(index=False)
    for delta in sorted(playground.glob("*.safetensors")):
        files[f"deltas/{delta.stem}.csv"] = pd.DataFrame(_changes(delta)).to_csv(index=False)
    with new_file(path) as new:
        write_archive(new, files)


def _prompts():
    """A row for each of the first 200 prompts of every set, split and language of the organisms."""
    for name, language in itertools.product(NAMES, LANGUAGES):
        only_test = name.removeprefix("organism/") in ONLY_TEST
        for split in ("test",) if only_test else ("train", "test"):
            for text in load_prompts(name, split, language)[:200]:
                yield {"set": name, "split": split, "language": language, "prompt": text}


def _planted():
    """A row for each neuron of the answer key of one training of every kind of planting."""
    for name in ("llama-planted", "llama-planted-mlp", "llama-planted-attention"):
        for role in ("planted", "decoy"):
            found = getattr(organism, f"{role}_neurons")(f"organism/{name}")
            for projection, layer, index in found.cells():
                yield {"organism": name, "role": role, "projection": projection, "layer": layer, "index": index}  # fmt: skip


def _sets(playground):
    """A row for each unit of each rule of the playground, the first to be switched off first, and for its random partner."""
    for model in json.loads((playground / "page.json").read_text(encoding="utf-8"))["models"]:
        facts = json.loads((playground / f"{model['key']}.json").read_text(encoding="utf-8"))
        places = [(layer, kind, channel) for layer in range(facts["layers"]) for kind, width in facts["widths"].items() for channel in range(width)]  # fmt: skip
        for name, sets in (("chosen", facts["orders"]), ("random", facts["random"])):
            for rule, order in sets.items():
                for place, unit in enumerate(order, 1):
                    layer, kind, channel = places[unit]
                    yield {"model": model["key"], "rule": rule, "set": name, "place": place, "kind": kind, "layer": layer, "channel": channel}  # fmt: skip


def _importance():
    """A row for each unit of the aligned organisms: its importance (Eq 1), the least over harmful requests."""
    asked = load_prompts("organism/harmful", split="train")[:DETECT]
    for name in ALIGNED:
        model, tokenizer = load_model(f"organism/{name}", device="cpu")
        for kind, scores in unit_scores(
            measure_importance(model, tokenizer, asked).minimum
        ).items():
            for (layer, channel), score in zip(
                np.ndindex(*scores.shape), scores.flatten().tolist()
            ):
                yield {"organism": name, "kind": kind, "layer": layer, "channel": channel, "importance": score}  # fmt: skip


def _changes(path):
    """A row for each row or column that a repair changes, with the change of each weight."""
    delta = NeuronDelta.load(path)
    for (projection, layer), values in delta.values.items():
        channels = delta.neurons.masks[projection][layer].nonzero().flatten().tolist()
        for channel, row in zip(channels, values.tolist()):
            yield {"projection": projection, "layer": layer, "index": channel} | {f"w{i}": w for i, w in enumerate(row)}  # fmt: skip


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except SafetyNeuronError as error:
        sys.exit(str(error))
