"""Detectors and interventions of the comparison, against oracles and by properties."""

import copy

import numpy as np
import pytest
import torch
from conftest import scores_with, small_llama, small_model

from safetyneuron import NeuronSet, SafetyNeuronError, load_documents, load_prompts
from safetyneuron.chapters import ch10_comparison
from safetyneuron.detectors import detect
from safetyneuron.detectors.direction import alignment_with, refusal_directions
from safetyneuron.detectors.saliency import snip, wanda
from safetyneuron.detectors.table import DETECTORS
from safetyneuron.importance.selection import select_difference, select_fraction
from safetyneuron.metrics.verdict import Verdict
from safetyneuron.neurons.activations import channel_means, mean_ablated
from safetyneuron.neurons.architecture import PROJECTIONS, Architecture
from safetyneuron.neurons.deactivation import transplant
from safetyneuron.neurons.encoding import encode_documents, encode_prompts
from safetyneuron.neurons.weights import fingerprint

DOCUMENTS = load_documents("organism/refusals")[:3]


@pytest.fixture(params=["llama", "qwen2", "phi3"])
def model(request):
    return small_model(request.param, groups=2, max_position_embeddings=128)


def some(model, share=0.2):
    generator = torch.Generator().manual_seed(0)
    return NeuronSet(
        {
            p: torch.rand(m.shape, generator=generator) < share
            for p, m in NeuronSet.empty(model).masks.items()
        }
    )


def test_snip_is_weight_times_mean_gradient_summed_over_the_neuron(model, tokenizer):
    before = fingerprint(model)
    flags = [p.requires_grad for p in model.parameters()]
    scores = snip(model, tokenizer, DOCUMENTS)
    assert (
        fingerprint(model) == before
        and [p.requires_grad for p in model.parameters()] == flags
        and all(p.grad is None for p in model.parameters())
    )
    place, expected = Architecture(model).place(1, "down"), 0
    for row in encode_documents(model, tokenizer, DOCUMENTS):
        model.zero_grad()
        model(
            input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])
        ).loss.backward()
        expected = expected + place.module.weight.grad.abs() / len(DOCUMENTS)
    torch.testing.assert_close(
        scores["down"][1],
        (expected * place.module.weight.abs()).sum(0).detach().float(),
        rtol=1e-4,
        atol=1e-6,
    )
    place = Architecture(model).place(0, "k")
    assert scores["k"].shape == (2, place.size)


def test_wanda_is_weight_times_input_norm_over_completion_tokens(model, tokenizer):
    scores = wanda(model, tokenizer, DOCUMENTS[:1])
    place, (row,) = (
        Architecture(model).place(1, "up"),
        encode_documents(model, tokenizer, DOCUMENTS[:1]),
    )
    seen = {}
    handle = place.module.register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0][0]))
    model(input_ids=torch.tensor([row["input_ids"]]))
    handle.remove()
    norms = seen["x"][torch.tensor(row["labels"]) >= 0].norm(dim=0)
    torch.testing.assert_close(
        scores["up"][1], (place.weight.abs() * norms).sum(1).detach().float(), rtol=1e-4, atol=1e-6
    )


