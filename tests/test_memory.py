"""Memory runs out in the middle of a batch: the batch is halved, the result stays, and it is said once."""

import gc
import weakref

import pytest
import torch
from conftest import small_llama

from safetyneuron import load_documents, load_prompts, measure_importance
from safetyneuron.attacks.likelihood import TargetLoss
from safetyneuron.detectors.change_scores import change_scores
from safetyneuron.detectors.direction import refusal_directions
from safetyneuron.memory import Batches, _say
from safetyneuron.metrics.perplexity import perplexity
from safetyneuron.metrics.safety import answers
from safetyneuron.neurons.activations import channel_means, last_activations

PROMPTS = load_prompts("organism/harmful")[:7]
ROWS = torch.randint(5, 500, (7, 4), generator=torch.Generator().manual_seed(0)).tolist()


def everything(profile):
    return [profile.minimum, profile.total, torch.tensor(profile.count)]


WORK = {
    "importance": lambda model, tokenizer: everything(
        measure_importance(model, tokenizer, PROMPTS, progress=False)
    ),
    "answers": lambda model, tokenizer: answers(model, tokenizer, PROMPTS, 4),
    "change scores": lambda model, tokenizer: (
        change_scores(model, small_llama(groups=2, seed=1), tokenizer, PROMPTS, 4).values
    ),
    "refusal directions": lambda model, tokenizer: refusal_directions(
        model, tokenizer, PROMPTS, PROMPTS[:3]
    ),
    "channel means": lambda model, tokenizer: channel_means(model, tokenizer, PROMPTS),
    "last activations": lambda model, tokenizer: torch.tensor(
        last_activations(model, tokenizer, PROMPTS)
    ),
    "perplexity": lambda model, tokenizer: torch.tensor(
        perplexity(model, tokenizer, load_documents("organism/refusals")[:7])
    ),
    "target loss": lambda model, tokenizer: TargetLoss(model, tokenizer, [5])(ROWS)[0],
}


def small_memory(model, rows):
    """The last layer has no memory for more than so many rows."""

    def fail(module, inputs):
        if len(inputs[0]) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    return model.model.layers[-1].mlp.register_forward_pre_hook(fail)


@pytest.fixture(autouse=True)
def nothing_said():
    _say.cache_clear()


@pytest.mark.parametrize("name", WORK)
def test_what_does_not_fit_is_halved_and_nothing_is_lost_or_counted_twice(tokenizer, caplog, name):
    model = small_llama(groups=2)
    expected = WORK[name](model, tokenizer)
    hook = small_memory(model, 2)
    found = WORK[name](model, tokenizer)
    hook.remove()
    if name == "answers":
        assert found == expected
    else:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, check_dtype=False)
    said = [record.message for record in caplog.records if "out of memory" in record.message]
    assert said and len(said) == len(set(said))


def test_every_size_is_said_once_in_a_process(caplog):
    def run(batch):
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return sum(batch)

    for _ in range(3):
        assert sum(total for _, total in Batches(16)(list(range(16)), run)) == 120
    assert [record.args[0] for record in caplog.records] == [8, 4, 2]


def test_what_a_failed_try_held_is_freed_before_the_next():
    class Held:
        """Refers to itself, as models and their hooks do, so that only a collection frees it."""

        def __init__(self):
            self.itself = self

    held = []

    def run(batch):
        assert not any(reference() for reference in held)
        here = Held()
        held.append(weakref.ref(here))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    gc.disable()
    try:
        next(Batches(8)(list(range(8)), run))
    finally:
        gc.enable()
    assert len(held) == 3


def test_what_does_not_fit_alone_and_other_errors_are_raised():
    def run(batch):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        list(Batches(4)([1, 2, 3], run))
    with pytest.raises(RuntimeError, match="shapes"):
        list(
            Batches(4)(
                [1, 2, 3], lambda batch: (_ for _ in ()).throw(RuntimeError("shapes differ"))
            )
        )
