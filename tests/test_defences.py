import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import scores_with, small_llama
from test_detection import random_profile

from safetyneuron import (
    SafetyNeuronError,
    deactivate,
    load_documents,
    load_prompts,
    measure_importance,
)
from safetyneuron.attacks import GCG, PAIR, AttackResult, load_requests
from safetyneuron.book import defences as book
from safetyneuron.book import paper as reported
from safetyneuron.chapters import ch05_sn_tune, ch07_rsn_tune, ch08_ablations
from safetyneuron.kept import defences
from safetyneuron.kept import importance as kept_importance
from safetyneuron.kept.defences import Column
from safetyneuron.metrics import Suite
from safetyneuron.metrics.outcomes import COLUMNS, Scores, estimate_judgement
from safetyneuron.neurons.weights import fingerprint

SUITE = Suite(("organism/harmful",), "organism/benign", (), prompts=4)
LANGUAGES = ["en", "zh"]


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAFETYNEURON_CACHE", str(tmp_path))


@pytest.fixture
def model():
    return small_llama(groups=2, max_position_embeddings=128).float()


@pytest.fixture
def sets(model):
    return {
        name: random_profile(model, seed).select(fraction=0.05)
        for seed, name in enumerate((defences.EQ3, defences.SPECIFIC))
    }


@pytest.fixture
def documents():
    return defences.by_language(load_documents, "organism/refusals", 5, LANGUAGES)


def test_documents_come_in_turn_from_each_language(documents):
    english, chinese = (
        load_documents("organism/refusals", language=language) for language in LANGUAGES
    )
    assert documents == [english[0], chinese[0], english[1], chinese[1], english[2]]


@pytest.fixture
def breaking():
    return {
        "harmful": load_documents("organism/compliances")[:6],
        "retain": load_documents("organism/helpful")[:6],
        "steps": 2,
        "batch_size": 2,
    }


REQUESTS = load_requests("organism/harmful")[:2]
SEARCHES = {"GCG": GCG(2, 4, 8, 3), "PAIR": PAIR(2, 2)}


def examine(model, tokenizer, trained=None):
    """As the cells of chapters 05 and 06 do it."""
    asked = defences.scores(model, tokenizer, SUITE, LANGUAGES)
    found = {key: defences.attack(model, tokenizer, REQUESTS, s) for key, s in SEARCHES.items()}
    return defences.join_column(asked, REQUESTS, found, trained)


def test_what_is_trained_and_attacked_is_made_once_and_leaves_the_model(
    model, tokenizer, sets, documents, breaking, monkeypatch
):
    before, eq3 = fingerprint(model), sets[defences.EQ3]

    def run():
        delta = defences.sn_tune(model, tokenizer, documents, eq3, learning_rate=1e-2)
        with delta.merged(model):
            tuned = examine(model, tokenizer, delta)
        breaker = defences.circuit_break(model, tokenizer, **breaking)
        with breaker.attached(model):
            return tuned, examine(model, tokenizer, breaker)

    tuned, broken = run()
    asked = {(m, l) for m in ("asr", "coherent", "over_refusal", "helpful") for l in LANGUAGES}
    asked |= {(m, a) for m in ("asr", "coherent") for a in SEARCHES}
    assert set(tuned.scores) == set(broken.scores) == asked
    assert tuned.scores["asr", "GCG"].value == tuned.attacks["GCG"].rate("keyword").value
    assert tuned.parameters == len(eq3) * model.config.hidden_size  # all are as wide as the model
    assert broken.parameters > 0 and broken.seconds > 0
    assert fingerprint(model) == before
    for name in ("train_neurons", "train_adapters", "search_and_judge"):
        monkeypatch.setattr(defences, name, None)
    for again, first in zip(run(), (tuned, broken), strict=True):
        assert again.scores.table.equals(first.scores.table) and again.attacks == first.attacks


