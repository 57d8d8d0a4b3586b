import numpy as np
import pandas as pd
import pytest
import torch
from test_detection import random_profile

from safetyneuron import NeuronSet, Rate
from safetyneuron.book import glue, labels, tables
from safetyneuron.chapters import ch03_mechanism, ch04_languages
from safetyneuron.metrics.outcomes import COLUMNS, Scores
from safetyneuron.metrics.verdict import Verdict, judge
from safetyneuron.neurons.architecture import ATTENTION, PROJECTIONS


@pytest.fixture
def neurons(model):
    return random_profile(model, 3).select(fraction=0.2)


def test_structures_add_up_and_enrichment_is_one_for_everything(model, neurons):
    table = ch03_mechanism.structures(neurons)
    assert (
        table.loc[list(PROJECTIONS), "neurons"].sum()
        == table.loc[["attention", "feed-forward"], "neurons"].sum()
        == len(neurons)
    )
    assert table.loc["attention", "neurons"] == len(neurons.only(ATTENTION))
    assert table.loc["attention", "share of its units"] == neurons.share_in(ATTENTION, units=True)
    assert (
        table.loc["gate", "share of its units"] <= table.loc["feed-forward", "share of its units"]
    )
    everything = NeuronSet({p: torch.ones_like(mask) for p, mask in neurons.masks.items()})
    for column in ("enrichment", "enrichment of units"):
        assert (ch03_mechanism.structures(everything)[column] == 1).all()
        assert (ch03_mechanism.layers(everything)[column] == 1).all()


def test_layers_count_what_lies_in_them(neurons):
    table = ch03_mechanism.layers(neurons)
    for layer in table.index:
        assert table.loc[layer, "neurons"] == sum(
            int(mask[layer - 1].sum()) for mask in neurons.masks.values()
        )
    assert table["units"].sum() == len(neurons.units())


def test_ranges_of_layers_split_a_set(neurons):
    first, second = neurons.within(1, 1), neurons.within(2, 2)
    assert first | second == neurons and len(first & second) == 0
    assert neurons.within(1, 2) == neurons
    assert not first.masks["q"][1].any() and first.masks["up"][0].equal(neurons.masks["up"][0])


def sweep_table(hits):
    rows = [("whole", 0.0, "asr", "s", Rate(5, 100))] + [
        ("a", f, "asr", "s", Rate(n, 100)) for f, n in hits.items()
    ]
    return pd.DataFrame(rows, columns=["condition", "fraction", "measure", "set", "rate"])


def test_onset_and_collapse_follow_their_rules():
    table = sweep_table({0.1: 8, 0.4: 85, 0.2: 40, 0.3: 79})
    assert ch03_mechanism.onset_and_collapse(table, "a", "asr") == (
        0.2,
        0.4,
    )  # 8 of 100 is within the interval of 5 of 100
    onset, collapse = ch03_mechanism.onset_and_collapse(sweep_table({0.1: 5, 0.2: 6}), "a", "asr")
    assert onset != onset and collapse != collapse


def test_overlap_is_the_share_of_the_second_set(model):
    a, b = (random_profile(model, seed).select(fraction=f) for seed, f in ((0, 0.1), (1, 0.4)))
    table = ch04_languages.overlap({"a": a, "b": b})
    assert table.loc["a", "b"] == len(a & b) / len(b) and table.loc["b", "a"] == len(a & b) / len(a)
    assert ch04_languages.off_diagonal(table) == pytest.approx(
        (table.loc["a", "b"] + table.loc["b", "a"]) / 2
    )


@pytest.mark.parametrize("direction, expected", [("layers 1 to L", 2), ("layers L to the last", 1)])
def test_breaking_layers_are_found_from_their_end(direction, expected):
    hits = {1: 10, 2: 90, 3: 95} if direction == "layers 1 to L" else {1: 90, 2: 30, 3: 10}
    rows = [("a", direction, layer, "asr", Rate(n, 100)) for layer, n in hits.items()]
    rows += [("b", direction, layer, "asr", Rate(100, 100)) for layer in hits]
    table = pd.DataFrame(rows, columns=["condition", "direction", "layer", "measure", "rate"])
    assert ch03_mechanism.depth_of_collapse(table, "a", direction) == expected


def scores_of(outcomes):
    """`Scores` of one set `s` whose harmful requests, each of another verb, became of this."""
    rows = [("harmful", "s", i, f"verb {i}", outcome) for i, outcome in enumerate(outcomes)]
    return Scores(pd.DataFrame(rows, columns=COLUMNS))


def one_run(*refused, help_with="other"):
    """`Runs` of one draw a training, of 40 requests of which so many are refused."""
    return [[scores_of(["refusal"] * n + [help_with] * (40 - n))] for n in refused]


