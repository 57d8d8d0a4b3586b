"""Capability through lm-eval: the organism's tasks are ordinary lm-eval tasks over local files."""

import logging
from contextlib import contextmanager, redirect_stderr
from importlib.resources import files

from safetyneuron.metrics.rates import Rate
from safetyneuron.progress import EveryTenSeconds

ORGANISM_TASKS = ("organism_facts", "organism_pairs", "organism_arithmetic")


def capability(model, tokenizer, tasks=ORGANISM_TASKS, limit=200, batch_size=64):
    """Accuracy per task.

    Parameters
    ----------
    model, tokenizer
        As returned by `load_model`.
    tasks : sequence of str
        lm-eval task names; the organism's stand for MMLU, ARC-challenge and GSM8K.
    limit : int
        Questions per task.
    batch_size : int

    Returns
    -------
    dict of str to Rate
    """
    import lm_eval  # here, because importing it takes seconds
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder = str(files("safetyneuron.organism") / "tasks")
    with _quiet("lm_eval"), redirect_stderr(EveryTenSeconds()):
        manager = TaskManager(include_path=folder, include_defaults=not set(tasks) <= set(ORGANISM_TASKS))
        results = lm_eval.evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            manager.load(list(tasks)),
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
            apply_chat_template=tokenizer.chat_template is not None,
        )
    return {task: _rate(task, results) for task in tasks}


def _rate(task, results):
    scores, trials = results["results"][task], results["n-samples"][task]["effective"]
    accuracy = next(value for name, value in scores.items() if name.split(",")[0] in ("acc", "exact_match"))
    return Rate(round(accuracy * trials), trials)


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
