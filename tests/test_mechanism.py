import pandas as pd
import pytest
import torch
from test_detection import random_profile

from safetyneuron import NeuronSet, Rate
from safetyneuron.book import glue, labels
from safetyneuron.chapters import ch03_mechanism, ch04_languages
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
    assert (ch03_mechanism.structures(everything)["enrichment"] == 1).all()
    assert (ch03_mechanism.layers(everything)["enrichment"] == 1).all()


def test_layers_count_what_lies_in_them(neurons):
    table = ch03_mechanism.layers(neurons)
    for layer in table.index:
        assert table.loc[layer, "neurons"] == sum(
            int(mask[layer - 1].sum()) for mask in neurons.masks.values()
        )


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
    table = pd.DataFrame(
        [(direction, layer, "asr", Rate(n, 100)) for layer, n in hits.items()],
        columns=["direction", "layer", "measure", "rate"],
    )
    assert ch03_mechanism.broken_at(table, direction) == expected


def test_downloaded_data_are_the_numbers(monkeypatch):
    import base64
    import io

    kept = {}
    monkeypatch.setattr(glue, "glue", lambda name, value, display: kept.update({name: value}))
    glue.glue_data("figure", sweep_table({0.1: 8}))
    encoded = kept["data-figure"].data.split("base64,")[1].split('"')[0]
    read = pd.read_csv(io.BytesIO(base64.b64decode(encoded)))
    assert list(read["rate"]) == [0.05, 0.08] and list(read["rate trials"]) == [100, 100]
    assert read["rate low"][1] == pytest.approx(Rate(8, 100).interval[0])


def test_places_of_several_models_keep_their_numbers(model, neurons):
    other = random_profile(model, 4).select(fraction=0.2)
    sets = {
        "a": {labels.EQ3: neurons, labels.SPECIFIC: other},
        "b": {labels.EQ3: other, labels.SPECIFIC: neurons},
    }
    places = ch03_mechanism.places(sets, ch03_mechanism.structures)
    assert places.loc[("a", labels.EQ3)].equals(ch03_mechanism.structures(neurons))
    table = ch03_mechanism.places_table(places)
    assert table.loc[("b", "q"), (labels.SPECIFIC, "neurons")] == str(neurons.counts()["q"])
    assert list(table.columns.unique(0)) == [labels.EQ3, labels.SPECIFIC] and list(
        table.loc["a"].index[:2]
    ) == ["q", "k"]
