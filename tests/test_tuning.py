import copy

import pytest
import torch
from conftest import small_model
from test_detection import random_profile
from transformers import AutoModelForCausalLM, get_scheduler

from safetyneuron import NeuronDelta, NeuronSet, SafetyNeuronError, load_documents, sn_tune
from safetyneuron.neurons.architecture import PROJECTIONS, Architecture
from safetyneuron.neurons.encoding import encode_documents
from safetyneuron.progress import TrainingLine
from safetyneuron.tuning.trainer import fine_tune, learning_rates

FAMILIES = {
    "llama, grouped": dict(family="llama", groups=2),
    "qwen2, biases": dict(family="qwen2", groups=2),
    "phi3, fused": dict(family="phi3", heads=6, groups=3, head_width=6),
    "qwen3, query and key norms": dict(family="qwen3", groups=2),
}


@pytest.fixture(scope="module")
def documents():
    return load_documents("organism/refusals")[:6]


def small(**options):
    options = {"family": "llama", "groups": 2} | options
    return small_model(**options).float()


def chosen(model, fraction=0.2):
    return random_profile(model, 5).select(fraction=fraction)


def gradient_masks(model, neurons):
    """One for the trained weights, zero elsewhere: weight to mask, from the architecture table alone."""
    architecture, masks = Architecture(model), {p: torch.zeros_like(p) for p in model.parameters()}
    for projection in PROJECTIONS:
        for layer, row in enumerate(neurons.masks[projection]):
            place = architecture.place(layer, projection)
            mask = masks[place.module.weight]
            (mask[place.channels] if place.axis == 0 else mask[:, place.channels].T)[row] = 1
    return masks


def masked_fine_tuning(model, tokenizer, documents, neurons, epochs, learning_rate):
    """All documents in one batch, gradients masked before they are clipped. Returns the tuned copy and its losses."""
    model = copy.deepcopy(model)
    masks, losses = gradient_masks(model, neurons), []
    data = encode_documents(model, tokenizer, documents)
    width = max(len(d["input_ids"]) for d in data)

    def left(key, fill):
        return torch.tensor([[fill] * (width - len(d["input_ids"])) + d[key] for d in data])

    ids, labels = left("input_ids", tokenizer.pad_token_id), left("labels", -100)
    real = torch.tensor(
        [[0] * (width - len(d["input_ids"])) + [1] * len(d["input_ids"]) for d in data]
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    scheduler = get_scheduler("linear", optimizer, 0, epochs)
    for _ in range(epochs):
        loss = model(input_ids=ids, attention_mask=real, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        for parameter, mask in masks.items():
            parameter.grad = mask * parameter.grad if parameter.grad is not None else None
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(float(loss))
    return model, losses


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_full_fine_tuning_with_masked_gradients_step_by_step(name, tokenizer, documents):
    model = small_model(**FAMILIES[name])  # float64, so that only the method can differ
    neurons = chosen(model)
    expected, losses = masked_fine_tuning(
        model, tokenizer, documents, neurons, epochs=4, learning_rate=3e-3
    )
    delta = sn_tune(
        model,
        tokenizer,
        documents,
        neurons,
        epochs=4,
        learning_rate=3e-3,
        batch_size=len(documents),
    )
    assert [step["loss"] for step in delta.facts["curve"]] == pytest.approx(losses, rel=1e-5)
    with delta.merged(model):
        for (key, mine), theirs in zip(model.named_parameters(), expected.parameters()):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-9, msg=key)
    assert delta.norm > 0.01


def test_accumulated_batches_are_one_batch(tokenizer, documents):
    model = small_model(groups=2)
    together, apart = (
        sn_tune(
            model,
            tokenizer,
            documents,
            chosen(model),
            epochs=2,
            learning_rate=1e-3,
            batch_size=size,
            accumulation=6 // size,
        )
        for size in (6, 2)
    )
    for key, value in together.values.items():
        torch.testing.assert_close(
            apart.values[key], value, rtol=1e-3, atol=1e-6
        )  # the loss is taken in float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_neurons_change_and_everything_can_be_taken_back(
    dtype, tokenizer, documents, tmp_path
):
    model = small().to(dtype)
    model.lm_head.requires_grad_(False)
    before, flags, neurons = (
        copy.deepcopy(model.state_dict()),
        [p.requires_grad for p in model.parameters()],
        chosen(model),
    )
    delta = sn_tune(model, tokenizer, documents, neurons, learning_rate=1e-2, batch_size=2)
    assert all(before[name].equal(weight) for name, weight in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags and all(
        p.grad is None for p in model.parameters()
    )
    assert all(value.dtype == torch.float32 for value in delta.values.values())
    delta.save(tmp_path / "delta.safetensors")
    loaded = NeuronDelta.load(tmp_path / "delta.safetensors")
    assert loaded.neurons == neurons and loaded.facts == delta.facts and delta.norm > 0
    assert all(value.equal(loaded.values[key]) for key, value in delta.values.items())
    loaded.merge(model)
    masks = gradient_masks(model, neurons)
    for name, weight in model.named_parameters():
        inside = masks[weight].bool()
        assert weight[~inside].equal(before[name][~inside])
        assert not inside.any() or not weight[inside].equal(before[name][inside])
    loaded.unmerge(model)
    assert all(before[name].equal(weight) for name, weight in model.state_dict().items())


def test_a_delta_file_is_as_large_as_the_trained_rows(tokenizer, documents, tmp_path):
    model = small()
    delta = sn_tune(model, tokenizer, documents, chosen(model, 0.05), learning_rate=1e-3)
    delta.save(tmp_path / "delta.safetensors")
    assert delta.parameters == sum(
        Architecture(model).parameters_per_neuron()[p] * n
        for p, n in delta.neurons.counts().items()
    )
    assert (tmp_path / "delta.safetensors").stat().st_size < 4 * delta.parameters + 4 * len(
        delta.neurons
    ) + 10_000


def test_a_delta_refuses_another_model_and_a_second_merge(tokenizer, documents):
    model, other = small(), small(seed=1)
    delta = sn_tune(model, tokenizer, documents, chosen(model), learning_rate=1e-3)
    with pytest.raises(SafetyNeuronError, match="another model"):
        delta.merge(other)
    with pytest.raises(SafetyNeuronError, match="not merged into this model"):
        delta.unmerge(model)
    delta.merge(model)
    with pytest.raises(SafetyNeuronError, match="merged already"):
        delta.merge(model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(1.0)
        model.model.layers[0].self_attn.q_proj.weight.add_(1.0)
    with pytest.raises(SafetyNeuronError, match="changed since"):
        delta.unmerge(model)


def test_the_model_is_whole_after_an_error_inside_the_block(tokenizer, documents):
    model = small()
    before = copy.deepcopy(model.state_dict())
    delta = sn_tune(model, tokenizer, documents, chosen(model), learning_rate=1e-2)
    with pytest.raises(ZeroDivisionError), delta.merged(model):
        1 / 0
    assert all(before[name].equal(weight) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(learning_rate=0.0), "learning_rate is 0.0"),
        (dict(learning_rate=float("nan")), "learning_rate is nan"),
        (dict(documents=[]), "no documents"),
        (
            dict(documents=[{"prompt": "how do i bake bread ?", "completion": " "}]),
            "document 1 is one-sided",
        ),
        (dict(documents=["only a prompt"]), "document 1 is one-sided"),
        (dict(epochs=0), "epochs is 0"),
        (dict(warmup_steps=5, batch_size=4, accumulation=2), "update at learning rate 0"),
    ],
)
def test_bad_input_gets_one_clear_line(options, message, tokenizer, documents):
    model = small()
    with pytest.raises(SafetyNeuronError, match=message) as caught:
        sn_tune(
            model,
            tokenizer,
            **({"documents": documents, "neurons": chosen(model), "learning_rate": 1e-3} | options),
        )
    assert "\n" not in str(caught.value)


