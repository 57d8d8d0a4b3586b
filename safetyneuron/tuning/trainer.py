"""One trainer for every training of the project, and the fine-tuning that SN-Tune is compared with (Zhao et al. 2025, §4)."""

import copy
import json
import math
import shutil
import tempfile
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    get_scheduler,
)
from transformers.trainer_utils import get_last_checkpoint

from safetyneuron.cache import digest
from safetyneuron.errors import SafetyNeuronError
from safetyneuron.neurons.architecture import Architecture
from safetyneuron.neurons.encoding import encode_documents
from safetyneuron.neurons.placement import aside
from safetyneuron.neurons.undisturbed import own_randomness, quick_collection
from safetyneuron.progress import TrainingLine

SCHEDULE = "linear"


def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: list[dict[str, str]],
    lora_rank: int | None = None,
    epochs: int = 1,
    learning_rate: float = 1e-4,
    batch_size: int = 8,
    seed: int = 0,
    optimizer: str = "adamw_torch_fused",
    half: bool = False,
) -> PreTrainedModel:
    """A copy of `model` trained on `documents` in all its weights, or through LoRA on every projection.

    This is the downstream fine-tuning of §4, not a defence. Meanwhile a model on a GPU makes room for its copy in main memory.

    Parameters
    ----------
    lora_rank : int, optional
        Rank of the adapters (scaled by α = 2 rank, merged afterwards); all weights train without it.
    optimizer : str, optional
        As transformers names it. "adafactor" keeps no moments of the size of the model.
    half : bool, optional
        Compute in bfloat16 (autocast); the weights and their updates keep their precision.

    Returns
    -------
    transformers.PreTrainedModel

    Raises
    ------
    SafetyNeuronError
        As `sn_tune`, or if the rank is not positive.
    """
    if lora_rank is not None and lora_rank < 1:
        raise SafetyNeuronError(f"lora_rank is {lora_rank}: it must be at least 1")
    check_schedule(len(documents), epochs, learning_rate, batch_size, 1, 0)
    data, tuned = encode_documents(model, tokenizer, documents), copy.deepcopy(model)
    if lora_rank:
        tuned = with_lora(tuned, lora_rank, seed)
    with aside(model):
        train(
            tuned,
            tokenizer,
            data,
            None,
            [],
            epochs=epochs,
            learning_rate=learning_rate,
            batch_size=batch_size,
            accumulation=1,
            warmup_steps=0,
            seed=seed,
            optim=optimizer,
            bf16=half,
        )
    return (tuned.merge_and_unload() if lora_rank else tuned).eval()


def with_lora(model: PreTrainedModel, rank: int, seed: int = 0):
    """The model with a LoRA adapter of that rank on every projection (peft)."""
    from peft import LoraConfig, get_peft_model  # here, because importing it takes seconds

    with own_randomness(), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # peft reads an attribute that transformers renames
        return get_peft_model(
            model,
            LoraConfig(
                r=rank,
                lora_alpha=2 * rank,
                target_modules=Architecture(model).module_names(),
                task_type="CAUSAL_LM",
            ),
        )


def check_schedule(
    documents: int,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    accumulation: int,
    warmup_steps: int,
) -> int:
    """Number of effective updates; refuses a schedule without any."""
    if not learning_rate > 0 or math.isinf(learning_rate):
        raise SafetyNeuronError(
            f"learning_rate is {learning_rate}: it must be a positive number, for example 1e-6"
        )
    for name, value, least in (
        ("epochs", epochs, 1),
        ("batch_size", batch_size, 1),
        ("accumulation", accumulation, 1),
        ("warmup_steps", warmup_steps, 0),
    ):
        if value < least:
            raise SafetyNeuronError(f"{name} is {value}: it must be at least {least}")
    rates = learning_rates(documents, epochs, learning_rate, batch_size, accumulation, warmup_steps)
    if documents and not any(rates):
        raise SafetyNeuronError(
            f"{documents} documents make {len(rates)} update at learning rate 0: lower batch_size × accumulation ({batch_size * accumulation}) or warmup_steps ({warmup_steps})"
        )
    return sum(rate > 0 for rate in rates)


def learning_rates(
    documents: int,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    accumulation: int,
    warmup_steps: int,
) -> list[float]:
    """The learning rate of every update that the trainer will make."""
    updates = epochs * math.ceil(math.ceil(documents / batch_size) / accumulation)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=learning_rate)
    scheduler, rates = get_scheduler(SCHEDULE, optimizer, warmup_steps, updates), []
    for _ in range(updates):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


def train(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: list[dict[str, list[int]]],
    folder: str | Path | None,
    identity: list,
    **schedule,
) -> list[dict[str, float]]:
    """Run the Hugging Face trainer over encoded documents and return the loss curve: a list of {step, loss, learning_rate}."""
    with tempfile.TemporaryDirectory() if folder is None else nullcontext(folder) as place:
        checkpoint = _checkpoint(Path(place), digest(identity, data, schedule)) if folder else None
        with own_randomness(), quick_collection(model):  # the trainer seeds every generator
            trainer = Trainer(
                model=model,
                args=_arguments(place, model, folder is not None, **schedule),
                train_dataset=data,
                data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
                callbacks=[TrainingLine()],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train(resume_from_checkpoint=checkpoint)
    curve = [
        {k: row[k] for k in ("step", "loss", "learning_rate")}
        for row in trainer.state.log_history
        if "loss" in row
    ]
    for row in curve:
        if not math.isfinite(row["loss"]):
            raise SafetyNeuronError(
                f"the loss of update {row['step']} is {row['loss']}: lower the learning rate or load the model in a wider dtype"
            )
    return curve


def _checkpoint(folder, task):
    """The last whole checkpoint of this training in the folder, if any; refuses the folder of another."""
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "training.json"
    if note.exists() and json.loads(note.read_text())["task"] != task:
        raise SafetyNeuronError(
            f"folder {folder} holds another training: remove it or name another folder"
        )
    note.write_text(json.dumps({"task": task}))
    while (last := get_last_checkpoint(folder)) and not (
        Path(last) / "trainer_state.json"
    ).exists():
        shutil.rmtree(last)  # the trainer writes that file last: this one was cut short
    return last


class OneDevice(TrainingArguments):
    """The trainer leaves the model where it lies and makes no copies of it on other GPUs."""

    @property
    def n_gpu(self) -> int:
        """One even where there are more, so that the batch size is what was asked for."""
        return min(1, super().n_gpu)

    @property
    def place_model_on_device(self) -> bool:
        """Never."""
        return False


def quiet_settings(folder: str | Path, model: nn.Module, seed: int) -> dict:
    """What every training of this package asks of the trainer: a logged loss for each update, no bars, no reports, no files of its own."""
    return dict(
        output_dir=str(folder),
        seed=seed,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=next(model.parameters()).device.type == "cpu",
    )


def _arguments(
    folder,
    model,
    keep,
    epochs,
    learning_rate,
    batch_size,
    accumulation,
    warmup_steps,
    seed,
    **others,
):
    checkpoints = (
        {"save_strategy": "steps", "save_steps": 20, "save_total_limit": 2} if keep else {}
    )
    return OneDevice(
        num_train_epochs=epochs,
        learning_rate=learning_rate,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        warmup_steps=warmup_steps,
        lr_scheduler_type=SCHEDULE,
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_nan_inf_filter=False,  # it would show such a loss as 0
        **quiet_settings(folder, model, seed) | checkpoints | others,
    )
