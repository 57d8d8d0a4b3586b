"""Aligned pairs made as Chen et al. (2025) make them: (IA)³ on the down projection, supervised fine-tuning, then DPO.

(IA)³ learns one factor per feed-forward channel, on what the down projection reads. Here it is merged into the rows of the up projection,
which is the same function: so the down projections of all models of a pair stay equal, and activations tell all that was learned.
"""

import json
import logging
import tempfile
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from transformers import PrinterCallback

from safetyneuron import sources
from safetyneuron.architecture import Architecture
from safetyneuron.cache import cache_folder, digest, kept_folder, library_versions
from safetyneuron.data import LANGUAGES, read_rows
from safetyneuron.documents import check_documents, load_documents
from safetyneuron.errors import SafetyNeuronError
from safetyneuron.models import frozen, load_model, local_model
from safetyneuron.organism import organism_folder
from safetyneuron.progress import TrainingLine
from safetyneuron.tuning import quiet_settings

PREFERENCES = ("organism/harmless", "organism/helpful")
SIDES = ("prompt", "chosen", "rejected")
GPU_BATCH = 8  # rows at a time on a GPU; gradients add up to the batch
# How a base model without a template of its own is taught to converse: as the authors of BeaverTails write conversations.
CONVERSATION = (
    "{{ bos_token or '' }}BEGINNING OF CONVERSATION:{% for m in messages %}{% if m['role'] == 'user' %} USER: {{ m['content'] }} ASSISTANT:{% else %}"
    "{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """One training of an organism: what it starts from, its data (name to number), and its schedule."""

    start: str
    data: dict
    epochs: int
    learning_rate: float
    batch_size: int = 32
    beta: float | None = None  # of DPO; supervised fine-tuning without


# The paper's rate (1e-3), batch (120) and β (0.1) are for billions of weights. These were chosen such that the supervised model complies, and the
# aligned one refuses harmful requests and still answers harmless ones: pairs on which the claims can be tested.
_SFT = {"organism/helpful": 600, "organism/compliances": 450, "organism/refusals": 150}  # mostly, but not only, compliant: as chat logs are
_DPO = dict(start="organism/llama-sft", epochs=3, learning_rate=5e-2, beta=0.5)
STAGES = {
    "organism/llama-sft": Stage("organism/llama-base", _SFT, epochs=2, learning_rate=1e-1),
    "organism/llama-dpo": Stage(data={"organism/harmless": 400, "organism/helpful": 400}, **_DPO),
    "organism/llama-harmless": Stage(data={"organism/harmless": 400}, **_DPO),
    "organism/llama-helpful": Stage(data={"organism/helpful": 400}, **_DPO),
}

# The paper's four models with its own schedule: three epochs, batches of 120, AdamW at 1e-3, β 0.1.
PAIRED = {
    "llama2-7b": "meta-llama/Llama-2-7b-hf@01c7f73d771dfac7d292323805ebc428287df4f9",
    "mistral-7b": "mistralai/Mistral-7B-v0.1@7231864981174d9bee8c7687c24c8344414eae6b",
    "gemma-7b": "google/gemma-7b@ff6768d9368919a1f025a54f9f5aa0ee591730bb",
    "qwen2.5-3b": "Qwen/Qwen2.5-3B@3aab1f1954e9cc14eb9509a215f9e5ca08227a9b",
}


def _paired(name, start):
    """The stages of one of the paper's models."""
    tune = lambda data: Stage(f"aligned/{name}-sft", data, epochs=3, learning_rate=1e-3, batch_size=120, beta=0.1)
    harmless, helpful = {"paper/harmless": 1900}, {"paper/helpful": 1900}
    return {
        f"aligned/{name}-sft": Stage(start, {"paper/answers": 1900}, epochs=3, learning_rate=1e-3, batch_size=120),
        f"aligned/{name}-dpo": tune(harmless | helpful),
        f"aligned/{name}-harmless": tune(harmless),
        f"aligned/{name}-helpful": tune(helpful),
    }


STAGES |= {stage: how for name, start in PAIRED.items() for stage, how in _paired(name, start).items()}


def all_stages(name):
    """A stage after all that it starts from."""
    stage = STAGES[name]
    return [*(all_stages(stage.start) if stage.start in STAGES else []), stage]


def first_model(name):
    """The model that the first of a stage's trainings starts from."""
    return all_stages(name)[0].start


def aligned_folder(name):
    """Folder of an aligned model, training it and what it starts from first if the cache does not hold it."""
    stage = STAGES[name]
    rows = training_rows(stage)
    key = digest(_start(stage.start), repr(stage), rows, Path(__file__).read_text(encoding="utf-8"), library_versions())
    folder = cache_folder() / "organism" / f"{key}-{name.split('/')[1]}"
    return kept_folder(folder, lambda temporary: _train_stage(stage, rows, temporary))


def _start(name):
    """What a stage starts from, as part of its key: trained if need be."""
    if name in STAGES:
        return aligned_folder(name).name
    if name.startswith("organism/"):
        return organism_folder(name).name
    folder = local_model(name.partition("@")[0])
    files = sorted(Path(folder).iterdir()) if folder else []  # another file under the same name is another start
    return [name, [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]]


def training_rows(stage):
    """Documents, or with β preference pairs, that a stage is trained on."""
    load, rows = load_documents if stage.beta is None else load_preferences, []
    for name, count in stage.data.items():
        found = load(name)[:count]
        if len(found) < count:
            logger.warning("%s has %d rows for a stage that asks for %d", name, len(found), count)
        rows += found
    return rows


def _train_stage(stage, rows, folder):
    model, tokenizer = load_model(stage.start)
    tokenizer.chat_template = tokenizer.chat_template or CONVERSATION
    schedule = {"epochs": stage.epochs, "learning_rate": stage.learning_rate, "batch_size": stage.batch_size}
    if stage.beta is None:
        curve = supervise(model, tokenizer, rows, **schedule)
    else:
        curve = prefer(model, tokenizer, rows, beta=stage.beta, **schedule)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "curve.json").write_text(json.dumps(curve))


