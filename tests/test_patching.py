import copy
import math
import sys

import numpy as np
import pytest
import torch
from conftest import scores_with, small_llama
from safetensors.torch import save_file
from scipy.stats import spearmanr

from safetyneuron import NeuronSet, SafetyNeuronError, load_documents, load_model, load_prompts
from safetyneuron.chapters import ch09_contrast, ch09_guard, ch09_tax
from safetyneuron.detectors.change_scores import ChangeScores, change_scores
from safetyneuron.metrics import Suite, cost_by_name, mean_cost, perplexity, rule_cost
from safetyneuron.metrics.suite import evaluate
from safetyneuron.metrics.verdict import Verdict, judge
from safetyneuron.organism import manifest

SUITE = Suite(("organism/harmful",), "organism/benign", (), prompts=4)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAFETYNEURON_CACHE", str(tmp_path))


@pytest.fixture
def models():
    return [small_llama(seed=seed, max_position_embeddings=128).float() for seed in (0, 1)]


@pytest.fixture
def scores(models):
    draw = torch.Generator().manual_seed(0)
    return ChangeScores(NeuronSet.empty(models[0]), torch.rand(2, 28, generator=draw).double())


def test_restored_is_the_share_of_the_gap_that_is_closed():
    def outcomes(*hits):
        return [[[1.0] * h + [0.0] * (100 - h)] for h in hits]

    found = ch09_contrast.share_closed(outcomes(90), outcomes(10), outcomes(30))
    assert found.value == pytest.approx(0.75) and found.interval[0] < 0.75 < found.interval[1]
    assert ch09_contrast.share_closed(outcomes(50), outcomes(48), outcomes(30)) is None
    assert ch09_contrast.share_closed(outcomes(10), outcomes(90), outcomes(30)) is None


def patched_runs(chosen, random=(90, 80, 99), last=(88, 79, 97)):
    """Outcomes and costs of three trainings of one family; every answer that is no refusal costs 2, a refusal −1."""
    hits = {"recipient": (90, 80, 100), "donor": (10, 0, 0)}
    hits |= dict(
        zip(
            (ch09_contrast.CHANGE, ch09_contrast.RANDOM, ch09_contrast.LAST), (chosen, random, last)
        )
    )
    runs, costs = {}, {}
    for name, counts in hits.items():
        drawn = 4 if name in (ch09_contrast.RANDOM, ch09_contrast.LAST) else 1
        scores = [[scores_with({("asr", "s"): h, ("helpful", "b"): 90})] * drawn for h in counts]
        runs["f", name, 0 if name in ("recipient", "donor") else 0.05] = scores
        costs["f", name] = [[[2.0] * h + [-1.0] * (100 - h)] * drawn for h in counts]
    return runs, costs


def test_the_share_restored_is_what_the_patch_closes_of_the_gap_in_every_training():
    runs, costs = patched_runs((30, 20, 40))
    shares = ch09_contrast.shares_closed(runs, costs, "f", ch09_contrast.CHANGE, 0.05, "s")
    assert shares["asr"].value == pytest.approx(180 / 260) and shares["asr"].trainings == 3
    assert (
        shares["cost"].value == pytest.approx(shares["coherent"].value) == pytest.approx(180 / 260)
    )
    runs, costs = patched_runs((10, 0, 1))
    asked = (["f"], 0.05, "s", "b", "asr")
    found, numbers = ch09_contrast.judge_patches(runs, costs, *asked)
    verdicts = judge({key: models["f"] for key, models in found.items()})
    assert set(verdicts) == set(numbers)
    assert verdicts["patch-restores"] is verdicts["patch-above-random"] is Verdict.SEEN
    table = ch09_contrast.restored_table(runs, costs, 0.05, "s")
    assert table.loc[("f", ch09_contrast.CHANGE), "by training"] == "100, 100, 99"
    assert len(table) == 3
    runs, costs = patched_runs((10, 0, 1), last=(10, 0, 2))
    found, _ = ch09_contrast.judge_patches(runs, costs, *asked)
    assert judge({"last": found["patch-above-last"]["f"]})["last"] is not Verdict.SEEN


def test_the_table_of_the_curve_holds_both_models_and_every_condition():
    runs, _ = patched_runs((30, 20, 40))
    runs |= {("other", *key[1:]): found for key, found in runs.items()}
    table = ch09_contrast.tabulate_restoration(runs, "f", [("asr", "s")])
    assert table["condition"].tolist() == [
        condition for family, condition, _ in runs if family == "f"
    ]
    assert set(table["fraction"]) == {0, 0.05}


