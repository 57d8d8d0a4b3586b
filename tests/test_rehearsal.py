"""Rehearsal without the hardware: what imagined models are said to cost, against real runs of small shapes."""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from safetyneuron import (
    SafetyNeuronError,
    change_scores,
    measure_importance,
    patched_generation,
    sn_tune,
)
from safetyneuron.alignment.ia3 import GPU_BATCH, prefer
from safetyneuron.detectors.case import Case
from safetyneuron.detectors.table import DETECTORS
from safetyneuron.metrics import answers
from safetyneuron.metrics.capability import language_model
from safetyneuron.metrics.judge import says_yes
from safetyneuron.metrics.perplexity import perplexity
from safetyneuron.neurons.activations import channel_means
from safetyneuron.organism.tokenizer import build_tokenizer
from safetyneuron.run import preflight, rehearsal, stages
from safetyneuron.run.editions import read_edition
from safetyneuron.run.imagined import GPUS, Meter, imagine_model, weight_bytes
from safetyneuron.run.stages import PATCHED, Subject
from safetyneuron.tuning.circuit_breaker import circuit_break
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
RANK, RULE = {"lora_rank": 8}, {"rule": "attribution/mean"}
FIRST = {"rule": "first_order"}
LITTLE = {"optimizer": "adafactor", "half": True}


def patched(s, n):
    with patched_generation(s.model, s.other, s.neurons(PATCHED).only(["down"])):
        answers(s.model, s.tokenizer, s.prompts(n), s.new)


def rerouted(s, n):
    documents = s.documents(16)
    circuit_break(s.model, s.tokenizer, documents, documents, steps=n, batch_size=16)


def found(s, n):
    documents = s.documents(n)
    case = [s.model, s.tokenizer, *[s.prompts(n)] * 3, documents, documents]
    DETECTORS[s.settings["rule"]].find(Case(*case))


def preferred(s, n):
    pairs = [
        {"prompt": d["prompt"], "chosen": d["completion"], "rejected": d["completion"]}
        for d in s.documents(GPU_BATCH * n)
    ]
    prefer(s.model, s.tokenizer, pairs, epochs=1, batch_size=GPU_BATCH)


def weighed(s, n):
    from lm_eval.api.instance import Instance

    asked = [Instance("loglikelihood", {}, (p, " a a"), i) for i, p in enumerate(s.prompts(n))]
    language_model(s.model, s.tokenizer).loglikelihood(asked, disable_tqdm=True)


def judge(s, questions):
    for question in questions:
        says_yes(s.model, s.tokenizer, question)


CASES = {  # stage -> (items, tokens, new tokens, settings, what really runs)
    "importance": (
        8,
        64,
        0,
        {},
        lambda s, n: measure_importance(s.model, s.tokenizer, s.prompts(n)),
    ),
    "importance, first order": (
        8,
        64,
        0,
        FIRST,
        lambda s, n: measure_importance(s.model, s.tokenizer, s.prompts(n), "first_order"),
    ),
    "answering": (8, 64, 40, {}, lambda s, n: answers(s.model, s.tokenizer, s.prompts(n), s.new)),
    "patched_answering": (8, 64, 30, {}, patched),
    "choosing": (8, 64, 0, {}, weighed),
    "contrasting": (
        8,
        64,
        30,
        {},
        lambda s, n: change_scores(s.model, s.other, s.tokenizer, s.prompts(n), s.new),
    ),
    "weighing": (
        8,
        64,
        30,
        {},
        lambda s, n: perplexity(s.model, s.tokenizer, s.documents(n)),
    ),
    "classifying": (8, 64, 0, {}, lambda s, n: judge(s, s.prompts(n))),
    "averaging": (8, 64, 0, {}, lambda s, n: channel_means(s.model, s.tokenizer, s.prompts(n))),
    "tuning": (
        5,
        64,
        30,
        {},
        lambda s, n: sn_tune(s.model, s.tokenizer, s.documents(8 * n), s.neurons()),
    ),
    "fine_tuning": (
        5,
        64,
        30,
        {},
        lambda s, n: fine_tune(s.model, s.tokenizer, s.documents(8 * n)),
    ),
    "fine_tuning, LoRA": (
        5,
        64,
        30,
        RANK,
        lambda s, n: fine_tune(s.model, s.tokenizer, s.documents(8 * n), 8),
    ),
    "fine_tuning, little memory": (
        5,
        64,
        30,
        LITTLE,
        lambda s, n: fine_tune(s.model, s.tokenizer, s.documents(8 * n), **LITTLE),
    ),
    "rerouting": (5, 64, 30, {"batch_size": 16}, rerouted),
    "preferring": (4, 64, 30, {}, preferred),
    "detecting": (8, 64, 10, RULE, found),
}


def subject(make, tokens, new, settings):
    """Two models of one shape, the second for what needs a partner."""
    return Subject(make(), build_tokenizer(), GPUS["H100"], tokens, new, settings, make())


