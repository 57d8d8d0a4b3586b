"""Circuit breakers (Zou et al. 2024): low-rank adapters that turn harmful states away from what they were; Circ-Break in Tables 2 and 3."""

import math
import random
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import cosine_similarity
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer

from safetyneuron.errors import SafetyNeuronError
from safetyneuron.neurons.architecture import Architecture
from safetyneuron.neurons.encoding import encode_documents, pad
from safetyneuron.neurons.files import read_tensors, write_tensors
from safetyneuron.neurons.undisturbed import quick_collection, undisturbed
from safetyneuron.neurons.weights import fingerprint, frozen
from safetyneuron.progress import TrainingLine
from safetyneuron.tuning.trainer import OneDevice, quiet_settings

TARGETS = (
    10 / 32,
    20 / 32,
)  # depths at which harmful states are turned away: layers 10 and 20 of 32 in the original
RANK, ALPHA, DROPOUT = 16, 16, 0.05
START = 1e-3  # standard deviation of the adapters' output weights before training
LARGE = 10**8  # weights, from which on memory counts for more than time


def target_layers(count: int) -> list[int]:
    """The target layers of a model with `count` layers, counted from 1."""
    return sorted({max(1, round(depth * count)) for depth in TARGETS})


def adapted_layers(count: int) -> list[int]:
    """Layers, from 0, that get adapters: up to the last target, which counts from 1, and one more, as in the original (21 of 32)."""
    return list(range(min(target_layers(count)[-1] + 1, count)))


def coefficients(step: int, steps: int, strength: float) -> tuple[float, float]:
    """Weights of the rerouting and the retain loss at a step: strength · (1 − t/2T) and strength · t/2T."""
    progress = step / (2 * steps)
    return strength * (1 - progress), strength * progress


def rerouting_loss(
    states: torch.Tensor, original: torch.Tensor, real: torch.Tensor
) -> torch.Tensor:
    """Mean over layers and real positions of ReLU(cos(h, h_original)), in float32; states (layers, B, n, D), real (B, n)."""
    similarity = cosine_similarity(states.float(), original.float(), dim=-1).relu()
    return similarity[:, real].mean()


def retain_loss(states: torch.Tensor, original: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Mean over layers and real positions of ‖h − h_original‖, in float32; states (layers, B, n, D), real (B, n)."""
    return torch.linalg.vector_norm((states.float() - original.float())[:, real], dim=-1).mean()


class CircuitBreaker:
    """The adapters of one model; the model itself stays as it was.

    >>> with circuit_break(model, tokenizer, harmful, retain).attached(model):
    ...     attack_success_rate(model, tokenizer, prompts)

    Attributes
    ----------
    tensors : dict of str to torch.Tensor
        The adapters' weights by name.
    model : str
        Fingerprint of the model they were trained on.
    facts : dict
        What the training was: seconds, and a curve of {step, rerouting, retain}, both losses without their coefficients.
    """

    def __init__(self, tensors, model, facts):
        self.tensors, self.model, self.facts = tensors, model, facts

    @property
    def parameters(self) -> int:
        """Number of trained parameters."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @contextmanager
    def attached(self, model: PreTrainedModel) -> Iterator[PreTrainedModel]:
        """The defended model for the length of a `with` block.

        Raises
        ------
        SafetyNeuronError
            If the adapters were trained on another model.
        """
        from peft import set_peft_model_state_dict

        if fingerprint(model) != self.model:
            raise SafetyNeuronError(
                "these adapters were trained on another model, or on other weights or another dtype of it: load the model they were trained on"
            )
        with _adapted(model, seed=0) as adapted:
            set_peft_model_state_dict(adapted, self.tensors)
            model.eval()
            yield model

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with the adapters and the model's fingerprint."""
        facts = {"model": self.model, "facts": self.facts}
        write_tensors(path, "circuit breaker", self.tensors, facts)

    @classmethod
    def load(cls, path: str | Path) -> "CircuitBreaker":
        """Read a file written by `save`."""
        cure = "write it again with CircuitBreaker.save"
        with read_tensors(path, "circuit breaker", cure) as (tensors, facts):
            return cls(tensors, facts["model"], facts["facts"])


def circuit_break(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    harmful: list[dict[str, str]],
    retain: list[dict[str, str]],
    steps: int = 150,
    learning_rate: float = 1e-4,
    batch_size: int = 16,
    strength: float = 10.0,
    seed: int = 0,
    half: bool = False,
) -> CircuitBreaker:
    """Train adapters that turn the states on harmful documents away from what they were and keep all others (Zou et al. 2024).

    Unlike the original's, their output weights start at random numbers of `START`, not at zero, where neither loss has a slope.

    Parameters
    ----------
    harmful, retain : list of dict
        `prompt` and `completion`: harmful requests with the answers to make impossible, and what is to stay as it is.
    steps, learning_rate, batch_size, strength : int, float
        The original's values: 150, 1e-4, 16 documents of each kind, and 10 for Llama (5 for Mistral). The rate falls to 0 linearly.
    half : bool, optional
        Compute in bfloat16 (autocast), as the original does; adapters keep the precision of the weights.

    Returns
    -------
    CircuitBreaker

    Raises
    ------
    SafetyNeuronError
        If a number is not positive, a document is empty, one-sided or longer than the context, or the training diverges.
    """
    _check_positive(
        steps=steps, learning_rate=learning_rate, batch_size=batch_size, strength=strength
    )
    encoded = [
        [row["input_ids"] for row in encode_documents(model, tokenizer, documents)]
        for documents in (harmful, retain)
    ]
    before, started = fingerprint(model), time.monotonic()
    with _adapted(model, seed) as adapted, tempfile.TemporaryDirectory() as folder:
        _leave_plateau(adapted)
        trainer = _Rerouting(
            target_layers(model.config.get_text_config().num_hidden_layers),
            strength,
            model=adapted,
            args=_arguments(folder, model, steps, learning_rate, batch_size, seed, half),
            train_dataset=_pairs(*encoded, steps * batch_size, seed),
            data_collator=lambda rows: _collate(rows, tokenizer),
            callbacks=[TrainingLine()],
        )
        trainer.remove_callback(PrinterCallback)
        with _computed_twice(model), quick_collection(model):
            trainer.train()
        tensors = _adapter_weights(adapted)
    facts = {"seconds": time.monotonic() - started, "curve": trainer.curve}
    return CircuitBreaker(tensors, before, facts)


def _check_positive(**numbers):
    for name, value in numbers.items():
        if not value > 0 or math.isinf(value):
            raise SafetyNeuronError(f"{name} is {value}: it must be a positive number")


@contextmanager
def _adapted(model, seed):
    """`model` with fresh adapters for the length of a `with` block (peft changes it in place)."""
    from peft import LoraConfig, get_peft_model  # here, because importing it takes seconds

    layers = adapted_layers(model.config.get_text_config().num_hidden_layers)
    targets = {"target_modules": Architecture(model).module_names(), "layers_to_transform": layers}
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, task_type="CAUSAL_LM", **targets
    )
    with undisturbed(model), frozen(model):
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", FutureWarning
            )  # peft reads an attribute that transformers renames
            adapted = get_peft_model(model, config)
        try:
            yield adapted
        finally:
            adapted.unload()


