"""Every rule of the table, and each kind of rule on a case that can be computed by hand or by brute force."""

import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import small_llama, small_model

from safetyneuron import SafetyNeuronError, deactivate, load_prompts
from safetyneuron.detectors import channels, consensus, gradients, relevance, softmax
from safetyneuron.detectors.case import Case
from safetyneuron.detectors.detect import Detection, Detector, check_scores, find
from safetyneuron.detectors.heads import head_effects, safety_heads
from safetyneuron.detectors.table import DETECTORS, Rule
from safetyneuron.importance.selection import select_fraction
from safetyneuron.kept import rankings
from safetyneuron.metrics.log_odds import Pair, pairs_for, weigh_pairs
from safetyneuron.neurons.activations import (
    channel_means,
    last_activations,
    mean_ablated,
    overwritten,
)
from safetyneuron.neurons.architecture import FEED_FORWARD, PROJECTIONS, Architecture
from safetyneuron.neurons.encoding import encode_prompts
from safetyneuron.neurons.hooks import reading
from safetyneuron.neurons.sets import NeuronSet

SETS = [f"organism/{name}" for name in ("harmful", "general", "benign", "refusals", "helpful")]


@pytest.fixture(scope="module")
def case():
    from safetyneuron.organism.tokenizer import build_tokenizer

    model, base = (small_llama(groups=2, seed=seed) for seed in (0, 1))
    return Detection(*SETS, 4).case(model, build_tokenizer(), base, ["it"])


@pytest.mark.parametrize("key", DETECTORS)
def test_every_rule_gives_every_neuron_a_finite_score_and_says_what_it_took(case, key):
    found, shapes = find(DETECTORS[key], case, key), NeuronSet.empty(case.model).shapes
    for scores in (found.scores, found.others or found.scores):
        assert {p: tuple(x.shape) for p, x in scores.items()} == shapes
        assert all(x.isfinite().all() for x in scores.values())
        assert len({float(x) for p in PROJECTIONS for x in scores[p].flatten()}) > 1
    assert found.seconds > 0 and found.passes > 0
    units = NeuronSet.empty(case.model).units().kinds
    assert {k: x.shape for k, x in found.ranking.items()} == {k: x.shape for k, x in units.items()}


def test_no_rule_leaves_anything_on_the_model(case):
    batch = torch.tensor([[5, 6, 7, 8]])
    before = case.model(batch).logits
    for key, rule in DETECTORS.items():
        find(rule, case, key)
    assert torch.equal(case.model(batch).logits, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in case.model.modules()) and all(
        p.grad is None for p in case.model.parameters()
    )


def test_a_ranking_is_found_once_for_each_case_and_read_whole(case, tmp_path, monkeypatch):
    monkeypatch.setenv("SAFETYNEURON_CACHE", str(tmp_path))

    def rank(case):
        return {key: rankings.find(key, case) for key in DETECTORS}

    first, plain = rank(case), {key: find(DETECTORS[key], case, key) for key in DETECTORS}
    with monkeypatch.context() as patched:
        patched.setattr(rankings.detect, "find", None)
        again = rank(case)
    for key, found in plain.items():
        assert again[key].seconds == first[key].seconds > 0 < first[key].passes
        for name in ("scores", "others"):
            (a, b, c) = (getattr(x[key], name) for x in (first, again, plain))
            assert (a is None) == (c is None) and all(torch.equal(b[p], a[p]) for p in a or ())
            assert all(torch.equal(a[p], c[p]) for p in c or ())
    assert any(found.others for found in plain.values())
    fewer = replace(case, harmful=case.harmful[:2], _kept={})
    other = replace(case, base=case.model, _kept={})
    assert not torch.equal(
        rankings.find("exact/eq3", fewer).scores["q"], first["exact/eq3"].scores["q"]
    )
    assert float(rankings.find("change", other).scores["down"].abs().sum()) == 0


def test_what_several_rules_need_is_measured_once_and_counted_for_each(case):
    again = Case(case.model, case.tokenizer, case.harmful, case.benign)
    calls = []

    def work():
        started = time.process_time()
        while time.process_time() < started + 0.05:
            pass

    def measure():
        calls.append(again.once("inner", work))
        return 7

    first = again.timed(lambda: again.once("outer", measure))
    second = again.timed(lambda: again.once("outer", measure))
    assert first[0] == second[0] == 7 and len(calls) == 1
    assert first[1] > 0.05 and second[1] == pytest.approx(first[1], abs=0.01)