def real_model():
    """A model with weights that, as imagined ones, never stops early."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPE)).eval()
    model.generation_config.eos_token_id = None
    return model


def really(work, weights):
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
    return operations.get_total_flops(), weights + peak


@pytest.mark.parametrize("name", CASES)
def test_a_stage_costs_what_a_real_run_of_a_small_shape_costs(name, monkeypatch):
    monkeypatch.setattr(Meter, "without", lambda *_: nullcontext())  # as where there is no GPU
    count, tokens, new, settings, run = CASES[name]
    imagined = subject(lambda: imagine_model(SHAPE, torch.float32), tokens, new, settings)
    stage = getattr(stages, name.partition(",")[0])
    loop = stage.__name__ in rehearsal.LOOPS
    cost = stage(imagined).turns(count) if loop else stage(imagined, count)
    there = subject(real_model, tokens, new, settings)
    weights = 2 * weight_bytes(there.model)
    operations, peak = really(lambda: run(there, count), weights)
    assert cost.operations == pytest.approx(operations, rel=0.1)
    assert cost.peak == pytest.approx(peak, rel=0.1)


def test_fine_tuning_makes_room_for_the_copy_by_putting_the_model_aside(monkeypatch):
    def peak():
        case = subject(lambda: imagine_model(SHAPE, torch.float32), 64, 30, LITTLE)
        return stages.fine_tuning(case).turns(5).peak, weight_bytes(case.model)

    moved, weights = peak()
    monkeypatch.setattr(Meter, "without", lambda *_: nullcontext())
    assert peak()[0] - moved == pytest.approx(weights, rel=0.01)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """An edition with one chapter on one small model, which is there, and a GPU of any size."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(rehearsal, "SHAPES", tmp_path)
    monkeypatch.setitem(rehearsal.BATCHES, "importance", 1)
    monkeypatch.setenv("SAFETYNEURON_MODELS", str(tmp_path / "models"))
    shape = {"licence": "none", "gated": False, "dtype": "float32", "config": SHAPE}
    (tmp_path / "toy--model.json").write_text(json.dumps(shape))
    folder = tmp_path / "models" / "toy" / "model"
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("{}")

    def edition(memory):
        monkeypatch.setitem(GPUS, "toy", replace(GPUS["H100"], memory=memory))
        chapter = {"model_name": "toy/model", "n_detect": 20}
        return {"hardware": "toy", "notebooks": {"01_detection": chapter}}

    return edition


def test_the_check_fails_where_a_stage_does_not_fit_the_edition_s_gpu(toy, capsys):
    preflight.check(toy(2**30))
    assert "does not fit" not in (table := capsys.readouterr().out) and "01_detection" in table
    with pytest.raises(SafetyNeuronError, match="01_detection on toy/model"):
        preflight.check(toy(2**24))
    assert "does not fit" in capsys.readouterr().out


def test_the_check_names_a_model_whose_shape_is_unknown(toy):
    edition = toy(2**30)
    edition["notebooks"]["01_detection"]["model_name"] = "toy/other"
    with pytest.raises(SafetyNeuronError, match="toy--other.json"):
        preflight.check(edition)


def test_the_check_tells_a_set_that_is_read_without_a_commit_even_where_the_hub_is_out_of_reach(
    monkeypatch,
):
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", lambda *_, **__: 1 / 0)
    whats = [preflight.look_up_data(name, "en").what for name in ("harmbench", "advbench")]
    assert "not pinned" in whats[0] and "not pinned" not in whats[1]


def test_every_model_that_an_edition_names_has_a_shape():
    for path in (ROOT / "workflow" / "editions").glob("*.yaml"):
        for name in preflight.model_names(read_edition(path)):
            assert rehearsal.shape_of(name)["config"]["hidden_size"]


def test_a_batch_is_halved_until_it_fits():
    gpu = GPUS["H100"]
    job = rehearsal.Job("weighing", "toy", 64, 64, 30)

    def cost(memory):
        small = rehearsal.Rehearsal(replace(gpu, memory=memory))
        small._models = {}
        small.model = lambda *_, **__: model
        return small.cost(job)

    model = imagine_model(SHAPE, torch.float32)
    whole, halved = cost(gpu.memory), cost(int(1.5 * weight_bytes(model)))
    assert halved.peak < whole.peak and halved.operations == pytest.approx(whole.operations)


def test_a_classifier_that_judges_reads_every_answer_and_is_looked_up():
    asked = rehearsal.Job("answering", "a/target", 10, times=3)
    jobs = [asked, rehearsal.Job("tuning", "a/target"), replace(asked, attack=True)]
    *same, more = rehearsal.judged({"judge": "a/judge"}, jobs)
    assert same == jobs and (more.stage, more.model, more.count) == ("classifying", "a/judge", 30)
    assert list(rehearsal.judged({"judge": "keyword"}, jobs)) == jobs
    chapter = {"models": ["a/target"], "judge": "a/judge", "templates": {"a/target": "a/chat"}}
    names = preflight.model_names({"notebooks": {"06": chapter, "07": {"judge": "keyword"}}})
    assert sorted(names) == ["a/chat", "a/judge", "a/target"]
