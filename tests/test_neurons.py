import math

import pytest
import torch
from conftest import small_llama

from safetyneuron import NeuronSet, SafetyNeuronError, deactivate
from safetyneuron.neurons.architecture import (
    ATTENTION,
    COLUMN_PROJECTIONS,
    FEED_FORWARD,
    PROJECTIONS,
    Architecture,
)


def random_set(model, seed=0, share=0.3):
    generator = torch.Generator().manual_seed(seed)
    return NeuronSet(
        {
            p: torch.rand(s, generator=generator) < share
            for p, s in NeuronSet.empty(model).shapes.items()
        }
    )


def test_set_algebra_follows_python_sets(model):
    a, b = random_set(model, 0), random_set(model, 1)

    def as_set(n):
        return {(p, *i) for p, m in n.masks.items() for i in map(tuple, m.nonzero().tolist())}

    assert list(a.cells()) == sorted(as_set(a), key=lambda c: (PROJECTIONS.index(c[0]), *c[1:]))
    assert NeuronSet.from_cells(a.shapes, a.cells()) == a
    assert NeuronSet.from_cells(a.shapes, a.by_layer()) == a
    assert as_set(a.only(["o", "up"])) == {c for c in as_set(a) if c[0] in ("o", "up")}
    assert as_set(a & b) == as_set(a) & as_set(b)
    assert as_set(a | b) == as_set(a) | as_set(b)
    assert as_set(a - b) == as_set(a) - as_set(b)
    assert as_set(a ^ b) == as_set(a) ^ as_set(b)
    assert len(a) == len(as_set(a)) and a == a and a != b


def silenced(model, neurons):
    """What a set switches off, seen in the numbers alone: channels of each place with nothing in one of their weights."""
    architecture, off = Architecture(model), set()
    own_values = architecture.heads == architecture.groups
    with deactivate(model, neurons):
        for projection in PROJECTIONS:
            kind = "ffn" if projection in FEED_FORWARD else projection
            kind = "vo" if own_values and projection in ("v", "o") else kind
            for layer in range(2):
                zero = (architecture.place(layer, projection).weight == 0).all(1)
                off |= {(kind, layer, channel) for channel in zero.nonzero().flatten().tolist()}
    return off


@pytest.mark.parametrize("groups", [2, 4])
def test_units_are_the_channels_that_fall_silent_together(groups):
    model = small_llama(groups=groups)
    chosen = random_set(model)
    units = chosen.units()
    expected = silenced(model, chosen)
    found = {
        (kind, *place) for kind, mask in units.kinds.items() for place in mask.nonzero().tolist()
    }
    assert found == expected and len(units) == len(expected)
    whole = units.neurons()
    assert whole & chosen == chosen and len(whole) > len(chosen)
    assert silenced(model, whole) == expected and len(whole.units()) == len(units)
    assert sum(units.counts().values()) == len(units)
    everything = random_set(model, share=1)
    assert len(everything.units()) == units.total


def test_zeroing_a_part_of_a_unit_does_what_zeroing_all_of_it_does():
    model, ids = small_llama(groups=4).double(), torch.arange(5, 12)[None]
    shapes = NeuronSet.empty(model).shapes
    for projection in ("gate", "up", "down", "v", "o"):
        part = NeuronSet.from_cells(shapes, [(projection, 1, 3), (projection, 0, 5)])
        logits = []
        for neurons in (part, part.units().neurons()):
            with deactivate(model, neurons):
                logits.append(model(ids).logits)
        torch.testing.assert_close(*logits)
        assert not torch.allclose(logits[0], model(ids).logits)


def test_shares_are_of_neurons_or_of_units():
    shapes = NeuronSet.empty(small_llama(groups=4)).shapes
    cells = [("q", 0, 1), ("v", 0, 2), ("o", 0, 2), ("gate", 1, 3), ("up", 1, 3), ("down", 1, 3)]
    chosen = NeuronSet.from_cells(shapes, cells)
    assert chosen.share_in(ATTENTION) == 1 / 2
    assert chosen.share_in(ATTENTION, units=True) == 2 / 3
    assert chosen.share_in("down", units=True) == 1 / 3
    assert math.isnan((chosen - chosen).share_in(ATTENTION))
    with pytest.raises(SafetyNeuronError, match="no projection is called norm"):
        chosen.only(["q", "norm"])