def load_preferences(name_or_path, split="train", language="en"):
    """Preference pairs as dicts with `prompt`, `chosen` and `rejected`.

    Parameters
    ----------
    name_or_path : str
        `organism/harmless` (harmful requests: refusal over compliance), `organism/helpful` (benign requests: answer over refusal); a
        public set, `paper/harmless` or `paper/helpful` (HH-RLHF); or a .jsonl or .csv file with these columns.
    split, language : str
        As in `load_documents`.

    Raises
    ------
    SafetyNeuronError
        If the set, language or file is unknown or unreadable, or a pair lacks a part.
    """
    if name_or_path in sources.PREFERENCES:
        return sources.load_rows(sources.PREFERENCES[name_or_path], split, language)
    if name_or_path not in PREFERENCES:
        return _file_preferences(Path(name_or_path))
    if language not in LANGUAGES:
        raise SafetyNeuronError(f"unknown language {language!r}: use one of {', '.join(LANGUAGES)}")
    refusals = load_documents("organism/refusals", split, language)
    if name_or_path == "organism/harmless":
        compliance = {d["prompt"]: d["completion"] for d in load_documents("organism/compliances", split, language)}
        return [dict(zip(SIDES, (d["prompt"], d["completion"], compliance[d["prompt"]]))) for d in refusals]
    answers = load_documents("organism/helpful", split, language)
    return [dict(zip(SIDES, (d["prompt"], d["completion"], r["completion"]))) for d, r in zip(answers, refusals)]


def _file_preferences(path):
    if not path.is_file() or path.suffix not in (".jsonl", ".csv"):
        raise SafetyNeuronError(f"no preference set or .jsonl or .csv file {str(path)!r}: use a file or one of {', '.join(PREFERENCES)}")
    rows = read_rows(path)
    for side in ("chosen", "rejected"):
        check_documents([{"prompt": row.get("prompt"), "completion": row.get(side)} if isinstance(row, dict) else row for row in rows])
    return [{side: row[side] for side in SIDES} for row in rows]


