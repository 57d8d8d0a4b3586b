"""The refusal direction, and how far every neuron's weights point along it."""

import torch
from torch.nn.functional import cosine_similarity

from safetyneuron.architecture import COLUMN_PROJECTIONS, PROJECTIONS, Architecture
from safetyneuron.data import encode_prompts, pad


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
        for start in range(0, len(encoded), batch_size):
            batch = pad(encoded[start : start + batch_size], tokenizer, model.device)
            states = model.get_decoder()(**batch, output_hidden_states=True, use_cache=False).hidden_states
            total = total + torch.stack([state[:, -1].double().sum(0).cpu() for state in states])
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
            rows.append(cosine_similarity(weight, directions[layer + after][None], dim=1).abs().float())
        scores[projection] = torch.stack(rows)
    return scores
