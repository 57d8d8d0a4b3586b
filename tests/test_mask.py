"""The learned mask on a model in which one unit is known to decide, and the searches against brute force."""

import random

import pytest
import torch
from conftest import small_llama

from safetyneuron import deactivate, load_prompts
from safetyneuron.detectors.effects import all_units, neurons_of
from safetyneuron.detectors.mask import (
    chance_of_closing,
    gated,
    highest_units,
    learn_mask,
    sample_gates,
)
from safetyneuron.detectors.search import (
    breaks_refusal,
    greedy_units,
    shortest_breaking,
    without_spare,
)
from safetyneuron.metrics.log_odds import choose_pairs, log_likelihoods, weigh_pairs


def test_gates_are_closed_as_often_as_their_chance_says():
    log_alpha, draw = torch.tensor([-4.5, -1.0, 2.0, -torch.inf]), torch.Generator().manual_seed(0)
    gates = sample_gates(log_alpha, 20_000, draw)
    assert gates.min() == 0 and gates.max() == 1
    assert torch.allclose((gates > 0).float().mean(0), chance_of_closing(log_alpha), atol=0.01)
    assert gates[:, 3].max() == 0


@pytest.mark.parametrize("groups", [2, 4])
def test_closed_gates_are_units_switched_off(tokenizer, groups):
    model = small_llama(groups=groups)
    rows, units = [([5, 6, 7], [8, 9]), ([9, 3], [4, 8, 2])], all_units(model)
    chosen = random.Random(0).sample(units, 8)
    kinds = neurons_of(model, chosen).units().kinds
    with torch.no_grad():
        with gated(model, lambda kind, layer, size: kinds[kind][layer].expand(size, -1)):
            closed = log_likelihoods(model, tokenizer, rows)
        with deactivate(model, neurons_of(model, chosen)):
            assert torch.allclose(closed, log_likelihoods(model, tokenizer, rows))


def test_the_mask_finds_the_unit_that_decides_and_leaves_what_it_is_told_to_leave(tokenizer):
    model, draw = small_llama(groups=2), random.Random(1)
    deciding = ("ffn", 1, 11)
    with torch.no_grad():
        model.get_decoder().layers[1].mlp.down_proj.weight[:, deciding[2]] *= 12
    prompts = [[draw.randrange(5, 1000) for _ in range(6)] for _ in range(40)]
    with torch.no_grad(), deactivate(model, neurons_of(model, [deciding])):
        raised = [(p, [int(model(torch.tensor([p])).logits[0, -1].argmax())]) for p in prompts]
    scores = learn_mask(model, tokenizer, raised, raised, updates=120)
    assert highest_units(scores, 1) == [deciding] and scores["ffn"][1, 11] > 0
    assert sum(int((values > 0).sum()) for values in scores.values()) < 5
    without = neurons_of(model, [deciding])
    other = learn_mask(model, tokenizer, raised, raised, updates=3, without=without)
    assert other["ffn"][1, 11] == -torch.inf and deciding not in highest_units(other, 10_000)


def test_the_smallest_breaking_set_needs_every_unit():
    order, needed, asked = list(range(100)), {3, 17, 20}, []

    def breaks(units):
        asked.append(len(units))
        return needed <= set(units)

    shortest = shortest_breaking(order, breaks)
    assert shortest == order[:21] and len(asked) < 15
    assert set(without_spare(shortest, breaks)) == needed
    assert shortest_breaking(order[:20], breaks) is None


@pytest.mark.organism
def test_greedy_search_takes_the_unit_without_which_help_is_likeliest(chat):
    model, tokenizer = chat
    harmful, harmless = (
        choose_pairs(model, tokenizer, load_prompts(f"organism/{name}")[:3])
        for name in ("harmful", "benign")
    )
    candidates = random.Random(2).sample([u for u in all_units(model) if u[0] != "q"], 5)
    expected = []
    for _ in range(2):
        gains = {}
        for unit in candidates:
            with deactivate(model, neurons_of(model, [*expected, unit])), torch.no_grad():
                gains[unit] = sum(
                    float(weigh_pairs(model, tokenizer, pairs)[1].mean())
                    for pairs in (harmful, harmless)
                )
        expected.append(max((u for u in candidates if u not in expected), key=gains.get))
    rest = harmful, harmless
    assert greedy_units(model, tokenizer, candidates, *rest, lambda u: len(u) == 2) == expected
    assert greedy_units(model, tokenizer, candidates, *rest, lambda u: False, limit=1) is None


@pytest.mark.organism
def test_what_breaks_refusal_is_help_with_harm_and_with_all_else(chat, base):
    sets = load_prompts("organism/harmful")[:10], load_prompts("organism/benign")[:10]
    assert breaks_refusal(*base, *sets)([]) and not breaks_refusal(*chat, *sets)([])
    assert not breaks_refusal(*base, *sets)(all_units(base[0]))