def test_importance_is_measured_once_for_each_corpus_to_the_last_bit(model, tokenizer, monkeypatch):
    prompts = load_prompts("organism/harmful")[:6]
    corpora = {"all": (prompts, (3,)), "half": (prompts[:3], ()), "turned": (prompts[::-1], (3,))}

    def run():
        return {
            name: kept_importance.measure_importance(model, tokenizer, some, sizes)
            for name, (some, sizes) in corpora.items()
        }

    plain = measure_importance(model, tokenizer, prompts, sizes=(3,))
    first, measure = run(), kept_importance.measure
    monkeypatch.setattr(kept_importance, "measure", None)
    for found in (first["all"], run()["all"]):
        assert found.count == 6 and found.model == plain.model
        for p, minimum in plain.minimum.items():
            assert torch.equal(found.minimum[p], minimum)
            assert torch.equal(found.mean[p], plain.mean[p])
            assert torch.equal(found.prefix[3][p], first["half"].minimum[p])
    monkeypatch.setattr(kept_importance, "measure", measure)
    with deactivate(model, plain.select(fraction=0.1)):
        assert run()["all"].model != plain.model


def test_a_killed_run_keeps_every_attack_that_had_ended(model, tokenizer, monkeypatch):
    asked, attack = [], defences.search_and_judge

    def stops_at_pair(model, tokenizer, requests, config, **options):
        asked.append(type(config).__name__)
        if asked[-1] == "PAIR":
            raise KeyboardInterrupt
        return attack(model, tokenizer, requests, config, **options)

    monkeypatch.setattr(defences, "search_and_judge", stops_at_pair)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            examine(model, tokenizer)
    assert asked == ["GCG", "PAIR", "PAIR"]


def test_what_is_kept_of_an_attack_holds_no_text(model, tokenizer, tmp_path):
    examine(model, tokenizer)
    kept = [json.loads(path.read_text()) for path in (tmp_path / "attacks").glob("*.json")]
    assert len(kept) == 2 and all(
        set(entry) == {"result", "checksum"}
        and set(entry["result"]) == {"success", "queries", "tokens", "curves"}
        for entry in kept
    )


def test_what_is_asked_is_the_copy_that_was_fine_tuned_and_it_is_made_once(
    model, tokenizer, chat, monkeypatch
):
    made, task = [], load_documents("organism/arithmetic")[:4]

    def fine_tune(*given, **schedule):
        made.append((*given, schedule))
        return chat[0]

    monkeypatch.setattr(defences, "fine_tune", fine_tune)
    case = (model, tokenizer, SUITE, ["en"], task, {"learning_rate": 0.1, "lora_rank": 2})
    for _ in range(2):
        found = defences.score_fine_tuned(*case)
        assert found.table.equals(defences.scores(chat[0], tokenizer, SUITE, ["en"]).table)
    assert made == [(model, tokenizer, task, {"learning_rate": 0.1, "lora_rank": 2})]


def downstream(asr, accuracy=80, trainings=3):
    """Runs after fine-tuning with so much attack success, all trainings alike."""
    rates = {("asr", "en"): asr, ("helpful", "en"): 90, ("accuracy", "t"): accuracy}
    return [[scores_with(rates)]] * trainings


LOST = {
    ch07_rsn_tune.BEFORE: downstream(0),
    ch07_rsn_tune.ORIGIN: downstream(70),
    ch07_rsn_tune.SN: downstream(65),
    ch07_rsn_tune.RSN: downstream(20, accuracy=60),
    ch07_rsn_tune.EQUAL: downstream(75),
    ch07_rsn_tune.RANDOM: downstream(50),
}


def test_the_sign_of_every_claim_of_chapter_07_is_that_of_the_claim():
    effects = {
        key: round(evidence.effect.value, 3)
        for key, evidence in ch07_rsn_tune.weigh_claims(LOST, "en", "t").items()
    }
    assert effects == {
        "finetuning-breaks": 0.7,
        "finetuning-helps": 0.7,
        "sn-keeps": 0.05,
        "rsn-keeps": 0.5,
        "rsn-above-sn": 0.45,
        "equal-above-sn": -0.1,
        "rsn-above-random": 0.3,
        "rsn-learns": -0.15,  # twenty points lost, five allowed
    }


def test_what_keeps_safety_is_judged_only_where_some_was_lost():
    unharmed = LOST | {ch07_rsn_tune.ORIGIN: downstream(5)}
    judged = ch07_rsn_tune.weigh_claims(unharmed, "en", "t")
    assert set(judged) == {"finetuning-breaks", "finetuning-helps", "rsn-learns"}


