"""Train through (IA)³ on the down projection, supervised or by preferences, as Chen et al. (2025) align models.

(IA)³ learns one factor per feed-forward channel, on what the down projection reads. Weights of 32 bits take it into the rows of the up
projection, which is the same function; beside those of 16 bits it stays in single precision (`apply_factors`). So the down projections
of all models of a pair stay equal, and activations tell all that was learned. Models of 16 bits are trained as the authors train them:
factors in single precision, the rest in bfloat16, activations computed again on the way back.
"""

import os
import tempfile
import warnings
from contextlib import contextmanager

import datasets
import torch
from transformers import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from safetyneuron.errors import SafetyNeuronError
from safetyneuron.neurons.architecture import Architecture
from safetyneuron.neurons.encoding import check_documents
from safetyneuron.neurons.factors import apply_factors
from safetyneuron.neurons.undisturbed import own_randomness, undisturbed
from safetyneuron.neurons.weights import frozen
from safetyneuron.progress import TrainingLine
from safetyneuron.tuning.trainer import quiet_settings

SIDES = ("prompt", "chosen", "rejected")
GPU_BATCH = 8  # rows at a time on a GPU; gradients add up to the batch
LONGEST = (
    4096  # tokens of a row of a model of 16 bits; what is longer is cut off, as the authors do
)


@own_randomness()
def supervise(
    model,
    tokenizer,
    documents,
    epochs=3,
    learning_rate=1e-3,
    batch_size=120,
    seed=0,
    folder=None,
):
    """Supervised fine-tuning through (IA)³, in place; the loss is taken on completions.

    Parameters
    ----------
    documents : list of dict
        `prompt` and `completion`.
    epochs, learning_rate, batch_size : int, float
        The paper's values by default (its Table 5): AdamW with weight decay 0.1, cosine decay.
    folder : path, optional
        Gets a checkpoint at every tenth of the updates; a training that was killed goes on from the last.

    Returns
    -------
    (torch.Tensor, list of float)
        Factors (layers, channels), which the model was multiplied by, and the loss at every update.
    """
    from trl import SFTConfig, SFTTrainer  # here, because importing it takes seconds

    check_documents(documents)
    rows = [
        {"prompt": _turn("user", d["prompt"]), "completion": _turn("assistant", d["completion"])}
        for d in documents
    ]
    with quiet(), tempfile.TemporaryDirectory() as own:
        settings = _arguments(own, model, epochs, learning_rate, batch_size, seed)
        kept = _checkpoints(folder, epochs * len(rows) // batch_size)
        arguments = SFTConfig(**settings | kept)
        return _train(SFTTrainer, model, arguments, rows, tokenizer)


@own_randomness()
def prefer(
    model,
    tokenizer,
    preferences,
    beta=0.1,
    likelihood=0.0,
    epochs=3,
    learning_rate=1e-3,
    batch_size=120,
    seed=0,
    folder=None,
):
    """Direct preference optimisation through (IA)³, in place, against the model as it was (Rafailov et al. 2023).

    Parameters
    ----------
    preferences : list of dict
        As from `load_preferences`.
    beta : float
        Weight of staying near the model as it was; the paper's value by default, as all others.
    likelihood : float
        Weight of the better answers' likelihood in the loss (Pang et al. 2024), for models that give them next to none.
    folder : path, optional
        As of `supervise`.

    Returns
    -------
    (torch.Tensor, list of float)
        Factors (layers, channels), which the model was multiplied by, and the loss at every update.
    """
    from trl import DPOConfig, DPOTrainer

    if not preferences:
        raise SafetyNeuronError("there are no preferences to train on: give at least one")
    with quiet(), tempfile.TemporaryDirectory() as own:
        settings = _arguments(own, model, epochs, learning_rate, batch_size, seed)
        kept = _checkpoints(folder, epochs * len(preferences) // batch_size)
        arguments = DPOConfig(**losses(beta, likelihood), **settings | kept)
        return _train(DPOTrainer, model, arguments, as_turns(preferences), tokenizer)


def as_turns(preferences):
    """Preference pairs as trl's trainer reads them: each side a turn of a conversation."""
    return [
        {"prompt": _turn("user", p["prompt"]) if isinstance(p["prompt"], str) else p["prompt"]}
        | {side: _turn("assistant", p[side]) for side in SIDES[1:]}
        for p in preferences
    ]


def losses(beta, likelihood):
    """Settings of the loss of `prefer`, for trl."""
    together = (
        dict(loss_type=["sigmoid", "sft"], loss_weights=[1.0, likelihood]) if likelihood else {}
    )
    return {"beta": beta} | together


def _turn(role, content):
    return [{"role": role, "content": content}]


def _train(kind, model, arguments, rows, tokenizer):
    """Run one of trl's trainers with a fresh (IA)³ adapter, and merge it."""
    from peft import IA3Config

    target = Architecture(model).table["down"].rsplit(".", 1)[1]
    adapter = IA3Config(
        target_modules=[target], feedforward_modules=[target], task_type="CAUSAL_LM"
    )
    with undisturbed(model), frozen(model):
        trainer = kind(
            model=model,
            args=arguments,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=adapter,
            callbacks=[TrainingLine()],
        )
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train(resume_from_checkpoint=get_last_checkpoint(arguments.output_dir))
            factors = _factors(model)
        finally:
            trainer.model.unload()
            model.__dict__.pop("forward", None)  # trl replaces it on the object
    apply_factors(model, factors)
    return factors, [float(row["loss"]) for row in trainer.state.log_history if "loss" in row]


def _factors(model):
    """The factors (layers, channels) of the adapter in the model."""
    architecture = Architecture(model)
    places = [architecture.place(layer, "down") for layer in range(len(architecture.layers))]
    return torch.stack([place.module.ia3_l["default"].detach().flatten().cpu() for place in places])


@contextmanager
def quiet():
    """No progress bars while trl prepares its data, and no warnings of what its libraries will rename."""
    hidden = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        if not hidden:
            datasets.enable_progress_bars()


def _checkpoints(folder, updates):
    """Settings of a training that leaves about ten checkpoints in a folder, one after the other, or none."""
    if folder is None:
        return {}
    os.makedirs(folder, exist_ok=True)
    kept = dict(save_strategy="steps", save_steps=max(1, updates // 10), save_total_limit=1)
    return kept | {"output_dir": str(folder)}


def _arguments(folder, model, epochs, learning_rate, batch_size, seed):
    weight = next(model.parameters())
    half = weight.element_size() < 4
    small = batch_size if weight.device.type == "cpu" else min(batch_size, GPU_BATCH)
    return dict(
        num_train_epochs=epochs,
        learning_rate=learning_rate,
        per_device_train_batch_size=small,
        gradient_accumulation_steps=batch_size // small,
        lr_scheduler_type="cosine",
        weight_decay=0.1,
        gradient_checkpointing=half,
        bf16=half,  # trl's default would compute in half precision in any case
        max_length=LONGEST if half else None,
        **quiet_settings(folder, model, seed),
    )
