import copy
import json

import pytest
import torch
from conftest import small_llama, small_model

from safetyneuron import SafetyNeuronError, load_documents, load_model, load_prompts, organism
from safetyneuron.alignment import stages as pairs
from safetyneuron.alignment.ia3 import prefer, supervise
from safetyneuron.alignment.stages import PAIRED, STAGES, Stage, all_stages, first_model
from safetyneuron.data.preferences import load_preferences
from safetyneuron.metrics.refusal import is_refusal
from safetyneuron.metrics.safety import compliance, helpfulness
from safetyneuron.organism import recipes, stages
from safetyneuron.organism.reading import read_request

PREFERENCES = stages.preferences(recipes.RECIPES["llama-pair-harmless"], seed=0, english=True)


@pytest.fixture
def model():
    return small_llama(groups=2, max_position_embeddings=128).float()


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_training_scales_rows_of_up_and_changes_nothing_else(family, tokenizer):
    model = small_model(family, groups=2, max_position_embeddings=128).float()
    before = copy.deepcopy(model.state_dict())
    _, curve = supervise(
        model,
        tokenizer,
        load_documents("organism/refusals")[:8],
        epochs=2,
        learning_rate=1e-1,
        batch_size=4,
    )
    assert len(curve) == 4
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    fused = family == "phi3"
    assert changed == {
        f"model.layers.{layer}.mlp.{'gate_up_proj' if fused else 'up_proj'}.weight"
        for layer in range(2)
    }
    for name in changed:
        ratio = model.state_dict()[name] / before[name]
        if fused:  # the first half of the rows belongs to gate
            assert torch.allclose(ratio[:28], torch.ones(()))
        assert torch.allclose(
            ratio, ratio[:, :1].expand_as(ratio), rtol=1e-4
        ) and not torch.allclose(ratio[-28:], torch.ones(()))


def test_a_trained_model_can_be_copied_trained_again_and_used(model, tokenizer):
    ids = torch.tensor([[5, 6, 7]])
    supervise(
        model,
        tokenizer,
        load_documents("organism/refusals")[:4],
        epochs=1,
        learning_rate=1e-1,
        batch_size=4,
    )
    twin = copy.deepcopy(model)
    prefer(twin, tokenizer, PREFERENCES[:4], epochs=1, learning_rate=1e-1, batch_size=4)
    with torch.no_grad():
        assert not twin(ids).logits.equal(model(ids).logits)
    assert all(p.requires_grad for p in twin.parameters()) and not twin.training
    assert not hasattr(twin, "peft_config") and "forward" not in vars(twin)


def test_dpo_starts_at_the_loss_of_indifference_and_lowers_it(model, tokenizer):
    _, curve = prefer(
        model, tokenizer, PREFERENCES[:8], beta=0.5, epochs=8, learning_rate=5e-2, batch_size=8
    )
    assert curve[0] == pytest.approx(0.6931, abs=1e-3)  # log 2: the model is its own reference
    assert curve[-1] < 0.6


def test_preferences_say_what_to_prefer(tmp_path):
    asked = [pair for pair in PREFERENCES if read_request(pair["prompt"])]
    assert (
        all(is_refusal(pair["chosen"]) and not is_refusal(pair["rejected"]) for pair in asked)
        and len(asked) > len(PREFERENCES) / 2
    )
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    assert load_preferences(str(path)) == [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    path.write_text('{"prompt": "a", "chosen": "b"}\n')
    with pytest.raises(SafetyNeuronError, match="one-sided"):
        load_preferences(str(path))
    with pytest.raises(SafetyNeuronError, match="no preference set"):
        load_preferences("organism/other")


def test_training_computes_in_the_models_own_precision(model, tokenizer):
    seen = set()
    for layer in model.model.layers:
        layer.self_attn.q_proj.register_forward_hook(
            lambda module, inputs, result: seen.add(result.dtype)
        )
    supervise(model, tokenizer, load_documents("organism/refusals")[:2], epochs=1, batch_size=2)
    prefer(model, tokenizer, PREFERENCES[:2], epochs=1, batch_size=2)
    assert seen == {torch.float32}


def test_nothing_to_train_on_is_refused(model, tokenizer):
    with pytest.raises(SafetyNeuronError, match="no preferences"):
        prefer(model, tokenizer, [])
    with pytest.raises(SafetyNeuronError, match="no documents"):
        supervise(model, tokenizer, [])


@pytest.mark.organism
def test_the_pair_differs_in_safety_and_in_its_up_projections_alone():
    from safetyneuron import load_prompts

    harmful, benign = load_prompts("organism/harmful")[:100], load_prompts("organism/benign")[:100]
    (before, tokenizer), (after, _) = (
        load_model(f"organism/llama-pair-{stage}") for stage in ("sft", "dpo")
    )
    unaligned, aligned = (
        compliance(model, tokenizer, harmful)["asr"].value for model in (before, after)
    )
    assert unaligned >= 0.9 and aligned <= 0.3
    assert all(
        helpfulness(model, tokenizer, benign)["helpful"].value >= 0.85 for model in (before, after)
    )
    changed = {
        name
        for name, weight in after.named_parameters()
        if not weight.equal(before.get_parameter(name))
    }
    assert changed == {
        f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(len(before.model.layers))
    }


def test_every_stage_starts_from_a_model_that_exists():
    assert {first_model(name) for name in STAGES} == set(PAIRED.values())
    assert [stage.beta for stage in all_stages("aligned/gemma-7b-dpo")] == [None, 0.1]


def test_an_aligned_pair_is_found_once_it_is_trained(tmp_path, monkeypatch):
    organism.export_organism("organism/llama-base", tmp_path / "base")
    rows = [
        {"prompt": p, "chosen": "no .", "rejected": "yes ."}
        for p in load_prompts("organism/harmful")[:4]
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in rows))
    schedule = {"epochs": 1, "learning_rate": 1e-2, "batch_size": 4}
    first = Stage(str(tmp_path / "base"), {"organism/compliances": 4}, **schedule)
    second = Stage("aligned/tiny-sft", {str(tmp_path / "pairs.jsonl"): 4}, beta=0.1, **schedule)
    monkeypatch.setattr(pairs, "STAGES", {"aligned/tiny-sft": first, "aligned/tiny-dpo": second})
    monkeypatch.setenv("SAFETYNEURON_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SafetyNeuronError, match="safetyneuron train aligned/tiny-dpo"):
        load_model("aligned/tiny-dpo")
    folder = pairs.train_aligned("aligned/tiny-dpo")
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert pairs.train_aligned("aligned/tiny-dpo") == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == written
    before, after = (
        dict(load_model(f"aligned/tiny-{stage}")[0].named_parameters()) for stage in ("sft", "dpo")
    )
    assert all("up_proj" in name for name in before if not before[name].equal(after[name]))
    assert not all(before[name].equal(after[name]) for name in before)
    monkeypatch.setattr(pairs, "code_digest", lambda *modules: "another trainer")
    assert pairs.train_aligned("aligned/tiny-dpo") != folder  # and what it starts from, too
    with pytest.raises(
        SafetyNeuronError, match="no stages make aligned/huge: use one of aligned/tiny-sft"
    ):
        pairs.train_aligned("aligned/huge")
