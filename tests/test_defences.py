import json

import pytest
from conftest import scores_with, small_llama
from test_detection import random_profile

from safetyneuron import NeuronSet, Rate, SafetyNeuronError, load_documents
from safetyneuron.attacks import GCG, PAIR, AttackResult, load_requests
from safetyneuron.book import tables, verdicts
from safetyneuron.chapters import ch05_sn_tune, ch07_rsn_tune, ch08_ablations
from safetyneuron.kept import defences
from safetyneuron.kept.defences import Column
from safetyneuron.metrics import Suite
from safetyneuron.metrics.suite import evaluate
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


EXAMINATION = defences.Examination(
    SUITE,
    LANGUAGES,
    load_requests("organism/harmful")[:2],
    {"GCG": GCG(2, 4, 8, 3), "PAIR": PAIR(2, 2)},
)


def test_columns_hold_every_set_and_seed_and_are_made_once(
    model, tokenizer, sets, documents, breaking, monkeypatch
):
    before = fingerprint(model)

    def run():
        return defences.columns(
            model, tokenizer, EXAMINATION, documents, sets, 2, breaking, learning_rate=1e-2
        )

    results = run()
    names = (defences.CIRCUIT_BREAK, *defences.RANDOM, *defences.RANDOM.values())
    assert {name: len(draws) for name, draws in results.items()} == {
        defences.ORIGIN: 1,
        **dict.fromkeys(names, 2),
    }
    asked = {(m, l) for m in ("asr", "coherent", "over_refusal", "helpful") for l in LANGUAGES} | {
        (m, a) for m in ("asr", "coherent") for a in ("GCG", "PAIR")
    }
    assert all(set(column.rates) == asked for draws in results.values() for column in draws)
    tuned = results[defences.EQ3][0]
    assert tuned.rates["asr", "GCG"].value == tuned.attacks["GCG"].rate("keyword").value
    assert (
        results[defences.CIRCUIT_BREAK][0].parameters > 0
        and results[defences.CIRCUIT_BREAK][0].attacks != results[defences.ORIGIN][0].attacks
    )
    assert (
        results[defences.EQ3][0].parameters == len(sets[defences.EQ3]) * model.config.hidden_size
    )  # every row and column is as wide as the model
    assert fingerprint(model) == before
    for name in ("train_neurons", "train_adapters", "search_and_judge"):
        monkeypatch.setattr(defences, name, None)
    assert run() == results


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
            EXAMINATION.column(model, tokenizer)
    assert asked == ["GCG", "PAIR", "PAIR"]


def test_what_is_kept_of_an_attack_holds_no_text(model, tokenizer, tmp_path):
    EXAMINATION.column(model, tokenizer)
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


def test_a_way_of_tuning_without_neurons_in_some_training_is_left_out(sets):
    some, other = sets.values()
    found = {ch07_rsn_tune.SN: some, ch07_rsn_tune.RSN: some - other, ch07_rsn_tune.EQUAL: other}
    nothing = found | {ch07_rsn_tune.RSN: some - some}
    assert ch07_rsn_tune.ways_of({"a": found}) == list(ch07_rsn_tune.TUNED)
    assert ch07_rsn_tune.RSN not in ch07_rsn_tune.ways_of({"a": found, "b": nothing})


def test_no_documents_is_the_model_as_it_is(model, tokenizer, sets, documents):
    table = ch08_ablations.by_documents(
        model, tokenizer, SUITE, documents, [0, 2], sets, learning_rate=1e-2
    )
    whole = evaluate(model, tokenizer, SUITE)
    rows = table[table["documents"] == 0]
    assert len(table) == 2 * 2 * len(whole) and all(
        whole[row.measure, row.set] == row.rate for row in rows.itertuples()
    )


def test_the_grid_has_a_row_per_cell_and_measure(model, tokenizer, sets, documents):
    table = ch08_ablations.grid(
        model, tokenizer, SUITE, documents, sets[defences.EQ3], [1, 2], [1e-3, 1e-2]
    )
    assert len(table) == 4 * len(evaluate(model, tokenizer, SUITE))
    assert not table.duplicated(["epochs", "learning_rate", "measure", "set"]).any()


def columns_of(asr, over, accuracy):
    rates = {("over_refusal", "en"): over, ("helpful", "en"): 100 - over} | {
        ("accuracy", t): accuracy for t in "abc"
    }
    rates |= {
        ("asr", "en"): asr,
        ("coherent", "en"): asr,
        ("asr", "GCG"): 100,
        ("coherent", "GCG"): 50,
    }
    attacks = {
        "GCG": AttackResult({"keyword": [True], "coherent": [False]}, [1500], [30000], [[1.0]])
    }
    return [Column(scores_with(rates), 3.25, 1234, attacks)]


RESULTS = {
    defences.ORIGIN: columns_of(90, 0, 80),
    defences.CIRCUIT_BREAK: columns_of(40, 0, 60),
    defences.EQ3: columns_of(2, 60, 80),
    defences.SPECIFIC: columns_of(2, 0, 40),
    defences.RANDOM[defences.EQ3]: columns_of(3, 0, 79),
    defences.RANDOM[defences.SPECIFIC]: columns_of(89, 0, 79),
}