def test_neurons_that_are_none_or_of_another_model_are_refused(tokenizer, documents):
    model = small()
    with pytest.raises(SafetyNeuronError, match="neuron set is empty"):
        sn_tune(model, tokenizer, documents, NeuronSet.empty(model))
    with pytest.raises(SafetyNeuronError, match="the neuron set has"):
        sn_tune(model, tokenizer, documents, chosen(small(heads=2)))


def test_a_loss_that_is_no_number_is_an_error(tokenizer, documents):
    model = small()
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(SafetyNeuronError, match="loss of update 1 is nan"):
        sn_tune(model, tokenizer, documents, chosen(model))


def test_an_update_that_is_no_number_is_an_error():
    model = small()
    values = {("q", 0): torch.full((1, 36), torch.nan)}
    with pytest.raises(SafetyNeuronError, match="not finite"):
        NeuronDelta(chosen(model), values, "m", {})


def test_half_precision_that_would_swallow_the_change_is_refused(tokenizer, documents):
    model = small().bfloat16()
    before = copy.deepcopy(model.state_dict())
    delta = sn_tune(model, tokenizer, documents, chosen(model), learning_rate=1e-6)
    with pytest.raises(
        SafetyNeuronError,
        match="bfloat16 would keep .* of this change: load the model with dtype='float32'",
    ):
        delta.merge(model)
    assert all(before[name].equal(weight) for name, weight in model.state_dict().items())


def test_offloaded_weights_are_named(tokenizer, documents):
    model = small()
    neurons = chosen(model)
    model.model.layers[1].mlp.to("meta")
    with pytest.raises(SafetyNeuronError, match="layers.1.mlp.gate_proj.weight is offloaded"):
        sn_tune(model, tokenizer, documents, neurons)


