"""Activation contrasting (Chen et al. 2025; their patching is in `neurons.patching`): the second definition of a safety neuron.

A neuron is here a channel of the feed-forward block; its activation is what the down projection reads: act(gate) · up.
"""

import torch

from safetyneuron.errors import SafetyNeuronError
from safetyneuron.memory import Batches
from safetyneuron.metrics.safety import answer_length
from safetyneuron.neurons.activations import activations
from safetyneuron.neurons.encoding import encode_prompts, pad
from safetyneuron.neurons.files import read_tensors, write_tensors
from safetyneuron.neurons.generation import generate
from safetyneuron.neurons.patching import check_same_shape
from safetyneuron.neurons.sets import NeuronSet
from safetyneuron.progress import steps


class ChangeScores:
    """How far the activations of two models differ, per neuron: a float tensor (layers, channels) in `values`.

    empty: the set without neurons, in the shape of the models.
    """

    def __init__(self, empty, values):
        self.empty, self.values = empty, values

    def save(self, path):
        """Write a safetensors file."""
        write_tensors(path, "change scores", {"values": self.values}, {"shapes": self.empty.shapes})

    @classmethod
    def load(cls, path):
        """Read a file written by `save`."""
        with read_tensors(path, "change scores", "remove it and score again") as (tensors, facts):
            return cls(NeuronSet.from_cells(facts["shapes"], []), tensors["values"])

    def select(self, fraction):
        """The feed-forward neurons with the highest scores over all layers, as a set of channels of `down`.

        fraction: share of all feed-forward neurons, 0 to 1; 0 gives the empty set.
        """
        if not 0 <= fraction <= 1:
            raise SafetyNeuronError(
                f"fraction is {fraction}: it must be in [0, 1], for example 0.05"
            )
        flat = torch.zeros(self.values.numel(), dtype=torch.bool)
        flat[self.values.flatten().topk(round(fraction * self.values.numel())).indices] = True
        return self._as_set(flat.view_as(self.values))

    def top(self, count):
        """The `count` feed-forward neurons with the highest scores."""
        return self.select(min(1, count / self.values.numel()))

    def last_layers(self, count, seed=0):
        """`count` random neurons of the last layer; where it has not as many, all of it and random ones of the layer before, and so on."""
        mask, width = torch.zeros_like(self.values, dtype=torch.bool), self.values.shape[1]
        draw = torch.Generator().manual_seed(seed)
        for layer in reversed(range(len(mask))):
            left = count - int(mask.sum())
            mask[layer, torch.randperm(width, generator=draw)[: max(0, left)]] = True
        return self._as_set(mask)

    def over_projections(self):
        """The scores as one of several projections: all other neurons rank below those of `down`."""
        return {
            p: self.values.float() if p == "down" else torch.full(mask.shape, -1.0)
            for p, mask in self.empty.masks.items()
        }

    def _as_set(self, mask):
        return NeuronSet(self.empty.masks | {"down": mask})


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
            tokens = generate(model, tokenizer, batch, max_new_tokens)
            written = completion_mask(tokens, batch["input_ids"].shape[1], model, tokenizer)
            mask = torch.cat(
                [batch["attention_mask"], written[:, batch["input_ids"].shape[1] :].long()], 1
            )
            for each in (model, aligned):
                each(
                    input_ids=tokens.to(each.device),
                    attention_mask=mask.to(each.device),
                    use_cache=False,
                    logits_to_keep=1,
                )
            squares = [_apart(first[l], second[l], written) for l in sorted(first)]
            return torch.stack(squares), int(written.sum())

        for start in steps(range(0, len(encoded), batch_size), "change scores"):
            for _, (squares, tokens) in fitting(encoded[start : start + batch_size], differences):
                total, count = total + squares, count + tokens
    return ChangeScores(NeuronSet.empty(model), (total / count).sqrt())


def _apart(first, second, written):
    """Squared differences (channels,) summed over the tokens that count, wherever the two models lie."""
    one, other = (values[written.to(values.device)].double() for values in (first, second))
    return (one - other.to(one.device)).square().sum(0).cpu()


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
