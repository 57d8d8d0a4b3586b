"""Dynamic activation patching (Chen et al. 2025): one model runs with some of another's activations."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from safetyneuron.code import code_digest
from safetyneuron.errors import SafetyNeuronError
from safetyneuron.neurons.activations import activations, overwritten
from safetyneuron.neurons.architecture import Architecture, cache_argument
from safetyneuron.neurons.identity import changed, model_digest
from safetyneuron.neurons.sets import NeuronSet

POSITIONS = ("all", "prompt", "completion")


def check_same_shape(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Refuse two models whose neurons do not correspond."""
    first, second = Architecture(model), Architecture(other)
    if first.widths != second.widths or len(first.layers) != len(second.layers):
        raise SafetyNeuronError(
            "the two models have different shapes: contrast a model with its own aligned version"
        )


@contextmanager
def patched_generation(
    recipient: PreTrainedModel, donor: PreTrainedModel, neurons: NeuronSet, positions: str = "all"
) -> Iterator[PreTrainedModel]:
    """The recipient runs with the donor's activations of `neurons`, for the length of a `with` block (Chen et al. 2025, dynamic activation patching).

    Before every forward pass of the recipient the donor reads the same tokens, with a cache of its own that is never patched, and its
    values overwrite the recipient's. All that runs the recipient is patched: greedy decoding, where the recipient picks the token, and scoring, which
    reads everything in one pass and so counts as the prompt where `positions` tells prompt and completion apart.

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
        raise SafetyNeuronError(
            "recipient and donor are the same object: load the donor on its own"
        )
    if positions not in POSITIONS:
        raise SafetyNeuronError(f"positions is {positions!r}: use one of {', '.join(POSITIONS)}")
    if len(neurons) != len(neurons.only("down")):
        raise SafetyNeuronError(
            "only channels of 'down' can be patched: the set holds neurons of other projections"
        )
    follower = _Follower(donor, positions)
    with (
        changed(recipient, lambda: _key(model_digest(donor), neurons, positions)),
        activations(donor) as read,
        overwritten(recipient, neurons, lambda _, layer: read[layer] if follower.active else None),
    ):
        handle = recipient.register_forward_pre_hook(follower.run, with_kwargs=True)
        try:
            yield recipient
        finally:
            handle.remove()


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
            raise SafetyNeuronError(
                "patched generation cannot follow a cache that it has not seen from its start: generate inside the block"
            )
        kept = cache_argument(self.donor)
        wanted = {kept: self.cache, "use_cache": past is not None, "logits_to_keep": 1}
        wanted |= {
            name: _moved(value, self.donor.device)
            for name, value in options.items()
            if name in ("input_ids", "attention_mask", "position_ids", "inputs_embeds")
        }
        result = self.donor(*(_moved(value, self.donor.device) for value in arguments), **wanted)
        self.active = self.positions == "all" or (self.positions == "prompt") == (done == 0)
        if past is not None:
            self.cache = result[kept]
            self.length = self.cache.get_seq_length()


def _moved(value, device):
    return value.to(device) if torch.is_tensor(value) else value


def _key(source, neurons, how):
    """What a patch does to a model, for cache keys."""
    return [code_digest(__name__), source, neurons.digest(), how]
