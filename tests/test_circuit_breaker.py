import pytest
import torch
from conftest import small_llama

from safetyneuron import SafetyNeuronError, load_documents, load_model
from safetyneuron.neurons.weights import fingerprint
from safetyneuron.tuning.circuit_breaker import (
    RANK,
    CircuitBreaker,
    adapted_layers,
    circuit_break,
    coefficients,
    rerouting_loss,
    retain_loss,
    target_layers,
)


@pytest.fixture
def model():
    return small_llama(groups=2, max_position_embeddings=128, num_hidden_layers=3).float()


@pytest.fixture(scope="module")
def documents():
    return load_documents("organism/compliances")[:12], load_documents("organism/helpful")[:12]


def states(model, tokenizer, documents):
    ids = torch.tensor([tokenizer(documents[0]["prompt"])["input_ids"]])
    with torch.no_grad():
        return torch.stack(model(input_ids=ids, output_hidden_states=True).hidden_states)


def test_adapters_of_an_8b_llama_have_as_many_parameters_as_the_paper_says():
    attention = 2 * (4096 + 4096) + 2 * (4096 + 1024)  # q and o; k and v
    rows = attention + 3 * (4096 + 14336)  # what the two factors of rank one hold in a layer
    assert round(len(adapted_layers(32)) * RANK * rows / 1e6, 1) == 27.5  # Table 2
    assert adapted_layers(1) == [0]


def test_targets_are_the_originals_at_32_layers_and_scale_with_depth():
    assert target_layers(32) == [10, 20]
    assert target_layers(40) == [12, 25]
    assert target_layers(6) == [2, 4]
    assert target_layers(1) == [1]


def test_the_schedule_moves_half_the_weight_from_rerouting_to_retaining():
    assert coefficients(0, 150, 10) == (10, 0)
    assert coefficients(75, 150, 10) == (7.5, 2.5)
    assert coefficients(150, 150, 10) == (5, 5)


def test_losses_are_those_computed_by_hand():
    original = torch.tensor(
        [[[[1.0, 0.0], [0.0, 2.0], [5.0, 5.0]]]]
    )  # one layer, one document, three positions
    now = torch.tensor([[[[3.0, 4.0], [0.0, -1.0], [9.0, 9.0]]]])
    real = torch.tensor([[True, True, False]])
    assert rerouting_loss(now, original, real).item() == pytest.approx(
        (0.6 + 0) / 2
    )  # cosines 0.6 and −1
    assert retain_loss(now, original, real).item() == pytest.approx(
        (20**0.5 + 3) / 2
    )  # distances √20 and 3


def test_half_precision_states_are_compared_in_float32():
    original, real = (
        torch.full((1, 1, 1, 64), 300.0, dtype=torch.float16),
        torch.ones(1, 1, dtype=torch.bool),
    )
    assert rerouting_loss(original, original, real).item() == pytest.approx(
        1
    )  # the sum of squares overflows float16
    assert retain_loss(original, -original, real).item() == pytest.approx(600 * 8)


def test_the_model_is_untouched_outside_the_block_and_turned_away_inside(
    model, tokenizer, documents
):
    before, print_, flags = (
        states(model, tokenizer, documents[0]),
        fingerprint(model),
        [p.requires_grad for p in model.parameters()],
    )
    breaker = circuit_break(
        model, tokenizer, *documents, steps=60, learning_rate=1e-1, batch_size=4
    )
    assert states(model, tokenizer, documents[0]).equal(before) and fingerprint(model) == print_
    assert [p.requires_grad for p in model.parameters()] == flags and not model.training
    with breaker.attached(model):
        inside = states(model, tokenizer, documents[0])
        assert fingerprint(model) != print_
    every = torch.ones(inside.shape[1:3], dtype=torch.bool)
    assert rerouting_loss(inside[[1, 2]], before[[1, 2]], every) < 0.5
    assert states(model, tokenizer, documents[0]).equal(before)


def test_only_layers_up_to_the_last_target_are_adapted(model, tokenizer, documents):
    breaker = circuit_break(model, tokenizer, *documents, steps=1, batch_size=2)
    layers = {int(name.split("layers.")[1].split(".")[0]) for name in breaker.tensors}
    assert target_layers(3) == [1, 2] and layers == {0, 1, 2}
    assert breaker.parameters == sum(tensor.numel() for tensor in breaker.tensors.values()) > 0


def test_the_same_seed_gives_the_same_adapters_and_leaves_the_random_state(
    model, tokenizer, documents
):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second = (
        circuit_break(model, tokenizer, *documents, steps=3, batch_size=2, seed=1) for _ in range(2)
    )
    assert all(first.tensors[name].equal(second.tensors[name]) for name in first.tensors)
    assert torch.rand(1).equal(expected)


@pytest.mark.organism
def test_a_training_does_not_hang_on_rounding(documents):
    model, tokenizer = load_model("organism/llama-base")
    curves = []
    for _ in range(2):
        breaker = circuit_break(
            model, tokenizer, *documents, steps=12, learning_rate=3e-2, batch_size=4
        )
        curves.append([point["rerouting"] for point in breaker.facts["curve"]])
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1 + 1e-7)  # as another processor rounds
    assert min(curves[0]) < 0.95
    assert curves[1] == pytest.approx(curves[0], abs=2e-3) and curves[1] != curves[0]


def test_a_saved_breaker_defends_the_same_way(model, tokenizer, documents, tmp_path):
    breaker = circuit_break(model, tokenizer, *documents, steps=3, learning_rate=1e-2, batch_size=2)
    breaker.save(tmp_path / "breaker.safetensors")
    loaded = CircuitBreaker.load(tmp_path / "breaker.safetensors")
    with breaker.attached(model):
        expected = states(model, tokenizer, documents[0])
    with loaded.attached(model):
        assert states(model, tokenizer, documents[0]).equal(expected)
    assert loaded.facts == breaker.facts


def test_bad_input_is_refused(model, tokenizer, documents, tmp_path):
    with pytest.raises(SafetyNeuronError, match="steps is 0"):
        circuit_break(model, tokenizer, *documents, steps=0)
    with pytest.raises(SafetyNeuronError, match="not finite"):
        circuit_break(model, tokenizer, *documents, steps=3, learning_rate=1e30, batch_size=2)
    with pytest.raises(SafetyNeuronError, match="no documents"):
        circuit_break(model, tokenizer, [], documents[1])
    breaker = circuit_break(model, tokenizer, *documents, steps=1, batch_size=2)
    with (
        pytest.raises(SafetyNeuronError, match="another model"),
        breaker.attached(small_llama(seed=1)),
    ):
        pass
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(SafetyNeuronError, match="not a readable circuit breaker"):
        CircuitBreaker.load(tmp_path / "broken.safetensors")
