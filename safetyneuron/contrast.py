"""Activation contrasting and dynamic activation patching (Chen et al. 2025): the second definition of a safety neuron.

A neuron is here a channel of the feed-forward block; its activation is what the down projection reads: act(gate) · up.
"""

from contextlib import ExitStack, contextmanager
from functools import partial

import torch

from safetyneuron.architecture import Architecture, cache_argument
from safetyneuron.data import encode_prompts, pad
from safetyneuron.deactivation import check_shapes
from safetyneuron.errors import SafetyNeuronError
from safetyneuron.metrics.safety import answer_length
from safetyneuron.memory import Batches
from safetyneuron.neurons import NeuronSet
from safetyneuron.progress import steps

POSITIONS = ("all", "prompt", "completion")


class ChangeScores:
    """How far the activations of two models differ, per neuron: a float tensor (layers, channels) in `values`."""

    def __init__(self, model, values):
        self.empty, self.values = NeuronSet.empty(model), values

    def select(self, fraction):
        """The feed-forward neurons with the highest scores over all layers, as a set of channels of `down`.

        fraction: share of all feed-forward neurons, 0 to 1; 0 gives the empty set.
        """
        if not 0 <= fraction <= 1:
            raise SafetyNeuronError(f"fraction is {fraction}: it must be in [0, 1], for example 0.05")
        flat = torch.zeros(self.values.numel(), dtype=torch.bool)
        flat[self.values.flatten().topk(round(fraction * self.values.numel())).indices] = True
        return self._as_set(flat.view_as(self.values))

    def last_layers(self, count):
        """`count` neurons of the last layer, and of the layers before it where that is not enough (highest scores first)."""
        mask, width = torch.zeros_like(self.values, dtype=torch.bool), self.values.shape[1]
        for layer in reversed(range(len(self.values))):
            mask[layer, self.values[layer].topk(min(width, max(0, count - int(mask.sum())))).indices] = True
        return self._as_set(mask)

    def over_projections(self):
        """The scores as one of several projections: all other neurons rank below those of `down`."""
        return {p: self.values.float() if p == "down" else torch.full(mask.shape, -1.0) for p, mask in self.empty.masks.items()}

    def _as_set(self, mask):
        return NeuronSet(self.empty.masks | {"down": mask})


@contextmanager
def activations(model):
    """What every down projection reads, for the length of a `with` block: a dict, layer to (B, n, channels), of the last call."""
    architecture, seen = Architecture(model), {}
    with ExitStack() as hooks:
        for layer in range(len(architecture.layers)):
            hook = lambda module, inputs, layer=layer: seen.__setitem__(layer, inputs[0])
            hooks.callback(architecture.place(layer, "down").module.register_forward_pre_hook(hook).remove)
        yield seen


@torch.no_grad()
def change_scores(model, aligned, tokenizer, prompts, max_new_tokens=None, batch_size=16):
    """Root mean square difference of activations on the greedy completions of `model`, read by both models (Chen et al. 2025).

    Parameters
    ----------
    model, aligned : transformers.PreTrainedModel
        Before and after safety alignment; the same shape.
    prompts : list of str
        Red-teaming requests.

    Returns
    -------
    ChangeScores
        Every layer is included; the mean is over all completion tokens of all prompts, in float64.

    Raises
    ------
    SafetyNeuronError
        If the models differ in shape, or there are no prompts.
    """
    check_same_shape(model, aligned)
    max_new_tokens = max_new_tokens or answer_length(model)
    encoded = encode_prompts(model, tokenizer, prompts, room=max_new_tokens)
    total, count, fitting = 0, 0, Batches(batch_size)
    with activations(model) as first, activations(aligned) as second:

        def differences(some):
            """Squared differences summed over the completion tokens of one batch, and how many tokens these are."""
            batch = pad(some, tokenizer, model.device)
            tokens = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
            written = completion_mask(tokens, batch["input_ids"].shape[1], model, tokenizer)
            mask = torch.cat([batch["attention_mask"], written[:, batch["input_ids"].shape[1] :].long()], 1)
            for each in (model, aligned):
                each(input_ids=tokens.to(each.device), attention_mask=mask.to(each.device), use_cache=False, logits_to_keep=1)
            squares = [(first[l][written].double() - second[l].to(first[l].device)[written].double()).square().sum(0).cpu() for l in sorted(first)]
            return torch.stack(squares), int(written.sum())

        for start in steps(range(0, len(encoded), batch_size), "change scores"):
            for _, (squares, tokens) in fitting(encoded[start : start + batch_size], differences):
                total, count = total + squares, count + tokens
    return ChangeScores(model, (total / count).sqrt())


def completion_mask(tokens, prompt_length, model, tokenizer):
    """Which tokens belong to a completion, its end included: (B, n) bool."""
    ends = torch.tensor(sorted(_end_tokens(model, tokenizer)), device=tokens.device)
    new = torch.isin(tokens, ends)
    new[:, :prompt_length] = False
    ended = new.long().cumsum(1) - new.long() > 0  # after the first end
    mask = ~ended
    mask[:, :prompt_length] = False
    return mask


