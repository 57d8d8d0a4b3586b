"""The refusal direction where every neuron reads or writes, and how far the neuron's weights point along it."""

import torch
from torch.nn.functional import cosine_similarity

from safetyneuron.memory import Batches
from safetyneuron.neurons.architecture import COLUMN_PROJECTIONS, PROJECTIONS, Architecture
from safetyneuron.neurons.encoding import encode_prompts, pad
from safetyneuron.neurons.hooks import reading

# Rows read the normalised stream at their projection's input; columns write into the stream behind their block.
PLACES = dict.fromkeys("qkv", "into q") | dict.fromkeys(("gate", "up"), "into gate")
PLACES |= {"o": "between", "down": "after"}


@torch.no_grad()
def refusal_directions(model, tokenizer, harmful, benign, batch_size=64):
    """Difference of the mean states over all prompt tokens, harmful minus benign, where each projection reads or writes.

    Not at the last token alone (Arditi et al. 2024): it is the chat template's, the same in every prompt, so that nothing
    could be told where the first layer's q, k and v read. The choice was not blind: both positions had been held against the
    planted neurons of `llama-planted@0` to `@2` (AUC .59, .63, .57 over all tokens; .59, .54, .58 at the last).

    Returns
    -------
    dict of str to torch.Tensor
        (layers, width) per projection, float64.

    Raises
    ------
    SafetyNeuronError
        If there are no prompts of a kind.
    """
    first, second = (
        _mean_states(model, tokenizer, prompts, batch_size) for prompts in (harmful, benign)
    )
    return {p: first[what] - second[what] for p, what in PLACES.items()}


def _mean_states(model, tokenizer, prompts, batch_size):
    """Mean over prompts of the mean over a prompt's tokens: place to (layers, width)."""
    layers, kinds = range(len(Architecture(model).layers)), list(dict.fromkeys(PLACES.values()))
    encoded, total, share = encode_prompts(model, tokenizer, prompts), 0, None

    def mean(values):
        return torch.einsum("bnd,bn->d", values.double(), share.to(values.device)).cpu()

    with reading(model, [(what, layer) for what in kinds for layer in layers], mean) as seen:

        def sums(some):
            nonlocal share
            batch = pad(some, tokenizer, model.device)
            real = batch["attention_mask"].double()
            share = real / real.sum(1, keepdim=True)
            model.get_decoder()(**batch, use_cache=False)
            return torch.stack([seen[what, layer] for what in kinds for layer in layers])

        for _, summed in Batches(batch_size)(encoded, sums):
            total = total + summed
    means = (total / len(encoded)).unflatten(0, (len(kinds), len(layers)))
    return dict(zip(kinds, means))


@torch.no_grad()
def alignment_with(model, directions):
    """|cosine| of every neuron's weights with the direction where it reads (rows) or writes (columns): (layers, channels) per projection.

    directions: of `refusal_directions`. Where a norm lies between a column and the stream, its gains belong to the column.
    """
    architecture, scores = Architecture(model), {}
    for projection in PROJECTIONS:
        rows = []
        for layer, direction in enumerate(directions[projection]):
            weight = architecture.place(layer, projection).weight.double().cpu()
            norm = projection in COLUMN_PROJECTIONS and architecture.norm_after(layer, projection)
            if norm:
                ones = torch.ones(weight.shape[1], device=norm.weight.device)
                weight = weight * norm(ones).double().cpu()
            rows.append(cosine_similarity(weight, direction[None], dim=1).abs().float())
        scores[projection] = torch.stack(rows)
    return scores
