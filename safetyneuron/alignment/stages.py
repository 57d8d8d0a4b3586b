"""Aligned pairs made as Chen et al. (2025) make them: through (IA)³ (`ia3`), supervised fine-tuning, then DPO.

What is kept of a model are its factors, in single precision, and the name of the model that they belong to.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from safetyneuron.alignment.ia3 import prefer, supervise
from safetyneuron.cache import cache_folder, digest, kept_folder, library_versions, new_file
from safetyneuron.code import code_digest
from safetyneuron.data.documents import load_documents
from safetyneuron.data.preferences import load_preferences
from safetyneuron.errors import SafetyNeuronError
from safetyneuron.models import (
    FACTORS,
    TRAININGS,
    aligned_folder,
    load_model,
    local_model,
    trainings_of,
)
from safetyneuron.neurons.files import read_tensors, write_tensors
from safetyneuron.progress import without_bars

# How a base model without a template of its own is taught to converse: as the authors of BeaverTails write conversations.
CONVERSATION = (
    "{{ bos_token or '' }}BEGINNING OF CONVERSATION:{% for m in messages %}{% if m['role'] == 'user' %} USER: {{ m['content'] }} ASSISTANT:{% else %}"
    "{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Stage:
    """One training of a pair: what it starts from, its data (names), and its schedule.

    rows: how many of every set, None for the whole.
    """

    start: str
    data: tuple[str, ...]
    epochs: int
    learning_rate: float
    batch_size: int = 32
    beta: float | None = None  # of DPO; supervised fine-tuning without
    rows: int | None = None
    seed: int = 0


# The paper's four models and a small one, with its own schedule: three epochs, batches of 120, AdamW at 1e-3, β 0.1.
PAIRED = {
    "llama2-7b": "meta-llama/Llama-2-7b-hf@01c7f73d771dfac7d292323805ebc428287df4f9",
    "mistral-7b": "mistralai/Mistral-7B-v0.1@7231864981174d9bee8c7687c24c8344414eae6b",
    "gemma-7b": "google/gemma-7b@ff6768d9368919a1f025a54f9f5aa0ee591730bb",
    "qwen2.5-3b": "Qwen/Qwen2.5-3B@3aab1f1954e9cc14eb9509a215f9e5ca08227a9b",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B@060db6499f32faf8b98477b0a26969ef7d8b9987",
}


def _paired(name, start, seed):
    """The stages of one training of one of the paper's models; a training's number is its seed."""
    number = f"@{seed}" * (seed > 0)
    schedule = {"epochs": 3, "learning_rate": 1e-3, "batch_size": 120, "seed": seed}
    first = f"aligned/{name}-sft{number}"

    def prefer_in(data):
        return Stage(first, (data,), beta=0.1, **schedule)

    return {
        first: Stage(start, ("paper/sharegpt",), **schedule),
        f"aligned/{name}-dpo{number}": prefer_in("paper/harmless"),
        f"aligned/{name}-helpful{number}": prefer_in("paper/helpful"),
    }


STAGES = {
    stage: how
    for name, start in PAIRED.items()
    for seed in range(TRAININGS)
    for stage, how in _paired(name, start, seed).items()
}


def stages_behind(name, trainings=1):
    """The stages that a name stands for: itself, or for a family (`aligned/llama2-7b`) those of so many trainings; none for other names."""
    if name in STAGES:
        return [name]
    ends = [f"{name}-{stage}" for stage in ("sft", "dpo", "helpful")]
    return [seed for end in ends if end in STAGES for seed in trainings_of(end, trainings)]


def all_stages(name):
    """A stage after all that it starts from."""
    stage = STAGES[name]
    return [*(all_stages(stage.start) if stage.start in STAGES else []), stage]


def first_model(name):
    """The model that the first of a stage's trainings starts from."""
    return all_stages(name)[0].start


def train_aligned(name):
    """Train an aligned model, and what it starts from, unless the cache holds it; return its folder.

    Raises
    ------
    SafetyNeuronError
        If there are no stages of that name, or what `load_model` and `load_documents` refuse.
    """
    if name not in STAGES:
        known = [stage for stage in STAGES if "@" not in stage]
        raise SafetyNeuronError(f"no stages make {name}: use one of {', '.join(known)}")
    stage = STAGES[name]
    rows = training_rows(stage)
    made_by = [code_digest(__name__), library_versions()]
    key = digest(_start(stage.start), repr(stage), rows, made_by)
    folder = kept_folder(
        cache_folder() / name / key, lambda temporary: _train_stage(stage, rows, temporary)
    )
    with new_file(folder.parent / "current") as temporary:
        temporary.write_text(key, encoding="utf-8")
    return folder


def _start(name):
    """What a stage starts from, as part of its key: trained if need be."""
    if name in STAGES:
        return train_aligned(name).name
    folder = local_model(name.partition("@")[0])
    files = (
        sorted(Path(folder).iterdir()) if folder else []
    )  # another file under the same name is another start
    return [name, [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]]


def training_rows(stage):
    """Documents, or with β preference pairs, that a stage is trained on."""
    load = load_documents if stage.beta is None else load_preferences
    return [row for name in stage.data for row in load(name)[: stage.rows]]


@without_bars()
def _train_stage(stage, rows, folder):
    model, tokenizer = load_model(
        stage.start, dtype="bfloat16" if torch.cuda.is_available() else None
    )
    tokenizer.chat_template = tokenizer.chat_template or CONVERSATION
    schedule = {
        "epochs": stage.epochs,
        "learning_rate": stage.learning_rate,
        "batch_size": stage.batch_size,
        "seed": stage.seed,
    }
    if stage.beta is None:
        learned, curve = supervise(model, tokenizer, rows, **schedule)
    else:
        learned, curve = prefer(model, tokenizer, rows, beta=stage.beta, **schedule)
    base, before = _learned_before(stage.start)
    write_tensors(folder / FACTORS, "factors", {"factors": before * learned}, {"start": base})
    tokenizer.save_pretrained(folder)
    (folder / "curve.json").write_text(json.dumps(curve))


def _learned_before(name):
    """The model that the factors of a start belong to, and these; ones where the start is that model."""
    if not name.startswith("aligned/"):
        return name, torch.ones(())
    with read_tensors(aligned_folder(name) / FACTORS, "factors", "train it again") as (kept, facts):
        return facts["start"], kept["factors"]