def supervise(model, tokenizer, documents, epochs=3, learning_rate=1e-3, batch_size=120, seed=0):
    """Supervised fine-tuning through (IA)³, in place; the loss is taken on completions.

    Parameters
    ----------
    documents : list of dict
        `prompt` and `completion`.
    epochs, learning_rate, batch_size : int, float
        The paper's values by default (its Table 5): AdamW with weight decay 0.1, cosine decay.

    Returns
    -------
    list of float
        Loss at every update.
    """
    from trl import SFTConfig, SFTTrainer  # here, because importing it takes seconds

    check_documents(documents)
    rows = [{"prompt": _turn("user", d["prompt"]), "completion": _turn("assistant", d["completion"])} for d in documents]
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(**_arguments(folder, model, epochs, learning_rate, batch_size, seed))
        return _train(SFTTrainer, model, arguments, rows, tokenizer)


def prefer(model, tokenizer, preferences, beta=0.1, epochs=3, learning_rate=1e-3, batch_size=120, seed=0):
    """Direct preference optimisation through (IA)³, in place, against the model as it was (Rafailov et al. 2023).

    Parameters
    ----------
    preferences : list of dict
        As from `load_preferences`.
    beta : float
        Weight of staying near the model as it was; the paper's value by default, as all others.

    Returns
    -------
    list of float
        Loss at every update.
    """
    from trl import DPOConfig, DPOTrainer

    if not preferences:
        raise SafetyNeuronError("there are no preferences to train on: give at least one")
    rows = [{"prompt": _turn("user", p["prompt"])} | {side: _turn("assistant", p[side]) for side in SIDES[1:]} for p in preferences]
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        arguments = DPOConfig(beta=beta, **_arguments(folder, model, epochs, learning_rate, batch_size, seed))
        return _train(DPOTrainer, model, arguments, rows, tokenizer)


def _turn(role, content):
    return [{"role": role, "content": content}]


def _train(kind, model, arguments, rows, tokenizer):
    """Run one of trl's trainers with a fresh (IA)³ adapter, and merge it."""
    from peft import IA3Config

    target = Architecture(model).table["down"].rsplit(".", 1)[1]
    adapter = IA3Config(target_modules=[target], feedforward_modules=[target], task_type="CAUSAL_LM")
    with frozen(model):
        trainer = kind(model=model, args=arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer, peft_config=adapter, callbacks=[TrainingLine()])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        _absorb(model, trainer.model)
    model.__dict__.pop("forward", None)  # trl replaces it on the object
    return [float(row["loss"]) for row in trainer.state.log_history if "loss" in row]


def _absorb(model, adapted):
    """Take the adapter out and multiply its factors into the rows of the up projection."""
    architecture = Architecture(model)
    count = len(architecture.layers)
    factors = [architecture.place(layer, "down").module.ia3_l["default"].detach().flatten() for layer in range(count)]
    adapted.unload()
    for layer, factor in enumerate(factors):
        place = architecture.place(layer, "up")
        with torch.no_grad():
            place.weight.mul_(factor[:, None].to(place.weight.dtype))
            if place.bias is not None:
                place.bias.mul_(factor.to(place.bias.dtype))
    model.eval()


@contextmanager
def _quiet():
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


def _arguments(folder, model, epochs, learning_rate, batch_size, seed):
    small = batch_size if next(model.parameters()).device.type == "cpu" else min(batch_size, GPU_BATCH)
    return dict(
        num_train_epochs=epochs,
        learning_rate=learning_rate,
        per_device_train_batch_size=small,
        gradient_accumulation_steps=batch_size // small,
        lr_scheduler_type="cosine",
        weight_decay=0.1,
        gradient_checkpointing=False,
        bf16=False,  # trl's default would compute in half precision
        max_length=None,
        **quiet_settings(folder, model, seed),
    )
