"""SN-Tune: train only chosen rows and columns (Zhao et al. 2025, §3)."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safetyneuron.errors import SafetyNeuronError
from safetyneuron.neurons.architecture import COLUMN_PROJECTIONS, Architecture
from safetyneuron.neurons.deactivation import check_shapes
from safetyneuron.neurons.encoding import encode_documents
from safetyneuron.neurons.identity import changed, identity
from safetyneuron.neurons.sets import NeuronSet
from safetyneuron.neurons.undisturbed import undisturbed
from safetyneuron.neurons.weights import fingerprint, frozen
from safetyneuron.tuning.delta import NeuronDelta
from safetyneuron.tuning.trainer import check_schedule, train


class TunedNeurons(nn.Module):
    """The chosen rows and columns as the only parameters; the frozen model runs inside but is not part of it.

    So the trainer's gradients, optimiser state and checkpoints have the size of the chosen neurons. Use `added` to run it.
    """

    def __init__(self, model, neurons):
        super().__init__()
        self.inside = (model,)  # in a tuple, so that it is no submodule
        if hasattr(model, "hf_device_map"):  # the trainer then leaves every part where it is
            self.hf_device_map = model.hf_device_map
        self.places = {}
        architecture = Architecture(model)
        for projection, layer, channels in neurons.by_layer():
            self._add(architecture.place(layer, projection), projection, layer, channels)

    def _add(self, place, projection, layer, channels):
        weight = place.weight
        wide = torch.promote_types(
            weight.dtype, torch.float32
        )  # an update of 1e-6 is lost in half precision
        value = nn.Parameter(
            torch.zeros(len(channels), weight.shape[1], dtype=wide, device=weight.device)
        )
        self.register_parameter(f"{projection}_{layer}", value)
        self.places[projection, layer] = (place, channels.to(weight.device), value)

    def forward(self, input_ids, attention_mask, labels, **options):
        """The frozen model's own result; logits only where the loss is taken."""
        start = max(
            0, int((labels >= 0).any(0).nonzero()[0]) - 1
        )  # the first position whose next token counts
        options |= {"logits_to_keep": labels.shape[1] - start, "use_cache": False}
        device = self.inside[0].device
        tensors = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels[:, start:],
        }
        return self.inside[0](**{name: x.to(device) for name, x in tensors.items()}, **options)

    @contextmanager
    def added(self) -> Iterator["TunedNeurons"]:
        """The neurons' changes take part in the frozen model for the length of a `with` block."""
        model = self.inside[0]
        with frozen(model), changed(model, lambda: fingerprint(self)), ExitStack() as handles:
            for (projection, _), (place, channels, value) in self.places.items():
                add = _add_columns if projection in COLUMN_PROJECTIONS else _add_rows
                handle = place.module.register_forward_hook(
                    partial(add, channels + place.start, value)
                )
                handles.callback(handle.remove)
            yield self

    def values(self) -> dict[tuple[str, int], torch.Tensor]:
        """The changes by projection and layer, on the CPU."""
        return {key: value.detach().cpu().clone() for key, (_, _, value) in self.places.items()}


def _add_rows(channels, value, module, inputs, result):
    """Hook: the rows' share of a projection's result, in place, since its backward pass does not need the result."""
    return result.index_add_(-1, channels, inputs[0] @ value.to(inputs[0].dtype).T)


def _add_columns(channels, value, module, inputs, result):
    """Hook: the same for columns, which read some of the input's channels."""
    return result.add_(inputs[0].index_select(-1, channels) @ value.to(inputs[0].dtype))


def sn_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: list[dict[str, str]],
    neurons: NeuronSet,
    epochs: int = 1,
    learning_rate: float = 1e-6,
    batch_size: int = 8,
    accumulation: int = 1,
    warmup_steps: int = 0,
    seed: int = 0,
    folder: str | Path | None = None,
) -> NeuronDelta:
    """Train only `neurons` on `documents`; `model` is left as it was, to the last bit (Zhao et al. 2025, §3).

    Parameters
    ----------
    model, tokenizer : transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase
        Any dtype, also spread over devices.
    documents : list of dict
        `prompt` and `completion`, as from `load_documents`; the loss is taken on the completion.
    neurons : NeuronSet
        The rows and columns to train; biases stay.
    epochs, learning_rate : int, float
        The paper's values by default. AdamW without weight decay, linear decay of the rate, gradients clipped at 1.
    batch_size, accumulation, warmup_steps, seed : int
        Documents in a forward pass, passes in an update, updates while the rate rises from 0, order of the documents.
    folder : path, optional
        Where to write a checkpoint every 20 updates; one of the same training goes on from there to the same result.

    Returns
    -------
    NeuronDelta

    Raises
    ------
    SafetyNeuronError
        If the set is empty or of another model's shape, a document is empty or one-sided, the learning rate is not
        positive, the schedule makes no effective update, or the folder holds another training.
    """
    check_shapes(Architecture(model), neurons)
    if not len(neurons):
        raise SafetyNeuronError("the neuron set is empty: select at least one neuron to tune")
    schedule = dict(epochs=epochs, learning_rate=learning_rate, batch_size=batch_size)
    schedule |= dict(accumulation=accumulation, warmup_steps=warmup_steps)
    updates = check_schedule(len(documents), **schedule)
    schedule |= {"seed": seed}
    data, before = encode_documents(model, tokenizer, documents), fingerprint(model)
    task = [identity(model, tokenizer, __name__), neurons.digest()] if folder else []
    tuned, started = TunedNeurons(model, neurons), time.monotonic()
    with undisturbed(model), tuned.added():
        curve = train(tuned, tokenizer, data, folder, task, **schedule)
    facts = {"documents": len(documents), "effective_updates": updates, "curve": curve}
    facts |= schedule | {"seconds": time.monotonic() - started}
    return NeuronDelta(neurons, tuned.values(), before, facts)