@pytest.mark.parametrize("groups", [2, 4])
def test_random_sets_match_in_units_and_rows_and_lie_outside(groups):
    model = small_llama(groups=groups)
    chosen = random_set(model, share=0.1)
    assert chosen.units().leave_room
    drawn = NeuronSet.random_draws(chosen, 5)
    for neurons in drawn:
        assert not len(neurons.units().neurons() & chosen.units().neurons())
        for kind, mask in chosen.units().kinds.items():
            assert torch.equal(neurons.units().kinds[kind].sum(1), mask.sum(1))
        for p, mask in chosen.masks.items():
            assert torch.equal(neurons.masks[p].sum(1), mask.sum(1))
    assert drawn[0] != drawn[1] and drawn[1] == NeuronSet.random_like(chosen, 1)


def test_a_drawn_unit_has_the_rows_of_the_unit_that_it_stands_for():
    shapes = NeuronSet.empty(small_llama(groups=4)).shapes
    gate = NeuronSet.from_cells(shapes, [("gate", 0, 5)])
    parts = NeuronSet.from_cells(shapes, [("gate", 1, 5), ("down", 1, 5), ("o", 1, 3)])
    seen = set()
    for seed in range(400):
        assert NeuronSet.random_like(gate, seed).counts() == gate.counts()
        (o, (_, layer, first), (_, _, second)) = sorted(
            NeuronSet.random_like(parts, seed).cells(), key=lambda cell: cell[0] != "o"
        )
        assert o[:2] == ("o", 1) and (layer, first) == (1, second)
        seen.add(first)
    assert seen == set(range(shapes["gate"][1])) - {5}  # every channel outside can be drawn


def test_where_too_few_units_are_left_no_random_set_is_drawn(model):
    shapes = NeuronSet.empty(model).shapes
    width = shapes["up"][1]
    half = NeuronSet.from_cells(shapes, [("up", 1, torch.arange(width // 2))])
    more = NeuronSet.from_cells(shapes, [("down", 1, width - 1)]) | half
    assert len(NeuronSet.random_draws(half, 2)) == 2 and NeuronSet.random_draws(more, 2) == []
    with pytest.raises(SafetyNeuronError, match="layer 2 has 15 units of ffn in the set and 13"):
        NeuronSet.random_like(more, 0)


def test_parameter_share_counts_rows_and_columns(model):
    chosen = random_set(model)
    total = sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1)
        with deactivate(model, chosen):
            zeroed = sum(int((p == 0).sum()) for p in model.parameters())
    assert zeroed == round(chosen.parameter_share(model) * total)


def test_saving_and_loading(model, tmp_path):
    chosen = random_set(model)
    chosen.save(tmp_path / "set.safetensors")
    assert NeuronSet.load(tmp_path / "set.safetensors") == chosen
    (tmp_path / "broken.safetensors").write_bytes(b"not a file of tensors")
    with pytest.raises(SafetyNeuronError, match="not a readable neuron file"):
        NeuronSet.load(tmp_path / "broken.safetensors")


def snapshot(model):
    return {name: p.clone() for name, p in model.named_parameters()}


def assert_bit_identical(model, before):
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("biased", [False, True])
def test_deactivation_zeroes_exactly_the_set_and_restores_every_bit(biased):
    model = small_llama(groups=2, attention_bias=biased, mlp_bias=biased)
    chosen, before = random_set(model), snapshot(model)
    ids = torch.arange(5, 12)[None]
    logits = model(ids).logits
    with deactivate(model, chosen):
        assert not torch.equal(model(ids).logits, logits)
        architecture = Architecture(model)
        for projection, mask in chosen.masks.items():
            for layer in range(2):
                place = architecture.place(layer, projection)
                assert torch.equal((place.weight == 0).all(1), mask[layer])
                if biased and projection not in COLUMN_PROJECTIONS:
                    assert (place.bias[mask[layer]] == 0).all()
    assert_bit_identical(model, before)
    assert torch.equal(model(ids).logits, logits)


def test_deactivation_restores_when_the_body_raises(model):
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError):
        with deactivate(model, random_set(model)):
            1 / 0
    assert_bit_identical(model, before)


def test_deactivation_can_be_nested(model):
    before = snapshot(model)
    with deactivate(model, random_set(model, 0)):
        with deactivate(model, random_set(model, 1)):
            pass
    assert_bit_identical(model, before)


def test_sets_of_another_shape_are_refused(model):
    other = random_set(small_llama(heads=2, groups=2))
    with pytest.raises(SafetyNeuronError, match="measure importance on this model"):
        with deactivate(model, other):
            pass
    with pytest.raises(SafetyNeuronError, match="different shapes"):
        other & random_set(model)