def states_by_hand(model, family, ids):
    """Mean over the tokens of one prompt where rows read and columns write: place to layers, from the layers' own parts."""
    seen = {"into q": [], "into gate": [], "between": [], "after": []}
    post = family == "gemma2"
    for layer in model.model.layers:
        second = layer.pre_feedforward_layernorm if post else layer.post_attention_layernorm
        spots = (layer.input_layernorm, "into q"), (second, "into gate")
        for norm, name in spots:
            norm.register_forward_hook(lambda m, i, o, n=name: seen[n].append(o[0].mean(0)))
        second.register_forward_pre_hook(lambda m, i: seen["between"].append(i[0][0].mean(0)))
    for norm in (*(layer.input_layernorm for layer in model.model.layers[1:]), model.model.norm):
        norm.register_forward_pre_hook(lambda m, i: seen["after"].append(i[0][0].mean(0)))
    with torch.no_grad():
        model(torch.tensor([ids]))
    return {name: torch.stack(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3"])
def test_the_direction_is_where_each_neuron_reads_or_writes(family, tokenizer):
    model = small_model(family, groups=2, max_position_embeddings=128).float()
    harmful, benign = load_prompts("organism/harmful")[:5], load_prompts("organism/benign")[:3]
    directions = refusal_directions(model, tokenizer, harmful, benign, batch_size=2)
    expected = {}
    for sign, prompts in ((1, harmful), (-1, benign)):
        for ids in encode_prompts(model, tokenizer, prompts):
            for what, state in states_by_hand(copy.deepcopy(model), family, ids).items():
                expected[what] = expected.get(what, 0) + sign * state / len(prompts)
    read = {"q": "into q", "k": "into q", "v": "into q", "gate": "into gate", "up": "into gate"}
    for projection, what in (read | {"o": "between", "down": "after"}).items():
        torch.testing.assert_close(
            directions[projection], expected[what].double(), rtol=1e-3, atol=1e-6
        )
        assert (directions[projection].norm(dim=1) > 0).all()  # the first layer's too
    layer, architecture = model.model.layers[1], Architecture(model)
    gains = {"o": 1, "down": 1}  # what a column writes goes through a norm in gemma2
    if family == "gemma2":
        norms = {"o": layer.post_attention_layernorm, "down": layer.post_feedforward_layernorm}
        gains = {p: 1 + norm.weight.detach() for p, norm in norms.items()}
    scores = alignment_with(model, directions)
    for projection, direction in directions.items():
        weight = architecture.place(1, projection).weight.detach() * gains.get(projection, 1)
        cosine = torch.nn.functional.cosine_similarity(weight, direction[1][None], dim=1).abs()
        torch.testing.assert_close(scores[projection][1], cosine.float(), rtol=1e-4, atol=1e-5)


def test_transplanted_neurons_are_the_donors_and_come_back_bit_for_bit(model):
    donor = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in donor.parameters():
            parameter.add_(1)
    neurons, before, ids = some(model), fingerprint(model), torch.tensor([[5, 6, 7]])
    with transplant(model, donor, neurons):
        mine, theirs = Architecture(model), Architecture(donor)
        for projection in PROJECTIONS:
            mask, place, other = (
                neurons.masks[projection][1],
                mine.place(1, projection),
                theirs.place(1, projection),
            )
            assert torch.equal(place.weight[mask], other.weight[mask]) and not torch.equal(
                place.weight[~mask], other.weight[~mask]
            )
    assert fingerprint(model) == before
    with (
        transplant(
            model, donor, NeuronSet({p: torch.ones_like(m) for p, m in neurons.masks.items()})
        ),
        torch.no_grad(),
    ):
        for name in ("embed_tokens", "norm"):
            model.model.get_submodule(name).load_state_dict(
                donor.model.get_submodule(name).state_dict()
            )
    with (
        pytest.raises(SafetyNeuronError, match="shapes|channels"),
        transplant(model, small_llama(intermediate_size=20), neurons),
    ):
        pass
    assert model(ids).logits.shape == donor(ids).logits.shape


def test_the_mean_of_one_token_changes_nothing_and_of_several_does(model, tokenizer):
    neurons, ids = some(model), torch.tensor([[5]])
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    prompt = bare.decode([5])
    assert bare(prompt)["input_ids"] == [5]
    means = channel_means(model, bare, [prompt, prompt], batch_size=1)
    plain = model(ids).logits
    with mean_ablated(model, neurons, means):
        torch.testing.assert_close(model(ids).logits, plain, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(model(torch.tensor([[6]])).logits, plain)
    assert torch.equal(model(ids).logits, plain)


def test_the_difference_of_two_rankings_has_the_size_asked_for_and_ends():
    generator = torch.Generator().manual_seed(0)
    first, second = (
        {p: torch.rand(2, 20, generator=generator) for p in PROJECTIONS} for _ in range(2)
    )
    chosen = select_difference(first, second, 0.05)
    assert len(chosen) == len(select_fraction(first, 0.05))
    assert detect.Detector(first, first).select(0.05) is None


def by_hand(scores, groups):
    """Units of a small model with their score, highest first: (score, rows and columns)."""
    kinds = [("q",), ("k",), ("gate", "up", "down")]
    kinds += [("v", "o")] if groups == 4 else [("v",), ("o",)]
    units = [
        (max(float(scores[p][layer, c]) for p in kind), {(p, layer, c) for p in kind})
        for kind in kinds
        for layer in range(2)
        for c in range(scores[kind[0]].shape[1])
    ]
    return sorted(units, key=lambda unit: -unit[0])


@pytest.mark.parametrize("groups", [2, 4])
def test_budgets_are_shares_of_functional_units_which_come_whole(groups):
    shapes = NeuronSet.empty(small_llama(groups=groups)).shapes
    generator = torch.Generator().manual_seed(0)
    first, second = (
        {p: torch.rand(s, generator=generator) for p, s in shapes.items()} for _ in range(2)
    )
    ranked, other = (by_hand(scores, groups) for scores in (first, second))
    budget = round(0.1 * len(ranked))
    chosen = detect.Detector(first).select(0.1)
    assert set(chosen.cells()) == set().union(*(cells for _, cells in ranked[:budget]))
    assert len(chosen.units()) == budget
    for size in range(1, len(ranked)):
        mine, theirs = ([cells for _, cells in units[:size]] for units in (ranked, other))
        left = [cells for cells in mine if cells not in theirs]
        if len(left) == budget:
            break
    assert set(detect.Detector(first, second).select(0.1).cells()) == set().union(*left)


def test_random_units_are_drawn_uniformly_over_all_kinds(chat):
    drawn = ch10_comparison.draw_random(chat[0], [0.1], 100)
    units = [sets[0].units() for sets in drawn]
    for kind in ("q", "vo", "ffn"):  # no kind comes more often because it has more rows
        share = torch.stack([found.kinds[kind].float().mean() for found in units]).mean()
        assert float(share) == pytest.approx(0.1, abs=0.01)


def test_the_trade_off_is_the_area_under_the_front():
    assert ch10_comparison.trade_off(np.array([0.0]), np.array([1.0])) == 0
    assert ch10_comparison.trade_off(np.array([0.0, 1.0]), np.array([1.0, 1.0])) == 1
    assert ch10_comparison.trade_off(
        np.array([0.0, 0.5, 1.0, 0.2]), np.array([1.0, 0.8, 0.4, 0.1])
    ) == pytest.approx(0.4 * 1 + 0.4 * 0.5)
    assert (
        ch10_comparison.trade_off(np.array([0.0, 1.0]), np.array([1.0, 0.0])) == 0
    )  # harm that leaves nothing counts for nothing


def test_what_requests_add_sums_to_the_trade_off_where_halves_are_alike():
    harm = np.repeat([[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]], 2, axis=1).astype(float)
    kept = np.array([1.0, 0.9, 0.4])
    items = ch10_comparison.trade_off_items(harm, kept)
    assert items.mean() == pytest.approx(ch10_comparison.trade_off(harm.mean(1), kept))


def test_a_maximum_over_noisy_budgets_is_not_counted_as_harm():
    """Six budgets do the same true harm: the best of them by luck is chosen on one half and scored on the other."""
    generator, kept = np.random.default_rng(0), np.linspace(1, 0.9, 6)
    honest, naive = [], []
    for _ in range(300):
        harm = (generator.random((6, 60)) < 0.2).astype(float)
        honest.append(ch10_comparison.trade_off_items(harm, kept).mean())
        naive.append(ch10_comparison.trade_off(harm.mean(1), kept))
    assert np.mean(honest) == pytest.approx(0.2, abs=0.01) and np.mean(naive) > 0.24


def scores_of(harm, accuracy):
    counts = {("coherent", "h"): harm, ("asr", "h"): harm, ("accuracy", "t"): accuracy}
    return scores_with(counts | {("over_refusal", "b"): 0})


def test_rules_are_held_against_random_units_and_eq_3_on_the_same_requests():
    whole = [scores_of(0, 100)]
    found = {
        ch10_comparison.EQ3: [[[scores_of(0, 100), scores_of(10, 90)]]],
        ch10_comparison.CONTRAST: [[[scores_of(90, 100), scores_of(100, 20)]]],
        ch10_comparison.RANDOM: [[[scores_of(0, 100)], [scores_of(4, 100)]]],
    }
    values, clusters = ch10_comparison.trade_offs(whole, found, ["t"], "h")
    areas = ch10_comparison.estimate_areas(values, clusters)
    assert list(areas.index)[0] == ch10_comparison.CONTRAST == ch10_comparison.best(areas)
    row = areas.loc[ch10_comparison.CONTRAST]
    assert row["area"].value == pytest.approx(0.9 + 0.1 * 0.2, abs=0.02)
    assert row["above Eq 3"].interval[0] > 0.6
    assert areas.loc[ch10_comparison.RANDOM, "area"].value == pytest.approx(0.02, abs=0.005)
    verdicts = ch10_comparison.judge_rules(areas)
    assert verdicts[ch10_comparison.CONTRAST] is Verdict.SEEN
    assert verdicts[ch10_comparison.EQ3] is not Verdict.SEEN
    found["control/norm"] = [[[scores_of(100, 100), scores_of(100, 100)]]]  # no rule of ours
    small = ch10_comparison.help_of_best(found, [0.005, 0.05], "h")
    assert small.mean() == pytest.approx(0.9)
    label = ch10_comparison.label_of(ch10_comparison.CONTRAST)
    assert ch10_comparison.rules_of_best(found, [0.005, 0.05], "h") == label
    assert ch10_comparison.tell_odds(areas) == "" == ch10_comparison.tell_widest({"m": areas})


@pytest.mark.organism
def test_a_change_score_ranks_feed_forward_units_and_every_set_fills_its_budget(chat, base):
    sets = ("harmful", "general", "benign", "refusals", "helpful")
    data = detect.Detection(*(f"organism/{name}" for name in sets), 8)
    case = data.case(*chat, base[0])
    keys = ("first_order/eq3", "first_order/foundation", "change", "direction", "snip")
    found = {key: detect.find(DETECTORS[key], case, key) for key in keys}
    total = NeuronSet.empty(chat[0]).units().total
    for key, detector in found.items():
        sizes = [len(detector.select(share).units()) for share in (0.001, 0.01)]
        assert sizes == [round(share * total) for share in (0.001, 0.01)], key
    changed = found["change"].select(0.01).units()
    assert changed.counts()["ffn"] == len(changed) and all(d.passes > 0 for d in found.values())
    overlap = ch10_comparison.share_units(found, 0.01)
    assert np.allclose(np.diag(overlap), 1) and (overlap <= 1).all().all()


@pytest.mark.organism
def test_the_mask_of_the_answer_key_is_an_upper_line_for_the_model_that_has_one(chat):
    model = chat[0]
    mask = ch10_comparison.read_mask(model, "organism/llama-chat")
    assert 0 < len(mask.units()) < 20
    assert ch10_comparison.read_mask(model, "organism/llama-dpo") is None
    upper = ch10_comparison.estimate_mask([scores_of(0, 100)], [scores_of(90, 100)], ["t"], "h")
    assert upper.value == pytest.approx(0.9)