# What a function of one's own may do wrong -> what it is told.
WRONG = {
    "returned NoneType": lambda scores: None,
    "returned a dict with q": lambda scores: {"q": scores["q"]},
    "shape": lambda scores: scores | {"up": scores["up"][:, 1:]},
    "not finite": lambda scores: scores | {"k": scores["k"] / 0 * 0},
    "no numbers": lambda scores: scores | {"k": "high"},
}


@pytest.mark.parametrize("message", WRONG)
def test_scores_that_cannot_rank_the_neurons_get_one_clear_line(model, message):
    right = {p: m.double() for p, m in NeuronSet.empty(model).masks.items()}
    assert set(check_scores({p: x.numpy() for p, x in right.items()}, model, "mine")) == set(right)
    with pytest.raises(SafetyNeuronError, match=message) as error:
        check_scores(WRONG[message](right), model, "mine")
    assert "mine" in str(error.value) and "\n" not in str(error.value)


def test_a_rule_without_what_it_needs_says_so(case):
    bare = Case(case.model, case.tokenizer, case.harmful, case.benign)
    with pytest.raises(SafetyNeuronError, match="change needs base"):
        find(DETECTORS["change"], bare, "change")
    assert find(Rule(lambda c: consensus.on_benign(c), "", "", "", ""), bare).others is None


def test_a_ranking_with_others_counts_how_many_ranks_a_unit_stands_higher():
    low = {p: torch.zeros(1, 1) for p in PROJECTIONS}
    scores = low | {"q": torch.tensor([[3.0]]), "down": torch.tensor([[2.0]])}
    others = low | {"q": torch.tensor([[2.0]]), "up": torch.tensor([[3.0]])}
    found = Detector(scores, others).ranking
    assert {kind: x.item() for kind, x in found.items()} == {"q": 1, "k": 0, "vo": 0, "ffn": -1}


PAIRS = [Pair([5, 6, 7, 8], [20], [21]), Pair([9, 8, 30], [40], [7])]


def odds(model, tokenizer, pairs=PAIRS):
    with torch.no_grad():
        refusal, helped = weigh_pairs(model, tokenizer, pairs)
    return float((refusal - helped).mean())


def without_last_norm(**options):
    """A model whose log odds of one-token answers are linear in what its last layer adds."""
    model = small_model(**options)
    model.model.norm = torch.nn.Identity()
    return model


def zeroed(model, tokenizer, projection, layer, pairs=PAIRS):
    """What the log odds lose when each neuron of a projection is zeroed, by brute force."""
    shapes, whole, lost = NeuronSet.empty(model).shapes, odds(model, tokenizer, pairs), []
    for channel in range(shapes[projection][1]):
        with deactivate(model, NeuronSet.from_cells(shapes, [(projection, layer, channel)])):
            lost.append(whole - odds(model, tokenizer, pairs))
    return torch.tensor(lost, dtype=torch.float64)


def test_weight_times_gradient_is_gradient_times_activation(tokenizer):
    for family in ("llama", "phi3", "qwen2"):
        model = small_model(family, groups=2)
        refusal, helped = weigh_pairs(model, tokenizer, PAIRS)
        ((refusal - helped).mean()).backward()
        found = gradients.contributions(model, tokenizer, PAIRS)
        for p in PROJECTIONS:
            place = Architecture(model).place(1, p)
            products = place.module.weight * place.module.weight.grad
            expected = products.sum(1) if place.axis == 0 else products.sum(0)
            if place.bias is not None:
                expected = expected + place.module.bias * place.module.bias.grad
            torch.testing.assert_close(
                found.mean[p][1], expected[place.channels].detach().float(), rtol=1e-4, atol=1e-6
            )
        assert all((found.size[p] >= found.mean[p].abs() - 1e-6).all() for p in PROJECTIONS)


def test_attribution_is_exact_where_the_odds_are_linear(tokenizer):
    model = without_last_norm(groups=2)
    found = gradients.contributions(model, tokenizer, PAIRS).mean
    expected = zeroed(model, tokenizer, "down", 1)
    assert expected.abs().min() > 1e-3
    torch.testing.assert_close(found["down"][1].double(), expected, rtol=1e-4, atol=1e-5)

    means = channel_means(model, tokenizer, load_prompts("organism/benign")[:3])
    found = gradients.contributions(model, tokenizer, PAIRS, means).mean["down"][1]
    chosen = NeuronSet.from_cells(NeuronSet.empty(model).shapes, [("down", 1, 5), ("down", 1, 9)])
    with mean_ablated(model, chosen, means):
        changed = odds(model, tokenizer)
    assert float(found[[5, 9]].sum()) == pytest.approx(odds(model, tokenizer) - changed, rel=1e-4)