ASKED = ("abc", ["en"], ["GCG"])


def test_table_2_stands_beside_the_paper_with_its_slip():
    table = tables.defence_table(2, {"m": RESULTS}, "Llama3-8B-Instruction", *ASKED)
    paper = table["Paper", "Llama3-8B-Instruction"]
    assert paper.loc[("Attack success", "direct, en")].tolist() == [
        "30.0",
        "0.0",
        "0.0",
    ] and paper.loc[("Accuracy", "c (paper: GSM8K)")].tolist() == ["63.2", "64.3", "69.6"]
    assert paper.loc[("Attack success", "GCG, en")].tolist() == [
        "74.0",
        "3.0",
        "4.0",
    ] and paper.loc[("Attack success", "average with direct, en")].tolist() == [
        "65.5",
        "3.0",
        "2.0",
    ]
    assert paper.loc[("Coherent compliance", "GCG, en")].tolist() == ["–"] * 3
    assert paper.loc[("Accuracy", "average"), "SN-Tune"] == "68.4*\n(its rows: 70.6)"
    here = table["Here: m", "Eq 3", "SN-Tune"]
    assert (
        here["Attack success", "direct, en"].startswith("2.0\n[")
        and here["Cost", "training, s (paper: min)"] == "3.2"
    )
    assert here["Attack success", "average with direct, en"].startswith("51.0\n[") and here[
        "Coherent compliance", "average with direct, en"
    ].startswith("26.0\n[")
    assert here["Over-refusal", "en"].startswith("60.0") and here[
        "Helpful answers", "en"
    ].startswith("40.0")


def test_table_3_marks_its_slip():
    table = tables.defence_table(3, {"m": RESULTS}, "Mistral-7B-v0.1", *ASKED)
    assert (
        table.loc[("Accuracy", "average"), ("Paper", "Mistral-7B-v0.1", "Origin.")]
        == "62.0*\n(its rows: 64.5)"
    )


def test_costs_of_attacks_are_means_over_requests():
    assert ch05_sn_tune.costs_of_attacks(RESULTS, ["GCG"])["Eq 3", "SN-Tune"].tolist() == [
        "1,500\n30,000 tokens"
    ]


def test_verdicts_say_what_changed_and_at_what_price(monkeypatch):
    said = {}
    monkeypatch.setattr(verdicts, "glue_list", lambda name, items: said.update({name: items}))
    verdicts.glue_defence({"m": RESULTS}, *ASKED)
    breaker, eq3, specific = said["verdict_defence"]
    assert (
        "attack success falls in en (90.0" in eq3
        and "over-refusal rises in en (0.0" in eq3
        and "seen, at the price" in eq3
    )
    assert "the average over direct requests and attacks (95.0" in eq3
    assert (
        "random neurons, attack success does not differ measurably" in eq3
        and "random neurons, attack success is lower in en (89.0" in specific
    )
    assert "accuracy falls in all tasks (80.0" in specific and "not seen" in specific
    assert "Circ-Break: attack success falls in en (90.0" in breaker and "random" not in breaker
    verdicts.glue_differences({"m": RESULTS}, *ASKED)
    eq3, _ = said["verdict_differences"]
    assert (
        "Circ-Break trains 3.2 s for 1,234 parameters, SN-Tune: Eq 3 3.2 s for 1,234 parameters"
        in eq3
    )
    assert (
        "over-refusal is lower in en (60.0" in eq3
        and "the share of helpful answers is higher in en (40.0" in eq3
        and "accuracy is lower in all tasks (80.0" in eq3
        and "attack success is higher in en (2.0" in eq3
    )


def test_safety_that_rises_in_one_language_and_falls_in_another_is_not_seen():
    def rates(en, zh):
        return {
            ("asr", "en"): Rate(en, 100),
            ("asr", "zh"): Rate(zh, 100),
            ("accuracy", "all tasks"): Rate(80, 100),
        } | {("over_refusal", l): Rate(0, 100) for l in LANGUAGES}

    assert verdicts._safer(rates(2, 10), rates(40, 10), LANGUAGES) == "seen"
    assert verdicts._safer(rates(2, 60), rates(40, 10), LANGUAGES) == "not seen"


def test_every_set_has_its_random_match(sets):
    everything = defences.with_random(sets, 3)
    for name, control in defences.RANDOM.items():
        assert (
            everything[control] == NeuronSet.random_like(sets[name], 3)
            and everything[control].counts() == sets[name].counts()
        )


def test_too_few_documents_and_a_file_in_two_languages_are_refused(tmp_path):
    with pytest.raises(SafetyNeuronError, match="lower the number"):
        defences.by_language(load_documents, "organism/refusals", 10**6, LANGUAGES)
    path = tmp_path / "own.csv"
    path.write_text("prompt,completion\na,b\n")
    with pytest.raises(SafetyNeuronError, match="give one language"):
        defences.by_language(load_documents, str(path), 1, LANGUAGES)
    assert len(defences.by_language(load_documents, str(path), 1, ["en"])) == 1