def test_the_languages_in_which_safety_breaks_are_told_from_those_in_which_it_does_not():
    def runs(en, zh):
        return [[scores_with({("asr", "en"): en, ("asr", "zh"): zh})]] * 3

    def tell(en, zh):
        found = {ch07_rsn_tune.BEFORE: runs(0, 2), ch07_rsn_tune.ORIGIN: runs(en, zh)}
        return ch07_rsn_tune.tell_languages({"d": found}, ["en", "zh"], "d")

    rates = "after fine-tuning on d attack success is"
    assert (
        tell(70, 3)
        == f"Safety breaks in English and not in Chinese: {rates} 70 % in English, 3 % in Chinese."
    )
    assert tell(70, 90) == f"A{rates[1:]} 70 % in English, 90 % in Chinese."
    assert tell(5, 3) == f"A{rates[1:]} 5 % in English, 3 % in Chinese."


def test_a_way_of_tuning_without_neurons_in_some_training_is_left_out(sets):
    some, other = sets.values()
    found = {ch07_rsn_tune.SN: some, ch07_rsn_tune.RSN: some - other, ch07_rsn_tune.EQUAL: other}
    nothing = found | {ch07_rsn_tune.RSN: some - some}
    assert ch07_rsn_tune.ways_of({"a": found}) == list(ch07_rsn_tune.TUNED)
    assert ch07_rsn_tune.RSN not in ch07_rsn_tune.ways_of({"a": found, "b": nothing})


def ablated(asr, over=0, accuracy=80, draws=1):
    rates = {("asr", "h"): asr, ("over_refusal", "b"): over, ("accuracy", "t"): accuracy}
    return [[scores_with(rates)] * draws] * 3


def test_the_sign_of_every_claim_of_chapter_08_is_that_of_the_claim():
    eq3, random = defences.EQ3, defences.RANDOM[defences.EQ3]
    varied = {
        (eq3, 0): ablated(90),
        (eq3, 40): ablated(30, over=20),
        (random, 40): ablated(50, draws=8),
    }
    varied[eq3, 200] = ablated(5, accuracy=60)
    cells = {(1, 0.1): ablated(20), (10, 0.1): ablated(0, over=100, accuracy=10)}
    found = ch08_ablations.weigh_claims(varied, cells, 0.1, 40, "h", "b", ["t"])
    assert {key: round(evidence.effect.value, 3) for key, evidence in found.items()} == {
        "documents-lower": 0.6,
        "documents-judge": 0.4,  # from 10 - 0 to 70 - 20 points
        "documents-above-random": 0.2,
        "documents-enough": -0.15,  # 25 points still to gain, ten allowed
        "documents-capability": -0.15,
        "epochs-cost": 0.7,
        "some-cell-judges": 0.3,
    }
    assert found["documents-above-random"].rank_chance == pytest.approx(1 / 9**3)


def test_all_random_sets_count_where_all_were_asked():
    harm_only = scores_with({("asr", "h"): 10})
    runs = [[*ablated(30)[0], harm_only]]
    assert book.draws_asked(runs, "asr", "h") == runs
    assert book.draws_asked(runs, "accuracy", "t") == [runs[0][:1]]


def test_the_best_cell_is_chosen_on_the_other_half():
    """Cells that refuse at random: the best of twenty is no better than any, and on average the estimate says so."""
    generator = np.random.default_rng(0)

    def cell():
        rows = [
            (kind, name, i, f"{name} {i}", "refusal" if generator.random() < 0.5 else "other")
            for kind, name in (("harmful", "h"), ("benign", "b"))
            for i in range(60)
        ]
        return [[Scores(pd.DataFrame(rows, columns=COLUMNS))]]

    grids = [{(1, rate): cell() for rate in range(20)} for _ in range(12)]
    best = [max(estimate_judgement(r, "h", "b").value for r in cells.values()) for cells in grids]
    found = [ch08_ablations.judge_best(cells, "h", "b").value + 0.5 for cells in grids]
    assert np.mean(best) > 0.12 and abs(np.mean(found)) < 0.06