def test_a_twin_is_the_closest_harmless_request_of_the_same_length_and_attribution_to_it_exact(
    tokenizer,
):
    model = without_last_norm(groups=2)
    benign = [Pair(ids, [1], [2]) for ids in ([9, 6, 9, 8], [5, 6, 9, 8], [5, 6, 7, 8, 9])]
    twins = gradients.find_twins(PAIRS, benign)
    assert twins == [(PAIRS[0], Pair([5, 6, 9, 8], [20], [21]))]
    case = SimpleNamespace(
        model=model, tokenizer=tokenizer, pairs={"harmful": PAIRS, "benign": benign}.get
    )
    found = gradients.attribution_to_twin(case)["down"][1]
    places = [("down", 1)]
    with reading(model, places) as seen:
        odds(model, tokenizer, [twins[0][1]])
    there = seen["down", 1]
    shapes, whole = NeuronSet.empty(model).shapes, odds(model, tokenizer, PAIRS[:1])
    for channel in (3, 17):
        one = NeuronSet.from_cells(shapes, [("down", 1, channel)])
        with overwritten(model, one, lambda projection, layer: there):
            changed = odds(model, tokenizer, PAIRS[:1])
        assert float(found[channel]) == pytest.approx(whole - changed, rel=1e-4)
    with pytest.raises(SafetyNeuronError, match="as many tokens"):
        case.pairs = {"harmful": PAIRS, "benign": []}.get
        gradients.attribution_to_twin(case)


@pytest.mark.parametrize(
    "options",
    [
        dict(groups=2),
        dict(family="qwen3", groups=2),
        dict(
            family="gemma2",
            groups=1,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=None,
            query_pre_attn_scalar=5,
        ),
    ],
    ids=lambda options: options.get("family", "llama"),
)
def test_atp_star_is_exact_where_the_odds_are_linear_in_the_probabilities(tokenizer, options):
    model = without_last_norm(**options)
    last = model.model.layers[1]
    pairs = PAIRS
    if options.get("family") == "gemma2":  # its eager attention in float64 cannot read padding
        last.post_attention_layernorm, pairs = torch.nn.Identity(), PAIRS[:1]
    with torch.no_grad():
        last.mlp.down_proj.weight.zero_()
    case = SimpleNamespace(model=model, tokenizer=tokenizer, pairs=lambda name: pairs)
    found, linear = softmax.star(case), gradients.contributions(model, tokenizer, pairs).mean
    for p in ("q", "k"):
        expected = zeroed(model, tokenizer, p, 1, pairs)
        torch.testing.assert_close(found[p][1].double(), expected, rtol=1e-4, atol=1e-5)
        assert (
            linear[p][1].double() - expected
        ).abs().max() > 1e-3  # without the softmax it is not
    for p in ("v", "o", "gate"):
        torch.testing.assert_close(found[p], linear[p], rtol=1e-4, atol=1e-6)


def test_integrated_gradients_add_up_to_the_difference(tokenizer):
    model = small_llama(groups=2, initializer_range=0.1)
    means = channel_means(model, tokenizer, load_prompts("organism/benign")[:3])
    found = gradients.contributions(model, tokenizer, PAIRS, means, steps=32).mean
    with gradients.probing(model, means, alpha=0.0):
        start = odds(model, tokenizer)
    total = sum(float(x.sum()) for x in found.values())
    assert total == pytest.approx(odds(model, tokenizer) - start, rel=3e-4)


def test_relevance_is_conserved_and_gate_and_up_have_half_of_it_each(tokenizer):
    model = small_llama(groups=2)
    ids = torch.tensor([[9]])  # attention to one position is linear

    def difference(embedded):
        logits = model(inputs_embeds=embedded).logits[0, -1]
        return logits[20] - logits[21]

    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    whole = difference(embedded)
    with relevance.linear(model):
        output = difference(embedded)
        (gradient,) = torch.autograd.grad(output, embedded)
        found = gradients.contributions(model, tokenizer, PAIRS).mean
    torch.testing.assert_close(output, whole)
    torch.testing.assert_close((gradient * embedded).sum(), whole)
    for p in ("gate", "up"):
        torch.testing.assert_close(2 * found[p], found["down"], rtol=1e-4, atol=1e-6)


def by_hand(harmful, benign, model=None):
    """A case in which the activations of feed-forward channels are given."""
    given = {"harmful": torch.tensor(harmful), "benign": torch.tensor(benign)}
    return SimpleNamespace(model=model, last=given.get)