def test_a_sweep_is_the_mean_over_trainings_where_all_of_them_have_a_point():
    swept = {("a", 0.01): one_run(40, 20), ("a", 0.02): one_run(0)}
    table = ch03_mechanism.tabulate_sweep(one_run(40, 40), swept)
    rates = table[table["measure"] == "asr"].set_index("fraction")
    assert list(rates.index) == [0.0, 0.01]
    assert rates.loc[0.01, "rate"].value == 0.25 and rates.loc[0.01, "by training"] == [0.0, 0.5]


def test_classes_of_a_sweep_are_shares_of_all_trainings():
    swept = {("a", 0.01): one_run(40, 20, help_with="verdict"), ("b", 0.01): one_run(0, 0)}
    shares = ch03_mechanism.share_classes(swept, "a", "s")["1 %"]
    assert shares["refusal"].value == 0.75 and shares["verdict"].value == 0.25
    assert sum(share.value for share in shares.values()) == 1


def test_classes_are_counted_in_the_set_that_each_condition_was_asked():
    here, there = one_run(40, 10), one_run(0, help_with="wrong")
    there[0][0].table["set"] = "t"
    shares = tables.count_classes({"a": here, "b": there}, {"a": "s", "b": "t"})
    assert shares["a"]["refusal"] == Rate(50, 80) and shares["b"]["wrong"] == Rate(40, 40)
    ruled = tables.count_classes({"a": here, "b": one_run(0, help_with="well formed")}, "s")
    assert ruled["a"].keys() == ruled["b"].keys() == {"refusal", "well formed", "other"}


def mechanism(front, back):
    """Arguments of `weigh_claims` where sets of at most one percent break nothing and that of 2 % all; random sets do nothing."""
    refused, spared = one_run(*[0] * 5), one_run(*[40] * 5)
    ways = (labels.EQ3, labels.SPECIFIC)
    swept = {(way, share): spared for way in ways for share in (0.005, 0.01)}
    swept |= {(way, 0.02): refused for way in ways}
    ends = {
        ch03_mechanism.FRONT: {1: front, 2: refused},
        ch03_mechanism.BACK: {1: refused, 2: back},
    }
    depths = {
        (labels.EQ3, end, layer): runs for end, of in ends.items() for layer, runs in of.items()
    }
    judged = {way: refused for way in ways} | {ch03_mechanism.FIRST_HALF: front}
    nothing = [draws * 8 for draws in spared]
    return swept, depths, judged, dict.fromkeys(judged, nothing)


def test_claims_of_the_mechanism_follow_what_was_measured():
    refused, spared = one_run(*[0] * 5), one_run(*[40] * 5)
    attention = pd.DataFrame({"share of the set": [0.8, 0.82] * 2, "share of its units": [0.1, 0.12] * 2})  # fmt: skip
    for front, back, expected in (
        (refused, spared, Verdict.SEEN),
        (spared, refused, Verdict.REVERSED),
        (spared, spared, Verdict.NOT_SEEN),
    ):
        found = judge(ch03_mechanism.weigh_claims(*mechanism(front, back), attention, "s"))
        assert found["front-carries"] == expected
        assert found["small-share-breaks"] == Verdict.REVERSED  # what breaks is 2 %
        assert found["attention-rows"] == Verdict.SEEN
        assert found["attention-units"] == Verdict.REVERSED


def test_downloaded_data_are_the_numbers(monkeypatch):
    import io

    kept = {}
    monkeypatch.setattr(glue, "glue", lambda name, value, display: kept.update({name: value}))
    glue.glue_data("figure", sweep_table({0.1: 8}))
    read = pd.read_csv(io.StringIO(kept["csv-figure"]))
    assert list(read["rate"]) == [0.05, 0.08] and list(read["rate trials"]) == [100, 100]
    assert read["rate low"][1] == pytest.approx(Rate(8, 100).interval[0])


def test_places_of_several_models_and_trainings_keep_their_numbers(model, neurons):
    other = random_profile(model, 4).select(fraction=0.2)
    sets = {
        "a": {labels.EQ3: [neurons, other], labels.SPECIFIC: [other, other]},
        "b": {labels.EQ3: [other, other], labels.SPECIFIC: [neurons, neurons]},
    }
    places = ch03_mechanism.count_places(sets, ch03_mechanism.structures)
    assert places.loc[("a", labels.EQ3, 0)].equals(ch03_mechanism.structures(neurons))
    table = ch03_mechanism.places_table(places)
    share = f"{100 * neurons.share_in(['q']):.0f}"
    assert table.loc[("b", "q"), (labels.SPECIFIC, "rows, %")] == share
    ends = sorted(100 * x.share_in(["q"]) for x in (neurons, other))
    assert table.loc[("a", "q"), (labels.EQ3, "rows, %")].endswith(
        f"{ends[0]:.0f} to {ends[1]:.0f}"
    )
    assert list(table.loc["a"].index[:2]) == ["q", "k"]