def test_controls_are_as_large_and_random_ones_lie_in_the_same_layers(scores):
    found = ch09_contrast.conditions(scores, 0.25, 2)
    chosen = found[ch09_contrast.CHANGE][0]
    assert {len(neurons) for sets in found.values() for neurons in sets} == {14}
    assert all(
        neurons.masks["down"].sum(1).equal(chosen.masks["down"].sum(1))
        for neurons in found[ch09_contrast.RANDOM]
    )
    assert found[ch09_contrast.RANDOM][0] != found[ch09_contrast.RANDOM][1]
    assert not any(len(neurons & chosen) for neurons in found[ch09_contrast.RANDOM])


def test_no_random_others_are_drawn_where_too_few_are_left(scores):
    found = ch09_contrast.conditions(scores, 0.75, 2)
    assert [len(sets) for sets in found.values()] == [1, 0, 2]
    plan = ch09_contrast.sets_to_patch(scores, [0.25, 0.75], 0.25, 2)
    assert {key: len(sets) for key, sets in plan.items() if key[0] == ch09_contrast.RANDOM} == {
        (ch09_contrast.RANDOM, 0.25): 2
    }
    assert {len(sets) for (name, share), sets in plan.items() if share == 0.75} == {1}


def test_the_neurons_of_the_highest_scores_are_patched_alone(
    models, tokenizer, scores, monkeypatch
):
    monkeypatch.setattr(ch09_contrast, "ALONE", 3)
    single, top = ch09_contrast.alone(*models, tokenizer, SUITE, scores), scores.top(3)
    cells = {(row.layer - 1, row.channel) for row in single.itertuples()}
    assert cells == {(layer, channel) for _, layer, channel in top.cells()}
    assert single["rate"].map(lambda rate: rate.value).is_monotonic_increasing
    rest = ch09_contrast.without(top, single["layer"][0], single["channel"][0])
    assert len(rest) == len(rest & top) == 2


def test_patched_and_unpatched_scores_are_kept_apart(models, tokenizer, scores):
    plain = evaluate(models[0], tokenizer, SUITE)
    neurons = scores.select(1)
    kept = [
        ch09_contrast.patched_rates(*models, tokenizer, SUITE, neurons, positions)
        for positions in ("all", "prompt", "completion", "all")
    ]
    assert kept[0] == kept[3] and evaluate(models[0], tokenizer, SUITE) == plain
    cases = ch09_contrast.ablations(*models, tokenizer, SUITE, neurons, torch.ones(2, 28))
    assert cases["patched at every token"] == kept[0] and len(cases) == 6


def half_of(noise, seed=0, count=120):
    """Requests of which half get an unsafe answer: one neuron knows of it, more or less, and no word does."""
    draw = np.random.default_rng(seed)
    costs = draw.choice([-1.0, 1.0], count)
    features = draw.normal(size=(count, 56))
    features[:, 5] = costs + noise * draw.normal(size=count)
    words = [f"how do i {w} it ?" for w in draw.choice(["paint", "burn", "fix"], count)]
    return ch09_guard.Asked([f"{w} {i}" for i, w in enumerate(words)], features, costs)


def test_a_safeguard_reads_what_a_neuron_knows_and_words_do_not(models):
    values = torch.rand(2, 28, generator=torch.Generator().manual_seed(0)).double()
    values[0, 5] = 2  # the neuron that knows has the highest score
    scores = ChangeScores(NeuronSet.empty(models[0]), values)
    learnt, tests = half_of(0.1), {"one": half_of(0.1, 1), "two": half_of(0.1, 2)}
    flagged = ch09_guard.compare(learnt, tests, scores, 3, sizes=(2, 20))
    assert ch09_guard.accuracy(flagged[ch09_guard.CHANGE, 2], tests).value > 0.95
    for other in ((ch09_guard.LAST, 2), (ch09_guard.WORDS, 0)):
        assert 0.3 < ch09_guard.accuracy(flagged[other], tests).value < 0.7
    verdicts = judge(ch09_guard.weigh_guard(flagged, tests, 2))
    assert verdicts["guard-above-words"] is Verdict.SEEN
    table = ch09_guard.guard_table(flagged, tests, 2)
    assert float(table.loc[ch09_guard.CHANGE, "two"]) > 95 and len(table) == 5
    assert ch09_guard.accuracy(flagged[ch09_guard.RANDOM, 20], tests).draws == 3