def _leave_plateau(adapted):
    """Small random output weights in place of zeros.

    Where adapters change nothing, both losses are flat: rounding would point the first updates, and another processor would train another defence.
    """
    for name, weights in adapted.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(weights, std=START)


@contextmanager
def _computed_twice(model):
    """Layers of a large model are computed again for their gradients, as transformers' layers can, for the length of a `with` block: kept, they fill a GPU."""
    again = {
        "gradient_checkpointing": True,
        "_gradient_checkpointing_func": partial(checkpoint, use_reentrant=False),
    }
    large = sum(p.numel() for p in model.parameters()) > LARGE
    layers = Architecture(model).layers if large else []
    before = [
        {name: vars(layer)[name] for name in again if name in vars(layer)} for layer in layers
    ]
    try:
        for layer in layers:
            vars(layer).update(again)
        yield
    finally:
        for layer, found in zip(layers, before):
            for name in again:
                vars(layer).pop(name, None)
            vars(layer).update(found)


def _adapter_weights(adapted):
    """What the training made of the adapters; refused where it diverged."""
    from peft import get_peft_model_state_dict

    tensors = {
        name: tensor.detach().cpu().clone().contiguous()
        for name, tensor in get_peft_model_state_dict(adapted).items()
    }
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise SafetyNeuronError(
            "the adapters hold numbers that are not finite: lower the learning rate or load the model in a wider dtype"
        )
    return tensors


def _pairs(harmful, retain, count, seed):
    """`count` pairs of token ids, each kind in random order and again from its start when it runs out."""
    draw = random.Random(seed)

    def order(rows):
        return [
            row for _ in range(math.ceil(count / len(rows))) for row in draw.sample(rows, len(rows))
        ]

    return [
        {"harmful": h, "retain": r} for h, r in zip(order(harmful)[:count], order(retain)[:count])
    ]


def _collate(rows, tokenizer):
    """One batch: the harmful documents, then those to retain."""
    return pad([row["harmful"] for row in rows] + [row["retain"] for row in rows], tokenizer, "cpu")


class _Rerouting(Trainer):
    """Both losses with their schedule; the original states come from the same model with its adapters switched off."""

    def __init__(self, layers, strength, **options):
        super().__init__(**options)
        self.layers, self.strength, self.curve = layers, strength, []

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of one batch."""
        real = inputs["attention_mask"].bool()
        with torch.no_grad(), model.disable_adapter():
            original = _states(model, inputs, self.layers)
        states = _states(model, inputs, self.layers)
        harmful, others = real.chunk(2)
        reroute = rerouting_loss(states[0], original[0], harmful)
        retain = retain_loss(states[1], original[1], others)
        step = self.state.global_step
        self.curve.append(
            {
                "step": step + 1,
                "rerouting": float(reroute.detach()),
                "retain": float(retain.detach()),
            }
        )
        weights = coefficients(step, self.state.max_steps, self.strength)
        return weights[0] * reroute + weights[1] * retain


def _states(model, inputs, layers):
    """Residual stream of a batch's harmful half after the target layers, and of its other half before the first and after every layer: (layers, B / 2, n, D) each."""
    found = model(
        **inputs, output_hidden_states=True, use_cache=False, logits_to_keep=1
    ).hidden_states
    harmful, others = zip(*(states.chunk(2) for states in found))
    return torch.stack([harmful[layer] for layer in layers]), torch.stack(others)


def _arguments(folder, model, steps, learning_rate, batch_size, seed, half):
    return OneDevice(
        max_steps=steps,
        learning_rate=learning_rate,
        per_device_train_batch_size=batch_size,
        lr_scheduler_type="linear",
        weight_decay=0.0,
        remove_unused_columns=False,
        bf16=half,
        **quiet_settings(folder, model, seed),
    )
