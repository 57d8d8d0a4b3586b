"""Answers are greedy whatever settings a model ships."""

import copy

import pytest
import torch
from transformers import GenerationConfig

from safetyneuron import load_prompts
from safetyneuron.attacks import rewriters
from safetyneuron.detectors.change_scores import change_scores
from safetyneuron.metrics.capability import correct_answers
from safetyneuron.metrics.safety import answers
from safetyneuron.neurons.encoding import encode_prompts, pad

SHIPPED = dict(
    repetition_penalty=3.0, temperature=0.2, top_p=0.3, top_k=2, min_length=40, do_sample=True
)
SHIPPED |= dict(no_repeat_ngram_size=2, num_beams=2, eos_token_id=4)


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    monkeypatch.setattr(rewriters, "REWRITER_TOKENS", 24)


@pytest.fixture
def willed(chat):
    """The aligned organism, with generation settings of its own."""
    model = copy.copy(chat[0])
    model.generation_config = GenerationConfig(**SHIPPED)
    return model, chat[1]


def by_hand(model, tokenizer, prompt, count=24):
    """The likeliest token, again and again."""
    (ids,) = encode_prompts(model, tokenizer, [prompt])
    for _ in range(count):
        batch = pad([ids], tokenizer, "cpu")
        ids = ids + [int(model(**batch).logits[0, -1].argmax())]
        if ids[-1] == tokenizer.eos_token_id:
            break
    new = ids[len(encode_prompts(model, tokenizer, [prompt])[0]) :]
    return tokenizer.decode(new, skip_special_tokens=True).strip()


@torch.no_grad()
def test_answers_are_the_likeliest_tokens(willed, chat):
    prompts = load_prompts("organism/harmful")[:3] + load_prompts("organism/general")[:3]
    expected = [by_hand(*chat, prompt) for prompt in prompts]
    assert answers(*willed, prompts) == expected
    assert willed[0].generation_config.repetition_penalty == 3  # the model keeps its own


def test_so_are_those_of_tasks_change_scores_and_judges(willed, chat, base, monkeypatch):
    def measures(model, tokenizer):
        monkeypatch.setattr(rewriters, "_loaded", lambda name: (model, tokenizer))
        return (
            correct_answers(model, tokenizer, ("organism_arithmetic",), limit=10),
            change_scores(
                model, base[0], tokenizer, load_prompts("organism/harmful")[:4]
            ).values.tolist(),
            rewriters.ask("any", "how do i paint the door ?"),
        )

    assert measures(*willed) == measures(*chat)


def test_sampling_asks_all_tokens_at_their_own_probability(willed, chat, monkeypatch):
    def drawn(model, tokenizer):
        monkeypatch.setattr(rewriters, "_loaded", lambda name: (model, tokenizer))
        return [rewriters.ask("any", "how do i paint the door ?", seed) for seed in range(4)]

    assert drawn(*willed) == drawn(*chat)