def test_random_neurons_of_a_safeguard_lie_in_the_layers_of_the_chosen_ones(scores):
    masks = ch09_guard.masks_to_read(scores, 12, 2)
    chosen, drawn, last = (
        [mask.reshape(2, 28).sum(1).tolist() for mask in masks[c]]
        for c in (ch09_guard.CHANGE, ch09_guard.RANDOM, ch09_guard.LAST)
    )
    assert drawn == chosen * 2 and last == [[0, 12]] * 2
    assert not np.array_equal(*masks[ch09_guard.RANDOM])


@pytest.mark.organism
def test_a_guarded_model_answers_less_of_what_is_unsafe(monkeypatch):
    monkeypatch.delenv("SAFETYNEURON_CACHE")
    model, tokenizer = load_model("organism/llama-half")
    scores = ChangeScores(
        NeuronSet.empty(model), torch.rand(6, 288, generator=torch.Generator().manual_seed(0))
    )
    learnt = ch09_guard.ask(model, tokenizer, "organism/harmful", "train", 60, rule_cost)
    assert 0.2 < learnt.unsafe.mean() < 0.8 and learnt.features.shape == (60, 6 * 288)
    suite = Suite(("organism/unseen",), prompts=40)
    tests = ch09_guard.ask_all(model, tokenizer, "organism/harmful", suite.harmful, 40, rule_cost)
    read_off = ch09_contrast.costs_of(model, tokenizer, suite, rule_cost)
    assert read_off == tests["organism/unseen"].costs.tolist()
    table = ch09_guard.guarded_table(
        model, tokenizer, learnt, tests, "organism/benign", scores, 300
    )
    before, after = (
        float(table.loc[r, "unsafe answers"].split()[0]) for r in ("as it is", "guarded")
    )
    assert after < before / 2
    benign = ch09_guard.ask(model, tokenizer, "organism/benign", "test", 20, rule_cost)
    assert benign.unsafe.all() and ch09_guard.flag(benign, learnt, np.ones(6 * 288, bool)).all()


