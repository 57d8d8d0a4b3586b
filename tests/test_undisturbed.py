"""Every long call leaves the process and the model as it found them, also when it breaks off."""

import random
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import small_llama
from transformers.utils import logging

from safetyneuron import (
    NeuronSet,
    load_documents,
    load_model,
    load_prompts,
    measure_importance,
    screen,
    sn_tune,
)
from safetyneuron.alignment.ia3 import prefer, supervise
from safetyneuron.attacks import GCG, attack
from safetyneuron.data.requests import load_requests
from safetyneuron.importance.brute_force import brute_force
from safetyneuron.neurons.encoding import encode_prompts, pad
from safetyneuron.tuning.circuit_breaker import circuit_break
from safetyneuron.tuning.trainer import fine_tune

PROMPTS = load_prompts("organism/harmful")[:3]
DOCUMENTS = load_documents("organism/refusals")[:2]
PREFERENCES = [{"prompt": "can i help ?", "chosen": "yes .", "rejected": "no ."}] * 2
LITTLE = dict(epochs=1, learning_rate=1e-3, batch_size=2)


def few(model):
    return NeuronSet.from_cells(NeuronSet.empty(model).shapes, [("q", 0, [1, 2])])


def defended(model, tokenizer):
    breaker = circuit_break(model, tokenizer, DOCUMENTS, DOCUMENTS, steps=1, batch_size=2)
    with breaker.attached(model):
        measure_importance(model, tokenizer, PROMPTS)


CALLS = {
    "importance": lambda m, t: measure_importance(m, t, PROMPTS),
    "screen": lambda m, t: screen(m, t, PROMPTS, 0.1),
    "brute force": lambda m, t: brute_force(m, pad(encode_prompts(m, t, PROMPTS), t, "cpu")),
    "sn_tune": lambda m, t: sn_tune(m, t, DOCUMENTS, few(m), **LITTLE),
    "fine_tune": lambda m, t: fine_tune(m, t, DOCUMENTS, **LITTLE),
    "LoRA": lambda m, t: fine_tune(m, t, DOCUMENTS, lora_rank=1, **LITTLE),
    "circuit_break": defended,
    "attack": lambda m, t: attack(
        m, t, load_requests("organism/harmful")[:1], GCG(steps=1, width=4, top_k=8, tokens=3)
    ),
    "supervise": lambda m, t: supervise(m, t, DOCUMENTS, **LITTLE),
    "prefer": lambda m, t: prefer(m, t, PREFERENCES, **LITTLE),
}


def hooks(model):
    """All hooks but those that transformers leaves where hidden states were once asked for."""
    for module in model.modules():
        for hook in [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]:
            if not hook.__module__.startswith("transformers."):
                yield hook


def state(model):
    """What a caller may rely on, as plain values."""
    kind, numbers, *place = np.random.get_state()
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": (kind, numbers.tolist(), *place),
        "attention": model.config._attn_implementation,
        "cache": model.config.use_cache,
        "gradients": {name: p.requires_grad for name, p in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": [*hooks(model)],
        "autograd": torch.is_grad_enabled(),
        "bars": logging.is_progress_bar_enabled(),
        "verbosity": logging.get_verbosity(),
    }


@contextmanager
def breaking_off(model):
    """The last layer fails when it runs."""

    def fail(module, inputs):
        raise KeyError("broken off")

    handle = model.model.layers[-1].mlp.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


@pytest.fixture
def unusual():
    """A small model whose modes, flags and attention are not those of a fresh one."""
    model = small_llama(groups=2, attention_dropout=0.0).float().train()
    model.model.layers[0].eval()
    model.model.layers[1].mlp.requires_grad_(False)
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("name", CALLS)
def test_process_and_model_are_left_as_they_were(name, unusual, tokenizer):
    before = state(unusual)
    CALLS[name](unusual, tokenizer)
    assert state(unusual) == before


@pytest.mark.parametrize("name", CALLS)
def test_also_when_a_call_breaks_off(name, unusual, tokenizer):
    before = state(unusual)
    with breaking_off(unusual), pytest.raises(Exception, match="broken off"):
        CALLS[name](unusual, tokenizer)
    assert state(unusual) == before


def test_loading_leaves_bars_to_the_caller(tmp_path, unusual, tokenizer, capfd):
    unusual.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    capfd.readouterr()
    logging.enable_progress_bar()
    model, _ = load_model(str(tmp_path))
    assert logging.is_progress_bar_enabled() and not model.training
    assert "%" not in capfd.readouterr().err
