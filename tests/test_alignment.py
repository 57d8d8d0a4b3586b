import copy
import json

import pytest
import torch
from conftest import small_llama, small_model

from safetyneuron import SafetyNeuronError, load_documents, load_model, load_prompts, organism
from safetyneuron.alignment import stages as pairs
from safetyneuron.alignment.ia3 import as_turns, prefer, supervise
from safetyneuron.alignment.stages import PAIRED, STAGES, Stage, all_stages, first_model
from safetyneuron.data.preferences import load_preferences
from safetyneuron.metrics.refusal import is_refusal
from safetyneuron.metrics.safety import compliance, helpfulness
from safetyneuron.models import TRAININGS, trainings_of
from safetyneuron.neurons.activations import activations
from safetyneuron.neurons.architecture import multiply_factors
from safetyneuron.neurons.factors import apply_factors
from safetyneuron.neurons.identity import identity
from safetyneuron.neurons.weights import fingerprint
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
    sft, dpo = all_stages("aligned/gemma-7b-dpo@3")
    assert (sft.beta, dpo.beta, sft.seed, dpo.seed) == (None, 0.1, 3, 3) and dpo.rows is None
    assert set(trainings_of("aligned/gemma-7b-dpo", 9)) < set(STAGES)
    assert len(trainings_of("aligned/gemma-7b-dpo", 9)) == TRAININGS


@torch.no_grad()
def test_small_factors_survive_beside_weights_of_sixteen_bits(model, tokenizer):
    """Merged into bfloat16 a factor of 1.001 is lost; beside it the activations are those of single precision, rounded once."""
    small = 1 + 1e-3 * torch.rand(2, 28, generator=torch.Generator().manual_seed(0))
    half, ids = copy.deepcopy(model).bfloat16(), torch.tensor([[5, 6, 7, 8]])
    lost = multiply_factors(copy.deepcopy(half), small)
    assert fingerprint(lost) == fingerprint(half)
    with activations(half) as before:
        half(ids)
    first = before[0].float()
    (
        apply_factors(half, small.sqrt()),
        apply_factors(half, small.sqrt()),
    )  # a training after a training
    assert half.dtype == torch.bfloat16 and fingerprint(half) != fingerprint(lost)
    with activations(half) as after:
        half(ids)
    assert after[0].equal((first * half.model.layers[0].mlp.down_proj.factors).bfloat16())
    torch.testing.assert_close(half.model.layers[1].mlp.down_proj.factors.detach(), small[1])
    identity(half, tokenizer)  # whose hooks these are is known
    assert (
        apply_factors(copy.deepcopy(model), small)
        .model.layers[0]
        .mlp.up_proj.weight.equal(multiply_factors(model, small).model.layers[0].mlp.up_proj.weight)
    )


def test_models_of_sixteen_bits_train_factors_of_thirty_two(model, tokenizer):
    half, seen = model.bfloat16(), set()
    query = half.model.layers[0].self_attn.q_proj
    query.register_forward_hook(lambda module, inputs, result: seen.add(result.dtype))
    factors, _ = prefer(
        half, tokenizer, PREFERENCES[:2], epochs=1, learning_rate=1e-4, batch_size=2
    )
    assert seen == {torch.bfloat16} and factors.dtype == torch.float32
    moved = (factors - 1).abs()
    assert 0 < moved.max() < 2**-8  # less than weights of 16 bits can hold
    assert half.model.layers[0].mlp.down_proj.factors.detach().equal(factors[0])


def test_a_conversation_is_trained_on_with_all_its_turns(model, tokenizer):
    turns = [*as_turns(PREFERENCES[:1])[0]["prompt"]]
    turns += [{"role": "assistant", "content": "sorry ."}, {"role": "user", "content": "why ?"}]
    pair = PREFERENCES[0] | {"prompt": turns}
    assert as_turns([pair])[0]["prompt"] == turns
    _, curve = prefer(model, tokenizer, [pair], epochs=1, batch_size=1)
    assert curve[0] == pytest.approx(0.6931, abs=1e-3)


def test_an_aligned_pair_is_found_once_it_is_trained(tmp_path, monkeypatch):
    organism.export_organism("organism/llama-base", tmp_path / "base")
    rows = [
        {"prompt": p, "chosen": "no .", "rejected": "yes ."}
        for p in load_prompts("organism/harmful")[:4]
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in rows))
    schedule = {"epochs": 1, "learning_rate": 1e-2, "batch_size": 4}
    first = Stage(str(tmp_path / "base"), ("organism/compliances",), rows=4, **schedule)
    second = Stage("aligned/tiny-sft", (str(tmp_path / "pairs.jsonl"),), beta=0.1, **schedule)
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
