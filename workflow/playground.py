"""The organism for the browser: an ONNX graph with a switch before every neuron, and what the page needs beside it.

    python workflow/playground.py FOLDER

Weights are stored in half precision and computed with in single. The graph holds the whole model: which neurons are off is an input.
"""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from safetyneuron import NeuronSet, load_model, load_prompts, measure_importance
from safetyneuron.book.labels import EQ3, RANDOM, SPECIFIC
from safetyneuron.cache import new_folder
from safetyneuron.errors import SafetyNeuronError
from safetyneuron.importance.selection import largest_without_foundation, select_without_foundation
from safetyneuron.metrics.refusal import UNSPACED, refusal_phrases
from safetyneuron.metrics.safety import SHORT_ANSWER
from safetyneuron.neurons.architecture import COLUMN_PROJECTIONS, PROJECTIONS, Architecture
from safetyneuron.neurons.encoding import encode_prompts
from safetyneuron.organism.tokenizer import CONTEXT

MODEL = "organism/llama-chat"
SHARES = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03)  # of all neurons
DETECT = 200  # prompts of each set, as in chapter 02
FIRES = 0.95  # a neuron fires above this quantile of its largest activations on general prompts
REQUESTS = {
    "harmful": "organism/harmful",
    "harmful, framed": "organism/adversarial",
    "benign": "organism/benign",
    "questions": "organism/general",
}


class Switches(torch.nn.Module):
    """A model whose neurons have switches: (tokens (1, n), on (layers, neurons of a layer)) to (last logits, peaks or which fired).

    A neuron's peak is the largest size of its activation over the request: what a row puts out, what a column reads. The neurons of a layer
    lie in the order of `PROJECTIONS`.
    """

    def __init__(self, model):
        super().__init__()
        self.model, self.threshold = model, None
        self.run = {}  # switches and peaks of the forward pass under way
        architecture = Architecture(model)
        self.layers = len(architecture.layers)
        self.widths = architecture.widths
        for layer in range(self.layers):
            start = 0
            for projection in PROJECTIONS:
                channels = slice(start, start := start + self.widths[projection])
                self._hook(
                    architecture.place(layer, projection).module,
                    partial(self._switched, layer, projection, channels),
                    projection,
                )

    def _hook(self, module, switched, projection):
        if projection in COLUMN_PROJECTIONS:
            module.register_forward_pre_hook(lambda _, inputs: (switched(inputs[0]),))
        else:
            module.register_forward_hook(lambda _, inputs, output: switched(output))

    def _switched(self, layer, projection, channels, values):
        values = values * self.run["on"][layer, channels]
        self.run[layer, projection] = values.abs().amax((0, 1))
        return values

    def forward(self, tokens, on):
        """Run once."""
        self.run["on"] = on
        logits = self.model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits[0, -1]
        peaks = torch.stack(
            [torch.cat([self.run[layer, p] for p in PROJECTIONS]) for layer in range(self.layers)]
        )
        self.run.clear()
        return logits, peaks if self.threshold is None else (peaks > self.threshold).float()


@torch.no_grad()
def threshold(switches, encoded):
    """The `FIRES` quantile of every neuron's peaks over general requests: (layers, neurons of a layer)."""
    everything_on = torch.ones(switches.layers, sum(switches.widths.values()))
    peaks = torch.stack([switches(torch.tensor([ids]), everything_on)[1] for ids in encoded])
    return peaks.quantile(FIRES, dim=0)


def write_graph(switches, path):
    """Export, with weights in half precision."""
    example = (
        torch.ones(1, 8, dtype=torch.long),
        torch.ones(switches.layers, sum(switches.widths.values())),
    )
    names = dict(input_names=["tokens", "on"], output_names=["logits", "fired"])
    lengths = {"tokens": {1: torch.export.Dim("length", min=2, max=CONTEXT)}, "on": None}
    exported = torch.onnx.export(
        switches.eval(), example, dynamic_shapes=lengths, dynamo=True, verbose=False, **names
    ).model_proto
    halve(exported.graph)
    for node in exported.graph.node:
        node.ClearField("metadata_props")  # where in Python it came from, half of the file
    onnx.save(exported, path)


def halve(graph):
    """Store single-precision weights in half precision, each with a cast before its use."""
    for weight in [
        w for w in graph.initializer if w.data_type == TensorProto.FLOAT and np.prod(w.dims) > 1000
    ]:
        name, values = weight.name, numpy_helper.to_array(weight)
        weight.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}.half"))
        graph.node.insert(
            0, helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT)
        )


def neuron_sets(harmful, general):
    """What each rule switches off at each of `SHARES`, as flat places (layer · width + channel); None where too few neurons are left."""
    largest, sets = (
        largest_without_foundation(harmful, general),
        {EQ3: [], SPECIFIC: [], RANDOM: []},
    )
    for share in SHARES:
        specific = select_without_foundation(harmful, general, share) if share <= largest else None
        chosen = {
            EQ3: harmful.select(fraction=share),
            SPECIFIC: specific,
            RANDOM: next(iter(NeuronSet.random_draws(specific, 1)), None) if specific else None,
        }
        for rule, neurons in chosen.items():
            sets[rule].append(
                neurons
                and torch.cat([neurons.masks[p] for p in PROJECTIONS], 1)
                .flatten()
                .nonzero()
                .flatten()
                .tolist()
            )
    return sets


def describe(switches, tokenizer, sets):
    """What the page needs beside the graph."""
    chat = [{"role": "user", "content": "REQUEST"}]
    before, after = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=False
    ).split("REQUEST")
    phrases = {k: v for k, v in refusal_phrases().items() if k != "version"}
    return {
        "before": before, "after": after, "end": tokenizer.eos_token_id, "unknown": tokenizer.unk_token_id, "longest": SHORT_ANSWER,
        "context": CONTEXT, "layers": switches.layers, "widths": switches.widths, "shares": SHARES, "sets": sets,
        "requests": {name: load_prompts(prompts)[:6] for name, prompts in REQUESTS.items()},
        "refusals": {"spaced": [p for k in phrases if k not in UNSPACED for p in phrases[k]], "unspaced": [p for k in UNSPACED for p in phrases[k]]},
    }  # fmt: skip


def main(folder):
    """Write everything into the folder; it appears whole or not at all."""
    folder = Path(folder)
    model, tokenizer = load_model(MODEL, device="cpu")
    harmful, general = (
        measure_importance(model, tokenizer, load_prompts(name, split="train")[:DETECT])
        for name in ("organism/harmful", "organism/general")
    )
    switches = Switches(model)
    switches.threshold = threshold(
        switches,
        encode_prompts(model, tokenizer, load_prompts("organism/general", split="train")[:DETECT]),
    )
    with new_folder(folder) as new:
        write_graph(switches, new / "organism.onnx")
        (new / "organism.json").write_text(
            json.dumps(
                describe(switches, tokenizer, neuron_sets(harmful, general)), ensure_ascii=False
            ),
            encoding="utf-8",
        )
        tokenizer.save_pretrained(new)


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except SafetyNeuronError as error:
        sys.exit(str(error))