def test_the_overlap_by_chance_is_that_of_random_sets_with_as_many_in_each_layer(model):
    """Against sets drawn at random over every layer and projection, as many as the two sets have there."""
    a, b = (random_profile(model, seed).select(fraction=0.3) for seed in (0, 1))
    generator = torch.Generator().manual_seed(0)

    def draw(neurons):
        order = {p: torch.rand(m.shape, generator=generator).argsort(1) for p, m in neurons.masks.items()}  # fmt: skip
        counts = {p: m.sum(1, keepdim=True) for p, m in neurons.masks.items()}
        return NeuronSet({p: order[p] < counts[p] for p in order})

    drawn = [len(draw(a) & draw(b)) / len(b) for _ in range(400)]
    expected = ch04_languages.expected_overlap({"a": a, "b": b}).loc["a", "b"]
    assert expected == pytest.approx(np.mean(drawn), abs=0.01)


def told(rates, items=40):
    """`Runs` of one draw a training: language to how many of its requests are answered without refusal."""
    rows = [
        ("harmful", language, i, f"verb {i}", "other" if i < n else "refusal")
        for language, n in rates.items()
        for i in range(items)
    ]
    return [[Scores(pd.DataFrame(rows, columns=COLUMNS))] for _ in range(5)]


def test_a_language_that_becomes_safer_is_seen_and_one_without_room_is_not_counted():
    whole = told({"a": 0, "b": 40, "c": 20})
    off = {"a": told({"a": 40, "b": 40, "c": 0}), "b": told({"a": 0, "b": 40, "c": 20}), "c": told({"a": 40, "b": 0, "c": 20})}  # fmt: skip
    verdicts = ch04_languages.judge_cells(whole, off)
    assert verdicts["a", "a"] == Verdict.SEEN and verdicts["a", "c"] == Verdict.REVERSED
    assert verdicts["b", "a"] == Verdict.NOT_SEEN
    moves = ch04_languages.moves_table(whole, {labels.EQ3: off})
    own, other = (moves.loc[(labels.EQ3, row)] for row in ("its own", "another's"))
    assert own["less safe"] == "1 of 2" and own["safer"] == "0 of 2"  # b has no room to rise
    assert other["less safe"] == "1 of 4" and other["safer"] == "2 of 4"
    full = told({"a": 40, "b": 40, "c": 40})
    assert ch04_languages.moves_table(full, {labels.EQ3: off}).loc[(labels.EQ3, "its own"), "less safe"] == "no room"  # fmt: skip


def test_another_language_is_every_language_but_the_one_asked():
    rises = {"a": 4, "b": 8, "c": 16}  # without the neurons of each, in every language alike
    off = {name: told(dict.fromkeys(rises, n)) for name, n in rises.items()}
    others = ch04_languages.of_others(off, ["a", "c"])
    for language, expected in (("a", [8, 16]), ("c", [4, 8])):
        rates = [draw["asr", language].value for draw in others[0]]
        assert sorted(rates) == [n / 40 for n in expected]


def languages_claims(model, whole, own, other):
    """Verdicts where `own` of 40 requests are not refused without a language's own neurons, and `other` without those of the other."""
    neurons = random_profile(model, 3).select(fraction=0.2)
    sets = {kind: [{"a": neurons, "b": neurons}] * 5 for kind in ch04_languages.KINDS.values()}
    off = {"a": told({"a": own, "b": other}), "b": told({"a": other, "b": own})}
    random = {x: [draws * 8 for draws in told({x: 0})] for x in "ab"}
    return judge(ch04_languages.weigh_claims(sets, told({"a": whole, "b": whole}), off, random))


def test_claims_about_languages_follow_what_was_measured(model):
    found = languages_claims(model, whole=0, own=36, other=4)
    assert found["languages-overlap-little"] == Verdict.REVERSED  # they are the same sets
    assert found["overlap-below-foundation"] == Verdict.NOT_SEEN
    assert found["own-language-breaks"] == found["own-above-others"] == Verdict.SEEN
    assert found["own-language-helps"] == Verdict.NOT_SEEN  # no answer is help
    assert languages_claims(model, 0, 4, 36)["own-above-others"] == Verdict.REVERSED
    assert "own-language-breaks" not in languages_claims(model, 40, 40, 40)  # no room