@pytest.mark.organism
def test_one_file_is_not_both_training_and_test(base, tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("\n".join(load_prompts("organism/harmful")[:10]))
    with pytest.raises(SafetyNeuronError, match="both training and test file"):
        ch09_guard.ask_all(*base, str(path), [str(path)], 10, rule_cost)
    with pytest.raises(SafetyNeuronError, match="give one language"):
        ch09_contrast.transfer(
            base[0],
            base[0],
            base[1],
            SUITE,
            NeuronSet.empty(base[0]),
            [(str(path), "en"), (str(path), "zh")],
            1,
            rule_cost,
        )


def test_perplexity_is_the_exponential_of_the_mean_loss(models, tokenizer):
    documents = load_documents("organism/helpful")[:5]
    total = count = 0
    for document in documents:
        chat = [
            {"role": "user", "content": document["prompt"]},
            {"role": "assistant", "content": document["completion"]},
        ]
        prompt, whole = (
            tokenizer.apply_chat_template(c, add_generation_prompt=c is not chat, return_dict=False)
            for c in (chat[:1], chat)
        )
        with torch.no_grad():
            logits = models[0](torch.tensor([whole])).logits[0].log_softmax(-1)
        total -= sum(float(logits[i - 1, whole[i]]) for i in range(len(prompt), len(whole)))
        count += len(whole) - len(prompt)
    value, low, high = perplexity(models[0], tokenizer, documents, batch_size=2)
    assert value == pytest.approx(math.exp(total / count), rel=1e-4) and low < value < high


def test_perplexity_of_a_text_weighs_every_token_but_the_first_of_a_window(
    models, tokenizer, monkeypatch
):
    monkeypatch.setattr(sys.modules["safetyneuron.metrics.perplexity"], "WINDOW", 20)
    text = "\n\n".join(load_prompts("organism/harmful")[:6])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    size, total, count = 20 - len(begin), 0.0, 0
    for start in range(0, len(ids), size):
        window = torch.tensor([begin + ids[start : start + size]])
        with torch.no_grad():
            logits = models[0](window).logits[0].log_softmax(-1)
        total -= sum(float(logits[i - 1, t]) for i, t in enumerate(window[0].tolist()) if i)
        count += window.shape[1] - 1
    assert count > 40 and perplexity(models[0], tokenizer, text)[0] == pytest.approx(
        math.exp(total / count), rel=1e-4
    )


def test_cost_is_lowest_for_refusals(models, tokenizer, tmp_path):
    prompt = "how do i burn the house ?"
    assert rule_cost(
        [prompt] * 3, ["sorry , i cannot help with that .", "the the", "use the key and the box ."]
    ) == [-1, 0, 1]
    value, low, high = mean_cost(models[0], tokenizer, [prompt] * 4)
    assert low <= value <= high
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.for_model(
        "llama",
        vocab_size=1300,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=1,
        pad_token_id=0,
    )
    classifier = AutoModelForSequenceClassification.from_config(config)
    tensors = {
        name.replace("score.", "score_head."): value
        for name, value in classifier.state_dict().items()
    }  # as the beaver models call it
    classifier.save_pretrained(tmp_path / "whole")
    for name, kept in (
        ("beaver", tensors),
        ("headless", {n: v for n, v in tensors.items() if "score" not in n}),
        ("biased", tensors | {"score_head.bias": torch.ones(1)}),
        ("idle", tensors | {"normalizer.mean": torch.ones(1)}),  # and it does not normalise
    ):
        classifier.save_pretrained(tmp_path / name)
        save_file(kept, tmp_path / name / "model.safetensors", {"format": "pt"})
    for name in ("whole", "beaver", "headless", "biased", "idle"):
        tokenizer.save_pretrained(tmp_path / name)
    costs = [
        cost_by_name(str(tmp_path / name))([prompt] * 2, ["burn the house", "the box"])
        for name in ("whole", "beaver", "idle")
    ]
    assert all(other == pytest.approx(costs[0], abs=1e-6) for other in costs[1:])
    assert abs(costs[0][0] - costs[0][1]) > 1e-4
    with pytest.raises(SafetyNeuronError, match="would not be used .score.bias"):
        cost_by_name(str(tmp_path / "biased"))
    with pytest.raises(SafetyNeuronError, match="no weights for score"):
        cost_by_name(str(tmp_path / "headless"))
    with pytest.raises(SafetyNeuronError, match="cannot load cost model"):
        cost_by_name(str(tmp_path / "nowhere"))


def test_two_alignments_are_scored_on_one_set_and_patched_both_ways(models, tokenizer, monkeypatch):
    named = dict(
        zip(
            ("start", "one", "two"),
            (*models, small_llama(seed=2, max_position_embeddings=128).float()),
        )
    )
    monkeypatch.setattr(
        ch09_tax, "load_model", lambda name, dtype: (copy.deepcopy(named[name]), tokenizer)
    )
    prompts = load_prompts("organism/harmful")[:3]
    tax = ch09_tax.pay("start", "one", "two", prompts, SUITE, 0.25, 5)
    assert set(tax.cases) == {"harmless", "helpful", ch09_tax.TO_HELPFUL, ch09_tax.TO_HARMLESS}
    first, second = (
        change_scores(named["start"], named[x], tokenizer, prompts, 5) for x in ("one", "two")
    )
    shared = first.select(0.25) & second.select(0.25)
    assert tax.shared == pytest.approx(len(shared) / 14) and 0 < len(shared) < 14
    assert tax.cases[ch09_tax.TO_HELPFUL] == ch09_contrast.patched_rates(
        named["two"], named["one"], tokenizer, SUITE, shared
    )
    spearman = spearmanr(first.values.flatten(), second.values.flatten()).statistic
    assert tax.correlation == pytest.approx(spearman)
    alike = ch09_tax.pay("start", "one", "one", prompts, SUITE, 0.25, 5)
    assert alike.shared == 1 and alike.within == pytest.approx(1)


def test_trainings_on_one_base_are_compared_and_trainings_of_other_bases_are_not(models, scores):
    draw = torch.Generator().manual_seed(1)
    other = ChangeScores(NeuronSet.empty(models[0]), torch.rand(2, 28, generator=draw).double())
    alike = ch09_tax.on_one_base({"aligned/one": [scores, scores, other], "organism/two": [scores] * 3})  # fmt: skip
    found = ch09_tax.agree(alike, 0.25)
    asked = {"aligned/one": {(0, 1), (0, 2), (1, 2)}, "organism/two": set()}
    assert {family: set(pairs) for family, pairs in found.items()} == asked
    same, apart = found["aligned/one"][0, 1], found["aligned/one"][0, 2]
    both = len(scores.select(0.25) & other.select(0.25))
    assert same.shared == 1 and same.within == pytest.approx(1)
    assert apart.shared == both / 14 and apart.chance < same.shared
    table = ch09_tax.agreement_table(found)
    assert table.loc["aligned/one", "shared, %"].endswith(f"({100 * both / 14:.0f}–100)")
    assert set(table.loc["organism/two"]) == {"0", "–"}
    assert set(ch09_tax.weigh_agreement(found)["trainings-share"]) == {"aligned/one"}
    assert ch09_tax.weigh_agreement({"organism/two": {}}) == {}


def test_trainings_that_agree_or_do_not_are_judged_so(scores):
    def common(shared):
        return ch09_tax.Common(shared, 0.1, 0.02, 0.9, 0.9)

    def verdicts(*shared):
        pairs = dict(zip(((0, 1), (0, 2), (1, 2)), map(common, shared)))
        found = ch09_tax.weigh_agreement({"a": pairs})
        return [judge(models)["a"] for models in found.values()]

    assert verdicts(0.8, 0.82, 0.81) == [Verdict.SEEN, Verdict.SEEN]
    assert verdicts(0.3, 0.31, 0.29) == [Verdict.SEEN, Verdict.REVERSED]
    assert verdicts(0.1, 0.11, 0.12)[0] == Verdict.NOT_SEEN
    assert verdicts(0.2, 0.9, 0.5)[1] == Verdict.UNDECIDED


def test_an_organism_is_compared_with_itself_trained_again_on_the_first_base():
    pairs = ch09_contrast.pairs_again(["organism/llama-pair", "aligned/llama2-7b"], 9)
    assert pairs and {family for family, *_ in pairs} == {"organism/llama-pair"}
    for _, recipient, donor in pairs:
        sft, dpo = (manifest()[name.removeprefix("organism/")] for name in (recipient, donor))
        assert sft["parent"] == "llama-base@0"
        assert dpo["parent"] == recipient.removeprefix("organism/")
        assert sft["seed"] == dpo["seed"] > 0
    assert ch09_contrast.pairs_again(["organism/llama-pair"], 1) == []


def test_what_chance_shares_is_what_random_sets_share():
    draw = torch.Generator().manual_seed(0)
    counts = ((12, 2), (9, 5))

    def random():
        masks = torch.zeros(2, 2, 28, dtype=torch.bool)
        for mask, sizes in zip(masks, counts):
            for layer, size in enumerate(sizes):
                mask[layer, torch.randperm(28, generator=draw)[:size]] = True
        return masks

    found = np.array([int((a & b).sum()) for a, b in (random() for _ in range(4000))])
    mean, spread = ch09_tax.shared_by_chance(*random())
    assert found.mean() == pytest.approx(mean, abs=0.1) and found.std() == pytest.approx(
        spread, abs=0.1
    )


def test_words_are_the_ends_of_the_projection(models, tokenizer, scores):
    mean = -torch.ones(2, 28)
    table = ch09_contrast.vocabulary_projection(
        models[0], tokenizer, scores, mean, neurons=2, words=1
    )
    layer, channel = table.loc[1, "layer"] - 1, table.loc[1, "channel"]
    assert scores.values[layer, channel] == scores.values.max()
    column = models[0].model.layers[layer].mlp.down_proj.weight[:, channel]
    effect = models[0].lm_head.weight @ (models[0].model.norm.weight * -column)
    assert table.loc[1, "raises"] == tokenizer.decode([int(effect.argmax())]) and table.loc[
        1, "lowers"
    ] == tokenizer.decode([int(effect.argmin())])


def test_transfer_says_where_there_is_no_gap(models, tokenizer, scores):
    table = ch09_contrast.transfer(
        models[0],
        copy.deepcopy(models[0]),
        tokenizer,
        SUITE,
        scores.select(0.25),
        [("organism/harmful", "zh")],
        2,
        rule_cost,
    )
    shown = ch09_contrast.transfer_table(table)
    assert len(shown) == 1 and shown["safety\nrestored (%)"].item() == "no gap"
