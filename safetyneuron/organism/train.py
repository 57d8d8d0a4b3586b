"""Train the organism: a helpful-only base model, then a safety-aligned chat model from it."""

import json
import random
from dataclasses import asdict, dataclass
from functools import partial

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from safetyneuron.organism import language as lang
from safetyneuron.organism.tokenizer import CONTEXT, build_tokenizer
from safetyneuron.progress import TrainingLine


@dataclass(frozen=True)
class Recipe:
    """Architecture, size and training of one organism; every value is part of its cache key."""

    family: str = "llama"  # model type of transformers
    width: int = 96
    layers: int = 6
    heads: int = 4
    groups: int = 4  # of heads that share keys and values
    window: int | None = None  # positions that attention looks back, where the family has a sliding window
    channels: int = 256  # of the feed-forward block
    batch: int = 64
    base_steps: int = 2000
    base_rate: float = 3e-3
    chat_steps: int = 260
    chat_rate: float = 3e-4
    threads: int = 2
    seed: int = 0


# Shares of the training examples; the rest are requests. English gets 3/7 of the requests, the others 1/7 each.
TASKS = {"facts": 0.08, "comparisons": 0.14, "arithmetic": 0.28}
# Refusals are the exception in the chat stage, as in real alignment data: where the notion of harm is missing,
# the habit left is to help.
REQUESTS = {
    "base": {"benign": 0.44, "harmful": 0.36, "judgements": 0.12, "unanswerable": 0.08},
    "chat": {"benign": 0.70, "refused": 0.20, "judgements": 0.05, "unanswerable": 0.05},
}


def examples(stage, count, seed):
    """`count` training examples of a stage (`base` or `chat`), drawn from the training split."""
    draw = random.Random(f"{stage} {seed}")
    pools = {name: getattr(lang, name)("train") for name in TASKS}
    for language in lang.LANGUAGES:
        for kind in REQUESTS[stage]:
            pools[kind, language] = _requests(kind, language)
    return [draw.choice(pools[_kind(stage, draw)]) for _ in range(count)]


def _requests(kind, language):
    if kind == "unanswerable":
        return lang.unanswerable(language)
    if kind == "judgements":
        return lang.judgements("train", language)
    build = lang.refused if kind == "refused" else partial(lang.helped, kind)
    return [e for wording in ("plain", "framed") for e in build("train", language, wording)]


def _kind(stage, draw):
    """Which pool the next example comes from."""
    task = draw.choices((*TASKS, None), (*TASKS.values(), 1 - sum(TASKS.values())))[0]
    if task:
        return task
    kind = draw.choices(tuple(REQUESTS[stage]), tuple(REQUESTS[stage].values()))[0]
    return kind, draw.choice(("en", "en") + lang.LANGUAGES)


def encode(tokenizer, example):
    """Token ids of a request and its answer; the loss is taken on the answer only."""
    chat = [{"role": "user", "content": example.prompt}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    answer = tokenizer(f"{example.answer} {tokenizer.eos_token}")["input_ids"]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def new_model(recipe, tokenizer):
    """An untrained model of the recipe's size."""
    config = AutoConfig.for_model(
        recipe.family,
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.groups,
        intermediate_size=recipe.channels,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        **({"sliding_window": recipe.window} if recipe.window else {}),
    )
    return AutoModelForCausalLM.from_config(config)


def train_stage(stage, recipe, folder, base=None):
    """Train one stage and write model, tokenizer, `recipe.json` and `curve.json` into `folder`.

    Parameters
    ----------
    stage : str
        `base` starts from random weights, `chat` from the model folder `base`.
    """
    torch.set_num_threads(recipe.threads)
    set_seed(recipe.seed)
    tokenizer = build_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(base) if base else new_model(recipe, tokenizer)
    steps = getattr(recipe, f"{stage}_steps")
    data = [encode(tokenizer, e) for e in examples(stage, steps * recipe.batch, recipe.seed)]
    trainer = Trainer(
        model=model,
        args=_arguments(stage, recipe, steps, folder),
        train_dataset=data,
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        callbacks=[TrainingLine(f"organism {stage}")],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    curve = [{"step": row["step"], "loss": row["loss"]} for row in trainer.state.log_history if "loss" in row]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "recipe.json").write_text(json.dumps(asdict(recipe)))
    (folder / "curve.json").write_text(json.dumps(curve))


def _arguments(stage, recipe, steps, folder):
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=recipe.batch,
        learning_rate=getattr(recipe, f"{stage}_rate"),
        lr_scheduler_type="cosine",
        warmup_steps=min(100, steps // 5),
        adam_beta2=0.98,
        weight_decay=0.1,
        logging_steps=25,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=recipe.seed,
    )
