"""Rehearsal without the hardware: what imagined models are said to cost, against real runs of small shapes."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from safetyneuron import measure_importance, sn_tune
from safetyneuron.metrics import answers
from safetyneuron.organism.tokenizer import build_tokenizer
from safetyneuron.run import stages
from safetyneuron.run.imagined import GPUS, imagine_model
from safetyneuron.run.stages import Subject
from safetyneuron.tuning.trainer import fine_tune

SHAPE = dict(
    model_type="llama",
    vocab_size=4000,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=512,
)
CASES = {  # stage -> (items, tokens, new tokens, what really runs)
    "importance": (8, 64, 0, lambda s, n: measure_importance(s.model, s.tokenizer, s.prompts(n))),
    "answering": (8, 64, 40, lambda s, n: answers(s.model, s.tokenizer, s.prompts(n), s.new)),
    "tuning": (
        6,
        64,
        30,
        lambda s, n: sn_tune(s.model, s.tokenizer, s.documents(8 * n), s.neurons()),
    ),
    "fine_tuning": (6, 64, 30, lambda s, n: fine_tune(s.model, s.tokenizer, s.documents(8 * n))),
}


def subject(model, tokens, new, **settings):
    return Subject(model, build_tokenizer(), GPUS["H100"], tokens, new, settings)


def really(work, model):
    """Operations and bytes at the peak of a real run, the second from what the allocator reports."""
    with FlopCounterMode(display=False) as operations:
        work()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return operations.get_total_flops(), weights + peak


@pytest.mark.parametrize("name", CASES)
def test_a_stage_costs_what_a_real_run_of_a_small_shape_costs(name):
    count, tokens, new, run = CASES[name]
    imagined = getattr(stages, name)(
        subject(imagine_model(SHAPE, torch.float32), tokens, new), count
    )
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPE)).eval()
    model.generation_config.eos_token_id = None  # as imagined models, it never stops early
    there = subject(model, tokens, new)
    operations, peak = really(lambda: run(there, count), model)
    assert imagined.operations == pytest.approx(operations, rel=0.1)
    assert imagined.peak == pytest.approx(peak, rel=0.1)
