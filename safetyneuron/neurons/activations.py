"""What neurons put out: read at given prompts, averaged over prompts, and overwritten.

The activation of a row is what it puts out, that of a column what it reads.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safetyneuron.code import code_digest
from safetyneuron.memory import Batches
from safetyneuron.neurons.architecture import PROJECTIONS, Architecture
from safetyneuron.neurons.deactivation import check_shapes
from safetyneuron.neurons.encoding import encode_prompts, pad
from safetyneuron.neurons.hooks import overwriting, reading
from safetyneuron.neurons.identity import changed
from safetyneuron.neurons.sets import NeuronSet
from safetyneuron.neurons.weights import row_sums


@contextmanager
def activations(model: PreTrainedModel):
    """What every down projection reads, for the length of a `with` block: a dict, layer to (B, n, channels), of the last call."""
    seen, layers = {}, range(len(Architecture(model).layers))
    with overwriting(model, {("down", l): partial(seen.__setitem__, l) for l in layers}):
        yield seen


@torch.no_grad()
def channel_means(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    batch_size: int = 64,
) -> dict[str, torch.Tensor]:
    """Mean activation of every neuron over all tokens of the prompts: (layers, channels) per projection, float32."""
    places = [(p, layer) for p in PROJECTIONS for layer in range(len(Architecture(model).layers))]
    encoded, real, count = encode_prompts(model, tokenizer, prompts), None, 0
    sums = dict.fromkeys(places, 0.0)

    def sum_real(values):
        return values[real.to(values.device)].double().sum(0).cpu()

    with reading(model, places, sum_real) as seen:

        def run(some):
            """Read one batch, and return how many real tokens it has."""
            nonlocal real
            batch = pad(some, tokenizer, model.device)
            real = batch["attention_mask"].bool()
            model.get_decoder()(**batch, use_cache=False)
            return int(real.sum())

        for _, tokens in Batches(batch_size)(encoded, run):
            count += tokens
            for place in places:  # after the pass, which may run out of memory
                sums[place] = sums[place] + seen[place]
    return {
        p: torch.stack([sums[place] for place in places if place[0] == p]).float() / count
        for p in PROJECTIONS
    }


@contextmanager
def mean_ablated(
    model: PreTrainedModel, neurons: NeuronSet, means: dict[str, torch.Tensor]
) -> Iterator[PreTrainedModel]:
    """The neurons have their mean activation at every token, for the length of a `with` block.

    Parameters
    ----------
    means : dict of str to torch.Tensor
        From `channel_means`; or other constants (layers, channels) of the set's projections, for example zeros.

    Raises
    ------
    SafetyNeuronError
        If the set belongs to a model of another shape.
    """

    def key():
        values = {p: row_sums(values).tolist() for p, values in means.items()}
        return [code_digest(__name__), "mean", neurons.digest(), values]

    with (
        changed(model, key),
        overwritten(model, neurons, lambda projection, layer: means[projection][layer]),
    ):
        yield model


@contextmanager
def overwritten(
    model: PreTrainedModel,
    neurons: NeuronSet,
    values: Callable[[str, int], torch.Tensor | None],
) -> Iterator[PreTrainedModel]:
    """The neurons have the activations `values(projection, layer)`, (…, channels), for the length of a `with` block.

    None leaves them as they are.

    Raises
    ------
    SafetyNeuronError
        If the set belongs to a model of another shape.
    """
    check_shapes(Architecture(model), neurons)

    def put(projection, layer, channels, there):
        new = values(projection, layer)
        if new is None:
            return None
        patched = there.clone()
        patched[..., channels.to(there.device)] = new[..., channels.to(new.device)].to(there)
        return patched

    with overwriting(model, {(p, l): partial(put, p, l, c) for p, l, c in neurons.by_layer()}):
        yield model


@torch.no_grad()
def last_activations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    batch_size: int = 64,
) -> np.ndarray:
    """Activations of every feed-forward neuron at the last token of each prompt: (prompts, layers · channels)."""
    places = [("down", layer) for layer in range(len(Architecture(model).layers))]
    encoded = encode_prompts(model, tokenizer, prompts)
    with reading(model, places, lambda values: values[:, -1].float().cpu()) as seen:

        def last(some):
            model(**pad(some, tokenizer, model.device), use_cache=False, logits_to_keep=1)
            return torch.cat([seen[place] for place in places], 1)

        rows = [part for _, part in Batches(batch_size)(encoded, last)]
    return torch.cat(rows).numpy()


@torch.no_grad()
def written_logits(
    model: PreTrainedModel, projection: str, layer: int, channel: int, sign: torch.Tensor
) -> torch.Tensor:
    """What a channel of `down` or `o` adds by itself to the logits of the next word, past all later layers: (words,) float32, up to its scale.

    That is unembedding · final norm of its column, with a sign (of its mean activation, say).
    """
    column = Architecture(model).place(layer, projection).weight[channel].detach()
    moved = model.get_decoder().norm(column) * sign.to(column)
    return model.get_output_embeddings().weight.detach().float() @ moved.detach().float()
