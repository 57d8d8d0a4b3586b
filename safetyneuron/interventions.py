"""What is done to a set of neurons in the comparison: zero, mean activation, the base model's parameters, training."""

from collections import defaultdict
from contextlib import ExitStack, contextmanager
from functools import partial

import torch

from safetyneuron.architecture import COLUMN_PROJECTIONS, PROJECTIONS, Architecture
from safetyneuron.data import encode_prompts, pad
from safetyneuron.deactivation import check_shapes
from safetyneuron.memory import Batches


def _watch(architecture, layer, projection, change):
    """Hook `change(activations)` of one projection in one layer: what rows put out, what columns read. It may return None."""
    place = architecture.place(layer, projection)
    if projection in COLUMN_PROJECTIONS:
        return place.module.register_forward_pre_hook(lambda _, inputs: None if (new := change(inputs[0])) is None else (new,))

    def on_output(_, inputs, output):
        part = change(output[..., place.channels])
        return None if part is None else torch.cat([output[..., : place.start], part, output[..., place.start + place.size :]], -1)

    return place.module.register_forward_hook(on_output)


@torch.no_grad()
def channel_means(model, tokenizer, prompts, batch_size=64):
    """Mean activation of every neuron over all tokens of the prompts: (layers, channels) per projection, float32."""
    architecture, sums, read, real = Architecture(model), defaultdict(float), {}, None
    encoded, count = encode_prompts(model, tokenizer, prompts), 0

    def add(key, values):
        read[key] = values[real.to(values.device)].double().sum(0).cpu()

    def run(some):
        """Read one batch, and return how many real tokens it has."""
        nonlocal real
        batch = pad(some, tokenizer, model.device)
        real = batch["attention_mask"].bool()
        model.get_decoder()(**batch, use_cache=False)
        return int(real.sum())

    with ExitStack() as hooks:
        for layer in range(len(architecture.layers)):
            for projection in PROJECTIONS:
                hooks.callback(_watch(architecture, layer, projection, partial(add, (projection, layer))).remove)
        for _, tokens in Batches(batch_size)(encoded, run):
            count += tokens
            for key in read:  # after the pass, which may run out of memory
                sums[key] = sums[key] + read[key]
    return {p: torch.stack([sums[p, layer] for layer in range(len(architecture.layers))]).float() / count for p in PROJECTIONS}


@contextmanager
def mean_ablated(model, neurons, means):
    """The neurons have their mean activation at every token, for the length of a `with` block.

    Parameters
    ----------
    means : dict of str to torch.Tensor
        From `channel_means`.

    Raises
    ------
    SafetyNeuronError
        If the set belongs to a model of another shape.
    """
    architecture = Architecture(model)
    check_shapes(architecture, neurons)

    def fix(channels, values, activations):
        new = activations.clone()
        new[..., channels.to(new.device)] = values.to(new)
        return new

    with ExitStack() as hooks:
        for projection, mask in neurons.masks.items():
            for layer in mask.any(1).nonzero().flatten().tolist():
                channels = mask[layer].nonzero().flatten()
                hooks.callback(_watch(architecture, layer, projection, partial(fix, channels, means[projection][layer, channels])).remove)
        yield model
