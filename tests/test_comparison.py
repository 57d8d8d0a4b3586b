"""Detectors and interventions of the comparison, against oracles and by properties."""

import copy

import numpy as np
import pytest
import torch
from conftest import small_llama, small_model

from safetyneuron import NeuronSet, SafetyNeuronError, load_documents, load_prompts
from safetyneuron.chapters import ch10_comparison
from safetyneuron.detectors import detect
from safetyneuron.detectors.direction import alignment_with, refusal_directions
from safetyneuron.detectors.saliency import snip, wanda
from safetyneuron.importance.selection import select_difference, select_fraction
from safetyneuron.kept import examination
from safetyneuron.metrics.rates import Rate
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


def test_random_detectors_draw_units_uniformly_and_matched_ones_beside_the_pattern():
    shapes = NeuronSet.empty(small_llama(groups=4)).shapes
    pattern = detect.Detector(
        detect.random_scores({p: torch.zeros(s) for p, s in shapes.items()}, 99)
    )
    found = detect.random_detectors(pattern, 300)
    uniform = [d.select(0.1).units() for n, d in found.items() if n.startswith(f"{detect.RANDOM} ")]
    for kind in ("q", "vo", "ffn"):  # no kind comes more often because it has more rows
        share = torch.stack([units.kinds[kind].float().mean() for units in uniform]).mean()
        assert float(share) == pytest.approx(0.1, abs=0.01)
    chosen, drawn = pattern.select(0.1), found[f"{detect.MATCHED} 7"].select(0.1)
    assert drawn.counts() == chosen.counts() and not len(drawn & chosen)
    assert found[f"{detect.MATCHED} 7"].select(0.7) is None


def test_the_trade_off_is_the_area_under_the_front():
    assert ch10_comparison.trade_off(np.array([0.0]), np.array([1.0])) == 0
    assert ch10_comparison.trade_off(np.array([0.0, 1.0]), np.array([1.0, 1.0])) == 1
    assert ch10_comparison.trade_off(
        np.array([0.0, 0.5, 1.0, 0.2]), np.array([1.0, 0.8, 0.4, 0.1])
    ) == pytest.approx(0.4 * 1 + 0.4 * 0.5)
    assert (
        ch10_comparison.trade_off(np.array([0.0, 1.0]), np.array([1.0, 0.0])) == 0
    )  # harm that leaves nothing counts for nothing


def outcome(harm, accuracy, count=50):
    def part(share):
        return [1] * round(share * count) + [0] * (count - round(share * count))

    return {
        "asr": part(harm),
        "coherent": part(harm),
        "over_refusal": part(0),
        "accuracy": part(accuracy),
        "perplexity": [1.0],
    }


def test_intervals_of_the_trade_off_hold_prompts_and_draws():
    whole = outcome(0.0, 1.0)
    found = {
        ("good", 0.01): outcome(0.9, 1.0),
        ("good", 0.1): outcome(1.0, 0.2),
        ("random 0", 0.01): outcome(0.0, 0.9),
        ("random 1", 0.01): outcome(0.4, 0.9),
    }
    table = ch10_comparison.areas(whole, found)
    assert list(table.index) == ["good", "random"] and table.loc["good", "area"] == pytest.approx(
        0.9 * 0.8 + 0.2
    )
    assert table.loc["random", "area"] == pytest.approx(0.18)
    assert (
        all(table["low"] <= table["area"])
        and all(table["area"] <= table["high"])
        and table.loc["good", "high"] - table.loc["good", "low"] > 0.05
    )
    assert (
        table.loc["random", "high"] - table.loc["random", "low"] > 0.3
    )  # the draws differ more than the prompts
    long = ch10_comparison.long_table(found)
    rate = long[(long["detector"] == "random") & (long["measure"] == "asr")]["rate"].iloc[0]
    assert rate.value == pytest.approx(0.2) and len(ch10_comparison.numbers(long)) == len(long)


@pytest.mark.parametrize(
    "rate, below, word",
    [
        (Rate(90, 100), False, "seen"),
        (Rate(20, 100), False, "not seen"),
        (Rate(50, 100), False, "undecided"),
        (Rate(20, 100), True, "seen"),
        (Rate(90, 100), True, "not seen"),
    ],
)
def test_words_follow_the_interval(rate, below, word):
    assert ch10_comparison._judged(rate, 0.5, below).split("\n")[0] == word


@pytest.mark.organism
def test_every_detector_fills_every_budget_and_claims_name_them(chat, base):
    model, tokenizer = chat
    data = detect.Detection(
        "organism/harmful",
        "organism/general",
        "organism/benign",
        "organism/refusals",
        "organism/helpful",
        8,
    )
    rules = [key for key in detect.COMPARED if not key.startswith(("paper/", "released/"))]
    rules.sort(key=lambda key: not key.startswith("first_order/"))  # the pattern of matched ones
    found = detect.detect(model, base[0], tokenizer, data, rules, draws=2)
    total = NeuronSet.empty(model).units().total
    assert len(found) == 2 * 3 + 4 + 2 * 2
    for name, detector in found.items():
        sizes = [len(detector.select(share).units()) for share in (0.001, 0.01)]
        assert sizes == [round(share * total) for share in (0.001, 0.01)], name
    changed = found[detect.CHANGE].select(0.01).units()
    assert changed.counts()["ffn"] == len(changed) and all(
        d.passes > 0 for n, d in found.items() if not n.startswith("random")
    )
    matched = found[f"{detect.MATCHED} 0"].select(0.01)
    assert matched.counts() == found["first_order, without foundation"].select(0.01).counts()
    some = {name: found[name] for name in ("exact, Eq 3", "random 0")}
    exam = examination.Exam(
        "organism/harmful", "organism/benign", ("organism_facts",), "organism/helpful", 6, 6
    )
    results = examination.matrix(model, tokenizer, exam, some, [0.005])
    assert (
        set(results) == {("exact, Eq 3", 0.005), ("random 0", 0.005)}
        and len(results["exact, Eq 3", 0.005]["asr"]) == 6
    )
    judged = ch10_comparison.claims(some, some, results, 0.01)
    assert list(judged.columns) == ["exact, Eq 3"] and judged.loc[
        "two languages share less than 30 %", "exact, Eq 3"
    ].startswith("not seen\n100.0")
    alone = ch10_comparison.claims(some, None, results, 0.01)
    assert alone.loc["two languages share less than 30 %", "exact, Eq 3"].startswith("undecided")
    _, correlation = ch10_comparison.agreement(found, 0.01)
    unlike = correlation.loc[detect.CHANGE].drop(detect.CHANGE)
    assert unlike.abs().max() < 0.9 and correlation.loc[
        "exact, Eq 3", "exact, without foundation"
    ] == pytest.approx(1)
