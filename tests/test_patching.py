import copy
import math
import sys

import numpy as np
import pytest
import torch
from conftest import scores_with, small_llama
from safetensors.torch import save_file

from safetyneuron import NeuronSet, Rate, SafetyNeuronError, load_documents, load_prompts
from safetyneuron.chapters import ch09_contrast
from safetyneuron.detectors.change_scores import ChangeScores
from safetyneuron.metrics import Suite, cost_by_name, mean_cost, perplexity, rule_cost
from safetyneuron.metrics.suite import evaluate
from safetyneuron.metrics.verdict import Verdict, judge

SUITE = Suite(("organism/harmful",), "organism/benign", (), prompts=4)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAFETYNEURON_CACHE", str(tmp_path))


@pytest.fixture
def models():
    return [small_llama(seed=seed, max_position_embeddings=128).float() for seed in (0, 1)]


@pytest.fixture
def scores(models):
    return ChangeScores(
        models[0], torch.rand(2, 28, generator=torch.Generator().manual_seed(0)).double()
    )


def test_restored_is_the_share_of_the_gap_that_is_closed():
    value, low, high = ch09_contrast.restored(Rate(90, 100), Rate(10, 100), Rate(30, 100))
    assert value == pytest.approx(0.75) and low < 0.75 < high
    assert low == pytest.approx((0.9 - Rate(30, 100).interval[1]) / 0.8)
    assert all(
        math.isnan(x) for x in ch09_contrast.restored(Rate(50, 100), Rate(45, 100), Rate(30, 100))
    )


def test_the_share_restored_is_what_the_patch_closes_of_the_gap_in_every_training():
    def runs(*hits):
        return [[scores_with({("asr", "s"): h, ("helpful", "b"): 90})] for h in hits]

    ends = {"recipient": runs(90, 80, 100), "donor": runs(10, 0, 0)}
    share = ch09_contrast.estimate_restored(*ends.values(), runs(30, 20, 40), "s")
    gaps, closed = [80, 80, 100], [60, 60, 60]
    assert share.value == pytest.approx(sum(closed) / sum(gaps)) and share.trainings == 3
    judged = {
        ch09_contrast.CHANGE: runs(10, 0, 1),
        ch09_contrast.RANDOM: [[*a, *b] for a, b in zip(runs(90, 80, 99), runs(88, 79, 100))],
        ch09_contrast.LAST: runs(10, 0, 2),
    }
    verdicts = judge(ch09_contrast.weigh_claims(ends, judged, "s", "b"))
    assert verdicts["patch-restores"] is verdicts["patch-above-random"] is Verdict.SEEN
    assert verdicts["patch-above-last"] is not Verdict.SEEN
    table = ch09_contrast.restored_table(ends, judged, "s")
    assert table.loc[ch09_contrast.CHANGE, "by training"] == "100, 100, 99"


def test_the_table_of_the_curve_holds_both_models_and_every_condition():
    runs = [[scores_with({("asr", "s"): 50})]]
    curves = {("a", 0.1): runs, ("a", 0.5): runs}
    ends = {"recipient": runs, "donor": runs}
    table = ch09_contrast.tabulate_restoration(curves, ends, [("asr", "s")])
    assert table[["condition", "fraction"]].values.tolist() == [
        ["recipient", 0.0],
        ["donor", 0.0],
        ["a", 0.1],
        ["a", 0.5],
    ]


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
    assert [len(sets) for sets in found.values()] == [1, 0, 1]


def test_neurons_alone_are_ordered_by_what_they_do(models, tokenizer, scores):
    chosen = scores.select(0.1)
    single = ch09_contrast.alone(*models, tokenizer, SUITE, chosen)
    assert (
        len(single) == len(chosen)
        and single["rate"].map(lambda rate: rate.value).is_monotonic_increasing
    )
    best = single.iloc[0]
    assert chosen.masks["down"][best["layer"] - 1, best["channel"]]
    rest = ch09_contrast.without(chosen, best["layer"], best["channel"])
    assert len(rest) == len(chosen) - 1 and len(rest & chosen) == len(rest)


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


@pytest.mark.organism
def test_the_safeguard_sees_harm_where_there_is_some_and_not_in_noise(chat, base, monkeypatch):
    monkeypatch.delenv("SAFETYNEURON_CACHE")
    model, tokenizer = base
    everything = NeuronSet(
        NeuronSet.empty(model).masks | {"down": torch.ones(6, 288, dtype=torch.bool)}
    )
    sets = ("organism/harmful", "organism/benign")

    def guard():
        return ch09_contrast.safeguard(model, tokenizer, sets, sets, 40, {"all": everything}).loc[
            "all"
        ]

    assert guard()["accuracy"].value > 0.8 and guard()["coverage"].value > 0.9
    noise = np.random.default_rng(0)
    monkeypatch.setattr(
        ch09_contrast,
        "last_activations",
        lambda model, tokenizer, prompts: noise.normal(size=(len(prompts), 6 * 288)),
    )
    assert 0.25 < guard()["accuracy"].value < 0.75
    monkeypatch.setattr(
        ch09_contrast,
        "unsafe_answers",
        lambda model, tokenizer, harmful, benign: np.zeros(len(harmful + benign), bool),
    )
    with pytest.raises(SafetyNeuronError, match="answers to the train prompts are all safe"):
        guard()


@pytest.mark.organism
def test_one_file_is_not_both_training_and_test(base, tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("\n".join(load_prompts("organism/harmful")[:10]))
    with pytest.raises(SafetyNeuronError, match="both training and test file"):
        ch09_contrast.safeguard(
            *base, (str(path), "organism/benign"), (str(path), "organism/benign"), 10, {}
        )
    with pytest.raises(SafetyNeuronError, match="give one language"):
        ch09_contrast.transfer(
            base[0],
            base[0],
            base[1],
            SUITE,
            NeuronSet.empty(base[0]),
            [(str(path), "en"), (str(path), "zh")],
            1,
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


def test_two_alignments_are_patched_both_ways(models, tokenizer, scores):
    named = {"one": models[0], "two": models[1]}
    tax = ch09_contrast.alignment_tax(named, tokenizer, SUITE, {"one": scores, "two": scores}, 0.25)
    assert list(tax.cases) == ["one", "two", "two, patched from one", "one, patched from two"]
    assert tax.overlap == 1 and tax.correlation == pytest.approx(1)
    assert tax.cases["two, patched from one"] == ch09_contrast.patched_rates(
        models[1], models[0], tokenizer, SUITE, scores.select(0.25)
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
    )
    assert (
        ch09_contrast.transfer_table(table).loc["organism/harmful, zh", "safety restored (%)"]
        == "no gap"
    )