def _end_tokens(model, tokenizer):
    ends = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id} | set(ends if isinstance(ends, list) else [ends]) - {None}


def check_same_shape(model, other):
    """Refuse two models whose neurons do not correspond."""
    first, second = Architecture(model), Architecture(other)
    if first.widths != second.widths or len(first.layers) != len(second.layers):
        raise SafetyNeuronError("the two models have different shapes: contrast a model with its own aligned version")


@contextmanager
def patched_generation(recipient, donor, neurons, positions="all"):
    """The recipient runs with the donor's activations of `neurons`, for the length of a `with` block (Chen et al. 2025, dynamic activation patching).

    Before every forward pass of the recipient the donor reads the same tokens, with a cache of its own that is never patched, and its
    values overwrite the recipient's. All that runs the recipient is patched: greedy decoding, where the recipient picks the token, and scoring.

    >>> with patched_generation(recipient, donor, change_scores(recipient, donor, tokenizer, prompts).select(0.05)):
    ...     answers(recipient, tokenizer, prompts)

    Beam search is not followed: it reorders the recipient's cache alone.

    Parameters
    ----------
    neurons : NeuronSet
        Channels of `down`; other projections must be empty.
    positions : str
        `all`, `prompt` (what is read in the first pass) or `completion` (what is read one by one).

    Raises
    ------
    SafetyNeuronError
        If the models are one object or differ in shape, the set holds other neurons, or the word for the positions is unknown.
    """
    check_same_shape(recipient, donor)
    if recipient is donor:
        raise SafetyNeuronError("recipient and donor are the same object: load the donor on its own")
    if positions not in POSITIONS:
        raise SafetyNeuronError(f"positions is {positions!r}: use one of {', '.join(POSITIONS)}")
    follower = _Follower(donor, positions)
    with activations(donor) as read, overwritten(recipient, neurons, lambda layer: read[layer] if follower.active else None):
        handle = recipient.register_forward_pre_hook(follower.run, with_kwargs=True)
        try:
            yield recipient
        finally:
            handle.remove()


@contextmanager
def overwritten(model, neurons, values):
    """The down projections read `values(layer)` in the channels of the set, for the length of a `with` block; None leaves them as they are."""
    architecture, mask = Architecture(model), neurons.masks["down"]
    check_shapes(architecture, neurons)
    if len(neurons) != neurons.counts()["down"]:
        raise SafetyNeuronError("only channels of 'down' can be patched: the set holds neurons of other projections")
    with ExitStack() as hooks:
        for layer in mask.any(1).nonzero().flatten().tolist():
            replace = partial(_replace, mask[layer].nonzero().flatten(), partial(values, layer))
            hooks.callback(architecture.place(layer, "down").module.register_forward_pre_hook(replace).remove)
        yield model


def _replace(channels, values, module, inputs):
    """Hook: what the down projection reads, with some channels overwritten."""
    new = values()
    if new is None:
        return None
    patched = inputs[0].clone()
    patched[..., channels.to(patched.device)] = new[..., channels.to(new.device)].to(patched)
    return (patched, *inputs[1:])


class _Follower:
    """Runs the donor on whatever the recipient is about to read, each with its own cache."""

    def __init__(self, donor, positions):
        self.donor, self.positions = donor, positions
        self.cache, self.length, self.active = None, 0, True

    @torch.no_grad()
    def run(self, module, arguments, options):
        """Hook before the recipient's forward pass."""
        options = dict(options)
        past = options.pop(cache_argument(module), None)
        done = past.get_seq_length() if past is not None else 0
        if done == 0:
            self.cache, self.length = None, 0
        if done != self.length:
            raise SafetyNeuronError("patched generation cannot follow a cache that it has not seen from its start: generate inside the block")
        kept = cache_argument(self.donor)
        wanted = {kept: self.cache, "use_cache": past is not None, "logits_to_keep": 1}
        wanted |= {name: _moved(value, self.donor.device) for name, value in options.items() if name in ("input_ids", "attention_mask", "position_ids", "inputs_embeds")}
        result = self.donor(*(_moved(value, self.donor.device) for value in arguments), **wanted)
        self.active = self.positions == "all" or (self.positions == "prompt") == (done == 0)
        if past is not None:
            self.cache = result[kept]
            self.length = self.cache.get_seq_length()


def _moved(value, device):
    return value.to(device) if torch.is_tensor(value) else value


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
            return torch.stack([read[l][real.to(read[l].device)].double().sum(0).cpu() for l in sorted(read)]), int(real.sum())

        for _, (summed, tokens) in Batches(batch_size)(encoded, sums):
            total, count = total + summed, count + tokens
    return total / count


@contextmanager
def constant_patch(model, neurons, values):
    """The model runs with constant activations of `neurons` for the length of a `with` block: mean or zero patching.

    values: (layers, channels), for example `mean_activations` of a donor.
    """
    with overwritten(model, neurons, lambda layer: values[layer].to(model.device).view(1, 1, -1)):
        yield model