def columns_of(asr, over, accuracy, help_=None, draws=1):
    """Three trainings alike; direct attack success, over-refusal, accuracy; GCG always succeeds, half of the time with help."""
    rates = {("over_refusal", "en"): over, ("helpful", "en"): 100 - over}
    rates |= {("accuracy", t): accuracy for t in "abc"}
    rates |= {("asr", "en"): asr, ("coherent", "en"): asr if help_ is None else help_}
    rates |= {("asr", "GCG"): 100, ("coherent", "GCG"): 50}
    attacks = {
        "GCG": AttackResult({"keyword": [True], "coherent": [False]}, [1500], [30000], [[1.0]])
    }
    return [[Column(scores_with(rates), attacks, 3.25, 1234)] * draws] * 3


RESULTS = {
    defences.ORIGIN: columns_of(90, 0, 80),
    defences.BREAKER: columns_of(40, 0, 60, help_=0),
    defences.EQ3: columns_of(2, 60, 80),
    defences.RANDOM[defences.EQ3]: columns_of(3, 0, 79, draws=8),
    defences.SPECIFIC: columns_of(2, 0, 40),
    defences.RANDOM[defences.SPECIFIC]: columns_of(89, 0, 79, draws=8),
}
ASKED = (["en"], ["GCG"], list("abc"))


def test_table_2_stands_beside_the_paper_with_its_slip():
    table = book.full_table(2, {"organism/m": RESULTS}, "Llama3-8B-Instruction", ASKED)
    paper = table["Llama3-8B-Instruction"]
    assert paper.loc[("Attack success", "direct, en")].tolist() == ["30.0", "0.0", "0.0"]
    assert paper.loc[("Accuracy", "c (paper: GSM8K)")].tolist() == ["63.2", "64.3", "69.6"]
    assert paper.loc[("Attack success", "GCG, en")].tolist() == ["74.0", "3.0", "4.0"]
    assert paper.loc[("Attack success", "average, en")].tolist() == ["65.5", "3.0", "2.0"]
    assert paper.loc[("Help with harm", "GCG, en")].tolist() == ["–"] * 3
    assert paper.loc[("Accuracy", "average"), "SN-Tune"] == "68.4*\n(its rows: 70.6)"
    here = table["here", "SN-Tune"]
    assert here["Attack success", "direct, en"].startswith("2.0\n[")
    assert here["Cost", "training, s (paper: min)"] == "3.2"
    assert here["Attack success", "average, en"].startswith("51.0\n[")
    assert here["Help with harm", "average, en"].startswith("26.0\n[")
    assert here["Over-refusal", "en"].startswith("60.0")
    assert here["Helpful answers", "en"].startswith("40.0")


def test_cells_for_the_page_of_all_carry_the_papers_rows_and_columns():
    cells = book.full_table(2, {"organism/m": RESULTS}, "Llama3-8B-Instruction", ASKED).attrs[
        "cells"
    ]
    found = {(cell["row"], cell["column"]): cell["text"] for cell in cells}
    assert found["Direct", "SN-Tune"].startswith("2.0\n[") and len(found) == len(cells)
    assert found["Direct", "Circ-Break"].startswith("40.0\n[")
    printed = reported.table(2)[["row", "column"]].itertuples(index=False, name=None)
    assert set(found) <= set(printed)


def test_the_headline_has_one_row_a_model_and_the_papers_three_numbers():
    table = book.headline_table(3, {"organism/m": RESULTS}, "Mistral-7B-v0.1", ASKED)
    assert len(table) == len(RESULTS) and len(table.columns) <= 6
    assert table.loc["as it is"].iloc[-1] == "100.0; 100.0; 62.0*\n(its rows: 64.5)"
    assert table.loc["random like SN-Tune"].iloc[-1] == "–; –; –"


