"""The refusal direction, and how far every neuron's weights point along it."""

from contextlib import ExitStack

import torch
from torch.nn.functional import cosine_similarity

from safetyneuron.memory import Batches
from safetyneuron.neurons.architecture import COLUMN_PROJECTIONS, PROJECTIONS, Architecture
from safetyneuron.neurons.encoding import encode_prompts, pad


@torch.no_grad()
def refusal_directions(model, tokenizer, harmful, benign, batch_size=64):
    """Difference of the mean residual streams at the last prompt token, harmful minus benign: (layers + 1, width), the embedding first.

    Raises
    ------
    SafetyNeuronError
        If there are no prompts of a kind.
    """
    means = []
    for prompts in (harmful, benign):
        encoded, total = encode_prompts(model, tokenizer, prompts), 0

        def sums(some):
            return torch.stack(
                [
                    state[:, -1].double().sum(0).cpu()
                    for state in _streams(model, pad(some, tokenizer, model.device))
                ]
            )

        for _, summed in Batches(batch_size)(encoded, sums):
            total = total + summed
        means.append(total / len(encoded))
    return means[0] - means[1]


@torch.no_grad()
def alignment_with(model, directions):
    """|cosine| of every neuron's weights with the direction where it reads (rows) or writes (columns): (layers, channels) per projection.

    A row of layer l reads the stream before the layer, a column writes into the one after it.
    """
    architecture, scores = Architecture(model), {}
    for projection in PROJECTIONS:
        after = projection in COLUMN_PROJECTIONS
        rows = []
        for layer in range(len(architecture.layers)):
            weight = architecture.place(layer, projection).weight.double().cpu()
            rows.append(
                cosine_similarity(weight, directions[layer + after][None], dim=1).abs().float()
            )
        scores[projection] = torch.stack(rows)
    return scores


def _streams(model, batch):
    """The residual stream before the first layer and after every layer; hidden states of transformers end behind the last norm."""
    layers, states = Architecture(model).layers, []

    def first(value):
        return value[0] if isinstance(value, tuple) else value

    with ExitStack() as hooks:
        hooks.callback(
            layers[0]
            .register_forward_pre_hook(
                lambda _, args, named: states.append(args[0] if args else named["hidden_states"]),
                with_kwargs=True,
            )
            .remove
        )
        for layer in layers:
            hooks.callback(
                layer.register_forward_hook(
                    lambda _, args, output: states.append(first(output))
                ).remove
            )
        model.get_decoder()(**batch, use_cache=False)
    return states