def test_effect_size_and_mean_difference_by_hand():
    model = small_llama(num_hidden_layers=1, intermediate_size=2)
    given = by_hand([[[1.0, 5.0]], [[3.0, 5.5]]], [[[0.0, 7.0]], [[2.0, 7.5]]], model)
    effect, difference = channels.effect_size(given), channels.mean_difference(given)
    for p in FEED_FORWARD:
        assert effect[p][0].tolist() == pytest.approx([2**-0.5, -2 / 0.125**0.5])
        assert difference[p][0].tolist() == pytest.approx([1, 2])
        assert effect["q"].max() < effect[p].min() and difference["o"].max() < difference[p].min()


def test_a_sparse_probe_finds_the_one_channel_that_tells_requests_apart():
    model = small_llama(num_hidden_layers=2, intermediate_size=28)
    draw = torch.Generator().manual_seed(0)
    harmful, benign = (torch.rand(40, 2, 28, generator=draw) for _ in range(2))
    harmful[:, 1, 7] += 2
    scores = channels.sparse_probe(by_hand(harmful.tolist(), benign.tolist(), model))
    assert select_fraction({p: scores[p] for p in PROJECTIONS}, 1e-9).masks["gate"][1, 7]
    assert (scores["up"] == 0).float().mean() > 0.5


def test_perturbation_probing_is_the_change_that_one_channel_makes_to_the_odds(tokenizer):
    model = without_last_norm(groups=2)
    prompts = load_prompts("organism/harmful")[:2]
    pairs = [Pair(ids, [20], [21]) for ids in encode_prompts(model, tokenizer, prompts)]
    case = Case(model, tokenizer, prompts, [])
    case.once(("pairs", "harmful"), lambda: pairs)
    found, expected = channels.perturbation(case), []
    before, after = (
        torch.from_numpy(last_activations(model, tokenizer, texts)).view(2, 2, -1)[:, 1, 4]
        for texts in (prompts, [channels.perturbed(prompt) for prompt in prompts])
    )
    for row, pair in enumerate(pairs):

        def other(module, inputs, row=row):
            changed = inputs[0].clone()
            changed[:, -2, 4] = after[row]
            return (changed,)

        whole = odds(model, tokenizer, [pair])
        handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(other)
        expected.append(abs(whole - odds(model, tokenizer, [pair])))
        handle.remove()
    assert not torch.equal(before, after)
    assert float(found["gate"][1, 4]) == pytest.approx(np.mean(expected), rel=1e-3)


def test_a_head_is_worth_the_divergence_without_its_columns(case):
    prompts, shapes = case.harmful[:2], NeuronSet.empty(case.model).shapes
    found = head_effects(case.model, case.tokenizer, prompts)
    head = NeuronSet.from_cells(shapes, [("o", 1, torch.arange(20, 30))])  # the third of four

    def next_token(prompt):
        ids = torch.tensor(encode_prompts(case.model, case.tokenizer, [prompt]))
        with torch.no_grad():
            return case.model(ids).logits[0, -1].log_softmax(-1)

    expected = []
    for prompt in prompts:
        whole = next_token(prompt)
        with deactivate(case.model, head):
            expected.append((whole.exp() * (whole - next_token(prompt))).sum())
    assert float(found[1, 2]) == pytest.approx(float(sum(expected)) / 2)
    scores = safety_heads(Case(case.model, case.tokenizer, prompts, []))
    assert (
        torch.equal(scores["q"], scores["o"])
        and (scores["q"][1, 20:30] == scores["q"][1, 25]).all()
    )
    assert scores["k"][1, 10].item() == pytest.approx(float(found[1, 2:].max()))
    assert scores["gate"].max() < found.min()


def test_shared_neurons_are_the_intersection_over_languages(case):
    found, share = find(DETECTORS["shared"], case), 0.3
    sets = [
        select_fraction(case.importance("exact", "harmful", x).mean, share)
        - select_fraction(case.importance("exact", "benign", x).mean, share)
        for x in (None, "it")
    ]
    inside = {p: torch.ones_like(m) for p, m in sets[0].masks.items()}
    total, limit = sets[0].total, round(share * sets[0].total)
    for p, mask in (sets[0] & sets[1]).masks.items():
        inside[p] = (-found.scores[p] < limit) & ~(-found.others[p] < limit)
        assert torch.equal(inside[p], mask)
    assert 0 < len(sets[0] & sets[1]) < total


def test_other_models_are_weighed_by_what_they_say(chat):
    model, tokenizer = chat
    asked = ["use the hammer", "steal the car and run"]
    pairs = pairs_for(model, tokenizer, asked)
    assert all(len(p.refusal) == len(p.help) > 0 and p.refusal != p.help for p in pairs)
    prompts = load_prompts("organism/harmful")[:2]
    assert (
        pairs_for(model, tokenizer, prompts)[0].prompt
        == encode_prompts(model, tokenizer, prompts)[0]
    )