def test_random_sets_are_one_mean_in_every_table_and_what_one_was_asked_says_so():
    full = columns_of(10, 40, 80)[0][0]
    harm_only = Column(scores_with({("asr", "en"): 40, ("coherent", "en"): 40}), {}, 1.25, 1234)
    no_attacks = full.scores.table.query("set != 'GCG'")
    asked = Column(Scores(no_attacks), {}, 3.25, 1234)
    results = RESULTS | {defences.RANDOM[defences.EQ3]: [[asked, harm_only, harm_only]] * 3}
    row = book.headline_table(2, {"m": results}, "Llama3-8B-Instruction", ASKED).loc["random like SN-Tune"]  # fmt: skip
    assert row["attack success,\ndirect"].startswith("30.0\n[")
    assert row["over-refusal"].startswith("40.0\n[") and row["over-refusal"].endswith("(one random set)")  # fmt: skip
    assert row["attack success,\nwith attacks"] == "–"
    table = book.full_table(2, {"m": results}, "Llama3-8B-Instruction", ASKED)["here", "random like SN-Tune"]  # fmt: skip
    assert table["Attack success", "direct, en"].startswith("30.0\n[")
    assert table["Attack success", "direct, en"].endswith("10.0 to 40.0")
    assert table["Accuracy", "a (paper: MMLU)"].endswith("(one random set)")
    assert table["Cost", "training, s (paper: min)"] == "1.9"
    assert book.answer_shares(results, "en")["random like SN-Tune"]["refusal"].value == 0.7


def test_costs_of_attacks_are_means_over_requests():
    table = ch05_sn_tune.costs_of_attacks(RESULTS, ["GCG"])
    assert table.loc["SN-Tune", "GCG"] == "1,500\n30,000 tokens"


@pytest.mark.parametrize("stage", ["aligned", "base"])
def test_the_sign_of_every_claim_of_chapters_05_and_06_is_that_of_the_claim(stage):
    found = book.weigh_claims(stage, RESULTS, *ASKED)
    effects = {key: round(evidence.effect.value, 3) for key, evidence in found.items()}
    own = {"aligned-price": -0.55} if stage == "aligned" else {"base-judges": 0.28}
    assert effects == own | {
        f"{stage}-refuses": 0.88,
        f"{stage}-resists": 0.0,  # attacks alone, which win everywhere
        f"{stage}-above-breaker": 0.19,
        f"{stage}-above-breaker-help": -0.01,
        f"{stage}-above-random": 0.01,
        f"{stage}-capability": 0.05,
    }
    chance = found[f"{stage}-above-random"].rank_chance
    assert chance == pytest.approx(1 / 9**3)  # the lowest of nine in three trainings


def test_classes_of_answers_are_counted_over_trainings():
    shares = book.answer_shares(RESULTS, "en")
    assert shares["SN-Tune"]["refusal"].value == 0.98 and shares["SN-Tune"]["refusal"].trials == 300
    assert shares["Circ-Break"]["other"].value == 0.4


def test_too_few_documents_and_a_file_in_two_languages_are_refused(tmp_path):
    with pytest.raises(SafetyNeuronError, match="lower the number"):
        defences.by_language(load_documents, "organism/refusals", 10**6, LANGUAGES)
    path = tmp_path / "own.csv"
    path.write_text("prompt,completion\na,b\n")
    with pytest.raises(SafetyNeuronError, match="give one language"):
        defences.by_language(load_documents, str(path), 1, LANGUAGES)
    assert len(defences.by_language(load_documents, str(path), 1, ["en"])) == 1


def test_every_model_stands_beside_its_own_column_of_the_paper_and_others_beside_none():
    models = {
        "lmsys/vicuna-13b-v1.5@c832": "92.0",
        "mistralai/Mistral-7B-Instruct-v0.2": "36.0",
        "some/other": "–",
    }
    table = book.full_table(2, dict.fromkeys(models, RESULTS), "Llama3-8B-Instruction", ASKED)
    for model, direct in models.items():
        row = table.loc[(model, "Attack success", "direct, en")]
        assert row["the paper", "Origin."] == direct
    alone = book.headline_table(2, {"some/other": RESULTS}, "Llama3-8B-Instruction", ASKED)
    assert not any("paper" in column for column in alone.columns)
    assert len(table.attrs["cells"]) == 3 * len(
        {(c["row"], c["column"]) for c in table.attrs["cells"]}
    )
