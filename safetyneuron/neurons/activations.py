"""What neurons put out: read while a model runs, averaged over prompts, and overwritten.

The activation of a row is what it puts out, that of a column what it reads.
"""

from collections import defaultdict
from contextlib import ExitStack, contextmanager
from functools import partial

import torch

from safetyneuron.code import code_digest
from safetyneuron.errors import SafetyNeuronError
from safetyneuron.memory import Batches
from safetyneuron.neurons.architecture import COLUMN_PROJECTIONS, PROJECTIONS, Architecture
from safetyneuron.neurons.deactivation import check_shapes
from safetyneuron.neurons.encoding import encode_prompts, pad
from safetyneuron.neurons.identity import changed
from safetyneuron.neurons.weights import row_sums


def watch(architecture, layer, projection, change):
    """Hook `change(activations)` of one projection in one layer: what rows put out, what columns read. It may return None."""
    place = architecture.place(layer, projection)
    if projection in COLUMN_PROJECTIONS:
        return place.module.register_forward_pre_hook(
            lambda _, inputs: None if (new := change(inputs[0])) is None else (new,)
        )

    def on_output(_, inputs, output):
        part = change(output[..., place.channels])
        return (
            None
            if part is None
            else torch.cat(
                [output[..., : place.start], part, output[..., place.start + place.size :]], -1
            )
        )

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
                hooks.callback(
                    watch(architecture, layer, projection, partial(add, (projection, layer))).remove
                )
        for _, tokens in Batches(batch_size)(encoded, run):
            count += tokens
            for key in read:  # after the pass, which may run out of memory
                sums[key] = sums[key] + read[key]
    return {
        p: torch.stack([sums[p, layer] for layer in range(len(architecture.layers))]).float()
        / count
        for p in PROJECTIONS
    }


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

    def key():
        values = {p: row_sums(means[p]).tolist() for p in neurons.masks}
        return [code_digest(__name__), "mean", neurons.digest(), values]

    with changed(model, key), ExitStack() as hooks:
        for projection, mask in neurons.masks.items():
            for layer in mask.any(1).nonzero().flatten().tolist():
                channels = mask[layer].nonzero().flatten()
                hooks.callback(
                    watch(
                        architecture,
                        layer,
                        projection,
                        partial(fix, channels, means[projection][layer, channels]),
                    ).remove
                )
        yield model


@contextmanager
def activations(model):
    """What every down projection reads, for the length of a `with` block: a dict, layer to (B, n, channels), of the last call."""
    architecture, seen = Architecture(model), {}
    with ExitStack() as hooks:
        for layer in range(len(architecture.layers)):

            def hook(module, inputs, layer=layer):
                return seen.__setitem__(layer, inputs[0])

            hooks.callback(
                architecture.place(layer, "down").module.register_forward_pre_hook(hook).remove
            )
        yield seen


@contextmanager
def overwritten(model, neurons, values):
    """The down projections read `values(layer)` in the channels of the set, for the length of a `with` block; None leaves them as they are."""
    architecture, mask = Architecture(model), neurons.masks["down"]
    check_shapes(architecture, neurons)
    if len(neurons) != neurons.counts()["down"]:
        raise SafetyNeuronError(
            "only channels of 'down' can be patched: the set holds neurons of other projections"
        )
    with ExitStack() as hooks:
        for layer in mask.any(1).nonzero().flatten().tolist():
            replace = partial(_replace, mask[layer].nonzero().flatten(), partial(values, layer))
            hooks.callback(
                architecture.place(layer, "down").module.register_forward_pre_hook(replace).remove
            )
        yield model


def _replace(channels, values, module, inputs):
    """Hook: what the down projection reads, with some channels overwritten."""
    new = values()
    if new is None:
        return None
    patched = inputs[0].clone()
    patched[..., channels.to(patched.device)] = new[..., channels.to(new.device)].to(patched)
    return (patched, *inputs[1:])


@torch.no_grad()
def mean_activations(model, tokenizer, prompts, batch_size=64):
    """Mean activation of every feed-forward neuron over all tokens of the prompts: (layers, channels), float64."""
    encoded, total, count = encode_prompts(model, tokenizer, prompts), 0, 0
    with activations(model) as read:

        def sums(some):
            """Activations summed over the real tokens of one batch, and how many tokens these are."""
            batch = pad(some, tokenizer, model.device)
            model(**batch, use_cache=False, logits_to_keep=1)
            real = batch["attention_mask"].bool()
            return torch.stack(
                [read[l][real.to(read[l].device)].double().sum(0).cpu() for l in sorted(read)]
            ), int(real.sum())

        for _, (summed, tokens) in Batches(batch_size)(encoded, sums):
            total, count = total + summed, count + tokens
    return total / count


@torch.no_grad()
def last_activations(model, tokenizer, prompts, batch_size=64):
    """Activations of every feed-forward neuron at the last token of each prompt: (prompts, layers · channels)."""
    with activations(model) as read:

        def last(some):
            model(**pad(some, tokenizer, model.device), use_cache=False, logits_to_keep=1)
            return torch.cat([read[layer][:, -1].float().cpu() for layer in sorted(read)], 1)

        rows = [
            part for _, part in Batches(batch_size)(encode_prompts(model, tokenizer, prompts), last)
        ]
    return torch.cat(rows).numpy()
