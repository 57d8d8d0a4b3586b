"""Train an organism: a helpful-only base model, and what alignment makes of it."""

import os
import re
from contextlib import nullcontext

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import SequentialSampler
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    get_cosine_schedule_with_warmup,
)
from transformers.trainer_utils import get_last_checkpoint

from safetyneuron.neurons.deactivation import deactivate
from safetyneuron.neurons.sets import NeuronSet
from safetyneuron.organism.muon import Muon
from safetyneuron.organism.shipped import config_of
from safetyneuron.progress import TrainingLine
from safetyneuron.tuning.trainer import quiet_settings


def encode(tokenizer):
    """From an example to its token ids; the loss is taken on the answer only."""
    words = tokenizer.get_vocab()

    def ids(text):
        return [words[word] for word in re.sub(r"(?<=\d)(?=\d)", " ", text).split()]

    def encode_one(example):
        prompt = ids(f"<|user|> {example.prompt} <|end|> <|assistant|>")
        answer = ids(f"{example.answer} <|end|>")
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

    return encode_one


def new_model(size, tokenizer, seed):
    """An untrained model of a size."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config_of(size, tokenizer))


def inside_of(model):
    """The model whose neurons `TunedNeurons` holds, or the model itself."""
    (inside,) = getattr(model, "inside", (model,))
    return inside


class StreamTrainer(Trainer):
    """The trainer on a stream that is in order already, with logits only where the loss is taken."""

    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        """Mean cross entropy over the tokens of the answers."""
        inside = inside_of(model)
        labels = inputs.pop("labels")
        hidden = inside.get_decoder()(**inputs).last_hidden_state
        wanted = labels[:, 1:] >= 0
        return cross_entropy(inside.lm_head(hidden[:, :-1][wanted]), labels[:, 1:][wanted])


class SparingTrainer(StreamTrainer):
    """In every second update some random neurons are switched off, so that none of them alone is needed: as in large models."""

    SHARE = 0.02

    def training_step(self, model, inputs, *rest):
        """One update; which neurons are off depends on its number alone, so that a training can go on after a kill."""
        number = self.state.global_step
        with deactivate(model, _some(model, self.SHARE, number)) if number % 2 else nullcontext():
            return super().training_step(model, inputs, *rest)


def _some(model, share, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = NeuronSet.empty(model).shapes
    return NeuronSet(
        {p: torch.rand(shape, generator=generator) < share for p, shape in shapes.items()}
    )


def train_stream(
    kind, model, tokenizer, stream, schedule, folder, label, seed, callbacks=(), **attributes
):
    """Train on a stream, in place; goes on from the last checkpoint in `folder` if there is one.

    Parameters
    ----------
    kind : type
        Of `StreamTrainer`, which gets the further `attributes`.

    Returns
    -------
    list of (int, float)
        Update and loss.
    """
    settings = settings_of(inside_of(model), schedule, folder, seed)
    optimizer = _optimizer(model, schedule)
    decay = get_cosine_schedule_with_warmup(optimizer, settings["warmup_steps"], schedule.steps)
    trainer = kind(
        model=model,
        args=TrainingArguments(**settings),
        train_dataset=stream,
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        optimizers=(optimizer, decay),
        callbacks=[TrainingLine(label), *callbacks],
    )
    vars(trainer).update(attributes)
    return run_trainer(trainer, folder)


def _optimizer(model, schedule):
    """Muon for whole models; AdamW without decay where only some neurons train."""
    parameters = dict(model.named_parameters())
    if hasattr(model, "inside"):
        return torch.optim.AdamW(
            parameters.values(), schedule.rate, betas=(0.9, 0.98), weight_decay=0.0
        )
    matrices = {n: p for n, p in parameters.items() if p.dim() == 2 and "embed" not in n}
    return Muon(
        list(matrices.values()),
        [p for n, p in parameters.items() if n not in matrices],
        schedule.rate,
    )


def settings_of(model, schedule, folder, seed):
    """Settings of a training for transformers' and trl's trainers, which leaves checkpoints in the folder."""
    return quiet_settings(folder, model, seed) | dict(
        max_steps=schedule.steps,
        per_device_train_batch_size=schedule.batch,
        learning_rate=schedule.rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(100, schedule.steps // 5),
        logging_steps=50,
        save_strategy="steps",
        save_steps=max(1, schedule.steps // 10),
        save_total_limit=1,
    )


def run_trainer(trainer, folder):
    """Train to the end, from the last checkpoint in the folder if there is one; update and loss at every 50th update."""
    trainer.remove_callback(PrinterCallback)
    # Tied weights are in a checkpoint once: on the way back the trainer would warn of the other name.
    if tied := getattr(trainer.model, "_tied_weights_keys", None):
        trainer.model._keys_to_ignore_on_save = list(tied)
    trainer.train(
        resume_from_checkpoint=get_last_checkpoint(folder) if os.path.isdir(folder) else None
    )
    return [
        (row["step"], round(row["loss"], 4)) for row in trainer.state.log_history if "loss" in row
    ]
