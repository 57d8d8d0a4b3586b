"""End-to-end effects of units, many at once, against switching one off at a time."""

import random

import pytest
import torch

from safetyneuron import SafetyNeuronError, deactivate, load_model, load_prompts
from safetyneuron.detectors.effects import (
    all_units,
    classes_without,
    compare_sums,
    measure_effects,
    neurons_of,
    silenced_likelihoods,
)
from safetyneuron.metrics.answer_class import answer_classes
from safetyneuron.metrics.log_odds import choose_pairs, weigh_pairs
from safetyneuron.neurons.activations import channel_means, mean_ablated

pytestmark = pytest.mark.organism


@pytest.mark.parametrize("name", ["organism/llama-chat", "organism/qwen-chat"])
def test_units_beside_each_other_have_the_effect_that_they_have_alone(name):
    model, tokenizer = load_model(name)  # qwen: biases, and heads that share values
    prompts = load_prompts("organism/harmful")[:3] + load_prompts("organism/lookalike")[:2]
    draw, kinds = random.Random(0), {}
    for unit in all_units(model):
        kinds.setdefault(unit[0], []).append(unit)
    units = [unit for some in kinds.values() for unit in draw.sample(some, 3)]
    pairs, means = choose_pairs(model, tokenizer, prompts), channel_means(model, tokenizer, prompts)
    zero = silenced_likelihoods(model, pairs, units, tokens=400)
    mean = silenced_likelihoods(model, pairs, units, means)
    with torch.no_grad():
        for i, unit in enumerate(units):
            neurons = neurons_of(model, [unit])
            with deactivate(model, neurons):
                alone = torch.stack(weigh_pairs(model, tokenizer, pairs), 1)
            assert torch.allclose(zero[i], alone, atol=1e-4), unit
            with mean_ablated(model, neurons, means):
                alone = torch.stack(weigh_pairs(model, tokenizer, pairs), 1)
            assert torch.allclose(mean[i], alone, atol=1e-4), unit


def test_effects_are_changes_of_the_mean_of_each_part(chat):
    model, tokenizer = chat
    parts = {
        "harmful": load_prompts("organism/harmful")[:2],
        "harmless": load_prompts("organism/benign")[:3],
    }
    unit = ("ffn", 4, 7)
    parts = {name: choose_pairs(model, tokenizer, asked) for name, asked in parts.items()}
    table = measure_effects(model, tokenizer, parts, [unit])
    assert tuple(table.loc[0, ["kind", "layer", "channel"]]) == unit
    for name, pairs in parts.items():
        with torch.no_grad():
            before = weigh_pairs(model, tokenizer, pairs)
            with deactivate(model, neurons_of(model, [unit])):
                after = weigh_pairs(model, tokenizer, pairs)
        for side, x, y in zip(("refusal", "help"), before, after):
            assert table.loc[0, f"{name} {side}"] == pytest.approx(float((y - x).mean()), abs=1e-4)


def test_a_set_of_one_is_its_own_sum_and_two_are_compared_with_both(chat):
    model, tokenizer = chat
    prompts, units = load_prompts("organism/harmful")[:3], [("ffn", 4, 7), ("vo", 5, 9)]
    pairs = choose_pairs(model, tokenizer, prompts)
    table = measure_effects(model, tokenizer, {"harmful": pairs}, units)
    effects = dict(zip(units, table["harmful refusal"] - table["harmful help"]))
    sets = {"first": units[:1], "second": units[1:], "both": units}
    found = compare_sums(model, tokenizer, pairs, sets, effects)
    alone = found.loc[["first", "second"]]
    assert alone["seen"].tolist() == pytest.approx(alone["predicted"].tolist(), abs=1e-4)
    assert found.loc["both", "predicted"] == pytest.approx(alone["seen"].sum(), abs=1e-4)
    with torch.no_grad():
        before = torch.stack(weigh_pairs(model, tokenizer, pairs))
        with deactivate(model, neurons_of(model, units)):
            change = torch.stack(weigh_pairs(model, tokenizer, pairs)) - before
    assert found.loc["both", "seen"] == pytest.approx(
        float((change[0] - change[1]).mean()), abs=1e-4
    )


def test_every_row_and_column_is_in_one_unit_and_classes_are_those_without_it(chat):
    model, tokenizer = chat
    units = all_units(model)
    assert len(set(units)) == len(units) == neurons_of(model, units).units().total
    assert len(neurons_of(model, units)) == neurons_of(model, units).total
    prompts = load_prompts("organism/harmful")[:6]
    chosen = [unit for unit in units if unit[0] == "ffn" and unit[1] < 3]
    with deactivate(model, neurons_of(model, chosen)):
        expected = answer_classes(model, tokenizer, prompts)
    found = classes_without(model, tokenizer, prompts, chosen)
    assert found == {name: rate.value for name, rate in expected.items()}


def test_a_sliding_window_is_refused():
    model, tokenizer = load_model("organism/mistral-chat")
    pairs = choose_pairs(model, tokenizer, load_prompts("organism/harmful")[:1])
    with pytest.raises(SafetyNeuronError, match="sliding window"):
        silenced_likelihoods(model, pairs, [("q", 0, 0)])