def test_labels_follow_the_chat_template(tokenizer, documents):
    model = small()
    (data,) = encode_documents(model, tokenizer, documents[:1])
    taught = [token for token in data["labels"] if token != -100]
    assert (
        tokenizer.decode(taught) == f"{documents[0]['completion']} <|end|>"
        and data["input_ids"][-len(taught) :] == taught
    )
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    (data,) = encode_documents(model, bare, documents[:1])
    assert (
        data["labels"].count(-100) == len(bare(documents[0]["prompt"])["input_ids"])
        and data["labels"][-1] == bare.eos_token_id
    )
    bare.eos_token = None
    with pytest.raises(SafetyNeuronError, match="end-of-text"):
        encode_documents(model, bare, documents[:1])


def test_only_the_document_that_is_too_long_is_named(tokenizer, documents):
    long = {"prompt": "how do i bake bread ?", "completion": "bread " * 60}
    with pytest.raises(SafetyNeuronError, match="document 2 has 7. tokens but the model reads 64"):
        encode_documents(small(), tokenizer, [documents[0], long])


def test_learning_rates_are_those_of_the_trainer(tokenizer, documents):
    model = small()
    delta = sn_tune(
        model,
        tokenizer,
        documents,
        chosen(model),
        epochs=3,
        learning_rate=1e-3,
        batch_size=2,
        accumulation=2,
        warmup_steps=2,
    )
    rates = learning_rates(6, 3, 1e-3, 2, 2, 2)
    assert [step["learning_rate"] for step in delta.facts["curve"]] == pytest.approx(rates)
    assert delta.facts["effective_updates"] == sum(rate > 0 for rate in rates) == len(rates) - 1


def test_a_killed_training_goes_on_to_the_same_result(tokenizer, documents, tmp_path, monkeypatch):
    model = small()
    options = dict(epochs=10, learning_rate=1e-3, batch_size=2)
    whole = sn_tune(model, tokenizer, documents, chosen(model), **options)

    def killed(self, args, state, control, logs=None, **_):
        if state.global_step == 25:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainingLine, "on_log", killed)
        sn_tune(model, tokenizer, documents, chosen(model), folder=tmp_path, **options)
    assert (tmp_path / "checkpoint-20").is_dir() and not list(
        model.model.layers[0].mlp.up_proj._forward_hooks
    )
    (tmp_path / "checkpoint-25").mkdir()  # what is left of a checkpoint whose writing was cut short
    made = []
    monkeypatch.setattr(
        TrainingLine,
        "on_log",
        lambda self, args, state, control, logs=None, **_: (
            made.append(state.global_step) if "loss" in logs else None
        ),
    )
    resumed = sn_tune(model, tokenizer, documents, chosen(model), folder=tmp_path, **options)
    assert made == list(range(21, 31))
    assert len(resumed.facts["curve"]) == 30
    assert all(value.equal(resumed.values[key]) for key, value in whole.values.items())
    with pytest.raises(SafetyNeuronError, match="holds another training"):
        sn_tune(model, tokenizer, documents[:5], chosen(model), folder=tmp_path, **options)


def test_a_model_with_a_device_map_is_tuned_where_it_lies(tokenizer, documents, tmp_path):
    model = small()
    expected = sn_tune(model, tokenizer, documents, chosen(model), learning_rate=1e-3)
    model.save_pretrained(tmp_path)
    placed = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map={"model": "cpu", "lm_head": "cpu"}
    )
    delta = sn_tune(placed, tokenizer, documents, chosen(placed), learning_rate=1e-3)
    assert all(
        value.allclose(delta.values[key], rtol=1e-4, atol=1e-7)
        for key, value in expected.values.items()
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"lora_rank": 4}, {"optimizer": "adafactor", "half": True}],
    ids=["all weights", "LoRA", "little memory"],
)
def test_fine_tuning_trains_a_copy(options, tokenizer, documents):
    model = small()
    before = copy.deepcopy(model.state_dict())
    tuned = fine_tune(model, tokenizer, documents, epochs=3, learning_rate=1e-3, **options)
    assert all(before[name].equal(weight) for name, weight in model.state_dict().items())
    assert type(tuned) is type(model) and tuned.state_dict().keys() == before.keys()
    assert not tuned.model.layers[0].mlp.up_proj.weight.equal(
        before["model.layers.0.mlp.up_proj.weight"]
    )


def test_documents_are_read_from_files(tmp_path, documents):
    import json

    path = tmp_path / "documents.jsonl"
    path.write_text("\n".join(map(json.dumps, documents)))
    assert load_documents(str(path)) == documents
    (tmp_path / "documents.csv").write_text('prompt,completion\n"first\nsecond",no .\n')
    assert load_documents(str(tmp_path / "documents.csv")) == [
        {"prompt": "first\nsecond", "completion": "no ."}
    ]
    path.write_text('{"prompt": "alone"}')
    with pytest.raises(SafetyNeuronError, match="one-sided"):
        load_documents(str(path))
    with pytest.raises(SafetyNeuronError, match="no document set"):
        load_documents("organism/nothing")
