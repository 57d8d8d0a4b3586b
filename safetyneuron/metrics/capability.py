"""Capability through lm-eval: the organism's tasks are ordinary lm-eval tasks over local files."""

import logging
from contextlib import contextmanager, redirect_stderr
from functools import lru_cache
from pathlib import Path

from safetyneuron.errors import SafetyNeuronError
from safetyneuron.metrics.rates import Rate
from safetyneuron.metrics.safety import rows_at_once
from safetyneuron.neurons.generation import plain_settings
from safetyneuron.progress import EveryTenSeconds

# lm-eval's name of a task or group -> commit of its data set; other tasks read whatever is there that day.
REVISIONS = {
    "mmlu": "c30699e8356da336a370243923dbaf21066bb9fe",
    "arc_challenge": "210d026faf9955653af8916fad021475a3f00453",
    "arc_easy": "210d026faf9955653af8916fad021475a3f00453",
    "gsm8k": "e53f048856ff4f594e959d75785d2c2d37b678ee",
    "gsm8k_cot": "e53f048856ff4f594e959d75785d2c2d37b678ee",
    "bbh_cot_fewshot": "b5306be6f827cfafbb545ff5a51f96916029b0fd",
    "truthfulqa_mc1": "741b8276f2d1982aa3d5b832d3ee81ed3b896490",
}
ORGANISM_TASKS = ("organism_facts", "organism_pairs", "organism_arithmetic")


def capability(model, tokenizer, tasks=ORGANISM_TASKS, limit=200):
    """Accuracy per task, `correct_answers` as rates."""
    found = correct_answers(model, tokenizer, tasks, limit)
    return {t: Rate(sum(right for _, right in rows), len(rows)) for t, rows in found.items()}


def correct_answers(model, tokenizer, tasks=ORGANISM_TASKS, limit=200):
    """Whether each question of each task is answered correctly.

    Parameters
    ----------
    model, tokenizer
        As returned by `load_model`.
    tasks : sequence of str
        lm-eval task or group names; the organism's stand for MMLU, ARC-challenge and GSM8K. `mmlu@5` asks with five examples;
        `bbh_cot_fewshot:40` asks 40 questions, `mmlu@0:all` every one.
    limit : int
        Questions per task whose name does not say how many; of a group, per each of its tasks.

    Returns
    -------
    dict of str to list of (str, int)
        Every question and one or zero; for a group, of all its tasks.
    """
    import lm_eval  # here, because importing it takes seconds

    with (
        plain_settings(model, tokenizer),
        _quiet("lm_eval"),
        redirect_stderr(EveryTenSeconds()),
    ):
        asked = language_model(model, tokenizer)
        chat = tokenizer.chat_template is not None

        def ask(task):
            name, shots, count = name_task(task, limit)
            return lm_eval.evaluate(
                asked,
                _loaded(name, shots),
                limit=count,
                bootstrap_iters=0,
                log_samples=True,
                apply_chat_template=chat,
            )

        return {task: _correct(ask(task)) for task in tasks}


def language_model(model, tokenizer):
    """A model as lm-eval asks it."""
    from lm_eval.models.huggingface import HFLM

    batch_size = "auto" if model.device.type == "cuda" else rows_at_once(model)
    with _quiet("lm_eval"):
        return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def name_task(task, limit=None):
    """What `mmlu@5:40` means: lm-eval's name, examples shown (None: as lm-eval does), and questions, None for all.

    limit: questions of a task that does not say.

    Raises
    ------
    SafetyNeuronError
        If what follows @ or : is no number.
    """
    start, colon, most = task.partition(":")
    name, at, shots = start.partition("@")
    wrong = at and not shots.isdecimal() or colon and not (most.isdecimal() or most == "all")
    if wrong:
        raise SafetyNeuronError(
            f"task {task!r}: what follows @ is a number of examples, and what follows : a number of questions or all, for example {name}@5:200"
        )
    asked = limit if not colon else None if most == "all" else int(most)
    return name, int(shots) if at else None, asked


@lru_cache
def _loaded(name, shots):
    """The tasks behind a name, with so many examples, and their data at its commit; kept, for lm-eval reads every question to make one."""
    from lm_eval.tasks import TaskManager

    from safetyneuron.organism.tasks import build

    folder = str(Path(build.__file__).parent)
    manager = TaskManager(include_path=folder, include_defaults=name not in ORGANISM_TASKS)
    pinned = {"task": name, "dataset_kwargs": {"revision": REVISIONS.get(name)}}
    loaded = manager.load([pinned if name in REVISIONS else name])
    for one in loaded["tasks"].values() if shots is not None else ():
        one.set_config(key="num_fewshot", value=shots)
    return loaded


def _correct(results):
    """Every question and one or zero, in the order of the questions.

    Where a task has several ways of finding the number in an answer, the flexible one counts: the strict one asks for a form
    that a model without examples does not know.
    """
    outcomes = []
    for samples in results["samples"].values():
        ways = {sample["filter"] for sample in samples}
        way = "flexible-extract" if "flexible-extract" in ways else samples[0]["filter"]
        first = [sample for sample in samples if sample["filter"] == way]
        metric = next((name for name in ("acc", "exact_match") if name in first[0]), None)
        if metric is None:
            raise SafetyNeuronError(
                f"a task scores by {', '.join(first[0]['metrics'])}: only accuracy and exact match can be counted"
            )
        outcomes += [
            (str(sample["doc"].get("question", sample["doc_id"])), int(sample[metric]))
            for sample in sorted(first, key=lambda sample: sample["doc_id"])
        ]
    return outcomes


@contextmanager
def _quiet(name):
    """Only errors from a library that logs its progress as warnings."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
