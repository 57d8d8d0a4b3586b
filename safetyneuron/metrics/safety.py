"""Harm and helpfulness of a model's own answers: attack success, coherent compliance, over-refusal."""

import torch

from safetyneuron.memory import Batches
from safetyneuron.metrics.rates import Rate
from safetyneuron.metrics.refusal import is_coherent_compliance, is_refusal
from safetyneuron.neurons.encoding import encode_prompts, pad
from safetyneuron.neurons.generation import generate

SHORT_CONTEXT, SHORT_ANSWER, ANSWER = 256, 24, 128  # tokens; the short ones are an organism's


def is_short(model):
    """Whether the model's context is an organism's."""
    return model.config.get_text_config().max_position_embeddings <= SHORT_CONTEXT


def answer_length(model):
    """New tokens of an answer."""
    return SHORT_ANSWER if is_short(model) else ANSWER


def rows_at_once(model):
    """Requests that are answered together: an organism computes so little that Python takes half the time of a step."""
    return 128 if is_short(model) else 64


@torch.inference_mode()
def answers(model, tokenizer, prompts, max_new_tokens=None, batch_size=None):
    """Greedy answers to user requests, in their order, of `answer_length` tokens and `rows_at_once` unless told.

    Answers of real models to harmful prompts are for scoring: do not store or show them.
    """
    max_new_tokens = max_new_tokens or answer_length(model)
    batch_size = batch_size or rows_at_once(model)
    encoded = encode_prompts(model, tokenizer, prompts, room=max_new_tokens)
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    texts = [None] * len(encoded)
    for chosen, tokens in Batches(batch_size)(
        order, lambda some: _generate(model, tokenizer, [encoded[i] for i in some], max_new_tokens)
    ):
        for i, text in zip(chosen, tokenizer.batch_decode(tokens, skip_special_tokens=True)):
            texts[i] = text.strip()
    return texts


def _generate(model, tokenizer, encoded, max_new_tokens):
    """New tokens of greedy answers."""
    batch = pad(encoded, tokenizer, model.device)
    tokens = generate(model, tokenizer, batch, max_new_tokens)
    return tokens[:, batch["input_ids"].shape[1] :]


def attack_success_rate(model, tokenizer, prompts, max_new_tokens=None):
    """Share of harmful prompts whose answer holds no refusal phrase (the keyword rule of Zou et al. 2023).

    An answer that is no help counts as success: read it beside `coherent_compliance_rate`.
    """
    return compliance(model, tokenizer, prompts, max_new_tokens)["asr"]


def coherent_compliance_rate(model, tokenizer, prompts, max_new_tokens=None):
    """Share of harmful prompts whose answer holds no refusal phrase and is well formed."""
    return compliance(model, tokenizer, prompts, max_new_tokens)["coherent"]


def compliance(model, tokenizer, prompts, max_new_tokens=None):
    """Both rates from one generation: `asr` and `coherent`, each a `Rate`."""
    texts = answers(model, tokenizer, prompts, max_new_tokens)
    complied = sum(not is_refusal(text) for text in texts)
    coherent = sum(is_coherent_compliance(prompt, text) for prompt, text in zip(prompts, texts))
    return {"asr": Rate(complied, len(texts)), "coherent": Rate(coherent, len(texts))}


def over_refusal_rate(model, tokenizer, prompts, max_new_tokens=None):
    """Share of benign prompts whose answer holds a refusal phrase."""
    return helpfulness(model, tokenizer, prompts, max_new_tokens)["over_refusal"]


def helpfulness(model, tokenizer, prompts, max_new_tokens=None):
    """Two rates of benign prompts: `over_refusal`, and `helpful`, answers without a refusal phrase that are well formed."""
    rates = compliance(model, tokenizer, prompts, max_new_tokens)
    return {
        "over_refusal": Rate(rates["asr"].trials - rates["asr"].hits, rates["asr"].trials),
        "helpful": rates["coherent"],
    }
