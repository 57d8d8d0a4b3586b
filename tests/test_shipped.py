"""Organisms as files: what is written is loaded, to the bit, and errors are one line with a cure."""

import copy
import json
from dataclasses import asdict
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from safetyneuron import SafetyNeuronError, load_model
from safetyneuron import organism as organism
from safetyneuron.cli import main
from safetyneuron.metrics.cost import cost_by_name
from safetyneuron.neurons.architecture import PROJECTIONS, Architecture
from safetyneuron.neurons.weights import fingerprint
from safetyneuron.organism import shipped
from safetyneuron.organism.planting import draw_sets
from safetyneuron.organism.recipes import Recipe, Schedule, Size
from safetyneuron.organism.tokenizer import build_tokenizer
from safetyneuron.organism.train import new_model

SIZES = {
    "llama": Size(width=32, layers=2, heads=2, groups=2, channels=40),
    "mistral": Size(
        family="mistral", width=32, layers=2, heads=4, groups=2, channels=40, window=16
    ),
    "qwen": Size(family="qwen2", width=32, layers=2, heads=4, groups=2, channels=40),
}
GROUPS = ("planted", "decoys")


def entry(kind, parent=None, family="llama"):
    recipe = asdict(Recipe("train_whole", parent, Schedule(1, 0.1), SIZES[family]))
    return {
        "kind": kind,
        "parent": parent,
        "recipe": recipe,
        "seed": 0,
        "scores": {},
        "curve": [[1, 2.5], [2, 2.0]],
    }


def rounded(model):
    """The model in half precision, and back."""
    return copy.deepcopy(model).half().float()


def same(one, other):
    pairs = list(zip(one.named_parameters(), other.named_parameters(), strict=True))
    return all(
        name == again and p.dtype == q.dtype and torch.equal(p, q)
        for (name, p), (again, q) in pairs
    )


def add_whole(folder, name, model, family="llama", parent=None):
    shipped.write_weights(model, shipped.weights_file(folder, name))
    shipped.add_to_manifest(folder, name, entry("weights", parent, family))


@torch.no_grad()
def changed(model, *sets, seed=1):
    """A copy of the model with new numbers, which half precision holds, in the neurons of sets."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for projection in PROJECTIONS:
        for layer in range(2):
            weight = Architecture(model).place(layer, projection).weight
            mask = torch.stack([neurons.masks[projection][layer] for neurons in sets]).any(0)
            weight[mask] = torch.randn(weight[mask].shape, generator=generator).half().float()
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def base(tokenizer):
    return new_model(SIZES["llama"], tokenizer, seed=0)


@pytest.fixture
def folder(tmp_path, monkeypatch, base):
    """A folder of weights that holds a base model of one seed."""
    folder = tmp_path / "weights"
    monkeypatch.setenv("SAFETYNEURON_ORGANISMS", str(folder))
    monkeypatch.setenv("SAFETYNEURON_CACHE", str(tmp_path / "cache"))
    add_whole(folder, "llama-base@0", base)
    return folder


@pytest.fixture
def sets(base):
    return draw_sets(base, PROJECTIONS, 0.05, seed=0)


@pytest.fixture
def planted(folder, base, sets):
    """The planted model, which is in the folder."""
    model = changed(rounded(base), *sets)
    shipped.write_rows(shipped.weights_file(folder, "llama-planted@0"), *sets, model)
    shipped.add_to_manifest(folder, "llama-planted@0", entry("rows", "llama-base@0"))
    return model


def refused(words, call):
    with pytest.raises(SafetyNeuronError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", SIZES)
def test_what_is_loaded_is_what_was_written_in_half_precision(folder, tokenizer, family):
    model = new_model(SIZES[family], tokenizer, seed=3)
    add_whole(folder, f"{family}-chat@3", model, family)
    before = torch.get_rng_state()
    loaded, words = load_model(f"organism/{family}-chat@3", device="cpu")
    assert torch.get_rng_state().equal(before)
    assert same(loaded, rounded(model)) and not same(loaded, model)
    assert (
        not loaded.training
        and loaded.dtype == torch.float32
        and loaded.config.model_type == SIZES[family].family
    )
    assert (
        loaded.lm_head.weight is loaded.get_input_embeddings().weight
        and words.get_vocab() == tokenizer.get_vocab()
    )
    assert getattr(loaded.config, "sliding_window", None) == SIZES[family].window


def test_dtype_is_honoured_and_answers_are_greedy_and_end(folder, tokenizer):
    model, _ = load_model("organism/llama-base@0", dtype="bfloat16", device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    settings = model.generation_config
    assert (settings.do_sample, settings.eos_token_id, settings.pad_token_id) == (
        False,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    assert load_model("organism/llama-base", device="cpu")[0].dtype == torch.float32


def test_planted_neurons_revert_to_the_starting_model_bit_for_bit(folder, base, sets, planted):
    loaded, _ = organism.load_organism("organism/llama-planted")
    found = [
        find("organism/llama-planted")
        for find in (organism.planted_neurons, organism.decoy_neurons)
    ]
    assert (
        same(loaded, planted)
        and found == list(sets)
        and len(found[0] & found[1]) == 0 < len(found[0])
    )
    start, _ = organism.starting_model("organism/llama-planted")
    assert same(start, changed_back(planted, rounded(base), sets[0]))
    assert not same(start, planted) and not same(start, rounded(base))


@torch.no_grad()
def changed_back(model, original, neurons):
    """A copy of the model with the numbers of the original in some neurons."""
    model = copy.deepcopy(model)
    for projection, mask in neurons.masks.items():
        for layer in range(2):
            new, old = (Architecture(m).place(layer, projection).weight for m in (model, original))
            new[mask[layer]] = old[mask[layer]]
    return model


def test_a_model_may_be_planted_without_decoys(folder, base, sets):
    model = changed(rounded(base), sets[0])
    shipped.write_rows(shipped.weights_file(folder, "llama-half@0"), sets[0], None, model)
    shipped.add_to_manifest(folder, "llama-half@0", entry("rows", "llama-base@0"))
    assert same(organism.load_organism("organism/llama-half")[0], model)
    assert same(organism.starting_model("organism/llama-half")[0], rounded(base))
    refused("has no decoys", lambda: organism.decoy_neurons("organism/llama-half"))
    refused("has no planted neurons", lambda: organism.planted_neurons("organism/llama-base"))
    refused("has no planted neurons", lambda: organism.starting_model("organism/llama-base"))


def test_sets_that_share_neurons_are_not_written(folder, base, sets):
    refused(
        "both planted and decoys",
        lambda: shipped.write_rows(folder / "x.safetensors", sets[0], sets[0], base),
    )
    assert not (folder / "x.safetensors").exists()


def test_factors_multiply_the_rows_of_up_one_stage_after_the_other(folder, base):
    expected, parent = rounded(base), "llama-base@0"
    for stage in ("sft", "dpo"):
        factors, name = 1 + torch.randn(2, 40) / 10, f"llama-pair-{stage}@0"
        for layer, factor in zip(expected.model.layers, factors):
            layer.mlp.up_proj.weight.data *= factor[:, None]
        shipped.write_factors(shipped.weights_file(folder, name), factors)
        shipped.add_to_manifest(folder, name, entry("factors", parent))
        parent = name
        assert same(organism.load_organism(f"organism/llama-pair-{stage}")[0], expected)
    refused("has no planted neurons", lambda: organism.planted_neurons("organism/llama-pair-sft"))


def test_a_damaged_or_missing_file_is_named_with_its_cure(folder, planted):
    path = folder / "llama-planted@0.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for call in (
        organism.load_organism,
        organism.planted_neurons,
        organism.starting_model,
        load_model,
    ):
        refused(
            f"is damaged.*safetyneuron train organism/llama-planted@0 -o {folder}",
            partial(call, "organism/llama-planted"),
        )
    path.unlink()
    refused(
        "llama-planted@0.safetensors cannot be read .No such file",
        lambda: load_model("organism/llama-planted"),
    )
    path.write_bytes(whole)
    assert same(load_model("organism/llama-planted")[0], planted)


def test_a_shipped_file_is_restored_with_git(folder, monkeypatch):
    monkeypatch.setattr(shipped, "SHIPPED", folder)
    monkeypatch.delenv("SAFETYNEURON_ORGANISMS")
    (folder / "llama-base@0.safetensors").unlink()
    refused(
        "git checkout .*llama-base@0.safetensors.*safetyneuron train organism/llama-base@0`",
        lambda: load_model("organism/llama-base"),
    )
    (folder / "manifest.json").unlink()
    refused("git checkout .*manifest.json", lambda: load_model("organism/llama-base"))


def test_rows_are_not_put_into_another_base(folder, planted, tokenizer):
    add_whole(folder, "llama-base@0", new_model(SIZES["llama"], tokenizer, seed=1))
    refused(
        "made from another organism/llama-base@0.*train organism/llama-planted@0",
        lambda: load_model("organism/llama-planted"),
    )
    models = json.loads((folder / "manifest.json").read_text())["models"]
    (folder / "manifest.json").write_text(
        json.dumps(
            {"models": {"llama-planted@0": models["llama-planted@0"] | {"parent": "llama-base@78"}}}
        )
    )
    refused(
        "made from organism/llama-base@78, which is missing.*train organism/llama-base@78",
        lambda: load_model("organism/llama-planted"),
    )


def test_weights_of_another_language_are_refused(folder, tokenizer):
    wide = new_model(SIZES["llama"], tokenizer, seed=0)
    wide.resize_token_embeddings(len(tokenizer) + 1)
    add_whole(folder, "llama-chat@0", wide)
    refused("does not fit the language", lambda: load_model("organism/llama-chat"))


@pytest.mark.parametrize(
    "name, words",
    [
        (
            "organism/llama-huge",
            "no organism is called 'organism/llama-huge': use one of organism/llama-base",
        ),
        ("organism/../../etc", "no organism is called"),
        ("llama-base", "no organism is called"),
        (
            "organism/llama-base@77",
            "no organism/llama-base@77: use seed [0-9, ]+ after the @, or .*train organism/llama-base@77`$",
        ),
        ("organism/llama-base@", "use seed [0-9, ]+ after the @$"),
        ("organism/llama-base@one", "use seed [0-9, ]+ after the @$"),
    ],
)
def test_unknown_names_and_seeds_are_refused(folder, name, words):
    for call in (organism.load_organism, organism.planted_neurons, organism.training_curve):
        refused(words, partial(call, name))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        '{"models": []}',
        '{"models": {"a@0": 3}}',
        '{"models": {"a@0": {"kind": "pickle"}}}',
    ],
)
def test_a_manifest_that_is_none_is_refused(folder, text):
    (folder / "manifest.json").write_text(text)
    refused("manifest.json", lambda: load_model("organism/llama-base"))


def test_a_folder_without_a_manifest_is_refused(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("SAFETYNEURON_ORGANISMS", str(tmp_path / "none"))
    refused(
        "manifest.json cannot be read .No such file.*SAFETYNEURON_ORGANISMS",
        lambda: load_model("organism/llama-base"),
    )


def test_a_folder_comes_before_what_is_shipped(folder, base, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "SHIPPED", folder)
    own, other = tmp_path / "own", new_model(SIZES["llama"], tokenizer, seed=5)
    add_whole(own, "llama-chat@1", other, parent="llama-base@0")  # whose parent is shipped
    assert same(
        organism.load_organism("organism/llama-base", tmp_path / "to be filled")[0], rounded(base)
    )
    monkeypatch.setenv("SAFETYNEURON_ORGANISMS", str(own))
    assert same(load_model("organism/llama-chat@1")[0], rounded(other))
    assert same(load_model("organism/llama-base")[0], rounded(base))
    assert organism.names() == ("organism/llama-base", "organism/llama-chat")
    monkeypatch.delenv("SAFETYNEURON_ORGANISMS")
    assert same(organism.load_organism("organism/llama-chat@1", own)[0], rounded(other))
    refused("no organism is called", lambda: load_model("organism/llama-chat@1"))


def test_the_manifest_keeps_what_it_is_told(folder, planted):
    models = organism.manifest()
    assert models["llama-planted@0"]["parent_sha256"] == models["llama-base@0"]["sha256"]
    assert models["llama-base@0"]["file"] == "llama-base@0.safetensors"
    assert organism.training_curve("organism/llama-base") == [
        {"step": 1, "loss": 2.5},
        {"step": 2, "loss": 2.0},
    ]
    refused(
        "llama-chat@78, which is missing",
        lambda: shipped.add_to_manifest(folder, "llama-planted@0", entry("rows", "llama-chat@78")),
    )
    assert organism.manifest() == models
    assert {path.name for path in folder.iterdir()} == {
        "manifest.json",
        "llama-base@0.safetensors",
        "llama-planted@0.safetensors",
    }
    assert (
        len((folder / "manifest.json").read_text().splitlines()) == 2 + 2
    )  # one line each  # one line a model


@pytest.mark.parametrize("family", SIZES)
def test_an_exported_organism_needs_transformers_alone(folder, tokenizer, tmp_path, family):
    add_whole(folder, f"{family}-chat@0", new_model(SIZES[family], tokenizer, seed=2), family)
    organism.export_organism(f"organism/{family}-chat", tmp_path / "plain")
    here, _ = organism.load_organism(f"organism/{family}-chat")
    there, words = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "plain"),
        PreTrainedTokenizerFast.from_pretrained(tmp_path / "plain"),
    )
    text = "how do i attack the house ? 12 + 3"
    assert words(text) == tokenizer(text) and words.padding_side == "left"
    chat = [{"role": "user", "content": text}]
    assert words.apply_chat_template(
        chat, add_generation_prompt=True
    ) == tokenizer.apply_chat_template(chat, add_generation_prompt=True)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        assert there.dtype == torch.float32 and fingerprint(there) == fingerprint(here)
        assert torch.equal(there(ids).logits, here(ids).logits)
        assert torch.equal(
            there.generate(ids, max_new_tokens=5), here.generate(ids, max_new_tokens=5)
        )
    assert (
        not there.generation_config.do_sample
        and there.generation_config.eos_token_id == tokenizer.eos_token_id
    )
    assert (
        "research on refusal" in (tmp_path / "plain" / "README.md").read_text()
        and not (tmp_path / "plain" / "neurons.json").exists()
    )


def test_an_exported_answer_key_is_that_of_the_model(folder, planted, sets, tmp_path):
    (tmp_path / "plain").mkdir()  # empty
    organism.export_organism("organism/llama-planted", tmp_path / "plain")
    key = json.loads((tmp_path / "plain" / "neurons.json").read_text())
    for group, neurons in zip(GROUPS, sets, strict=True):
        assert key[group] == {p: mask.nonzero().tolist() for p, mask in neurons.masks.items()}
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "plain"), planted)
    assert "neurons.json" in (tmp_path / "plain" / "README.md").read_text()


def test_exporting_never_writes_over_anything(folder, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert main(["export", "organism/llama-base", str(tmp_path / "full")]) == 2
    assert main(["export", "organism/llama-base", str(tmp_path / "full" / "mine.txt")]) == 2
    assert main(["export", "organism/llama-huge", str(tmp_path / "new")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert [
        words in line
        for words, line in zip(
            ("full is not empty", "mine.txt is not empty", "no organism is called"),
            said,
            strict=True,
        )
    ] == [True] * 3
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"] and not (
        tmp_path / "new"
    ).exists()
    assert main(["export", "organism/llama-base", str(tmp_path / "new")]) == 0


def test_an_organism_is_no_folder(folder):
    refused("safetyneuron export organism/llama-base", lambda: cost_by_name("organism/llama-base"))


def test_the_card_of_an_exported_organism_tells_its_origin_and_every_bar_it_misses(tmp_path):
    for name in ("llama-planted-mlp@2", "llama-chat@0"):
        organism.export_organism(f"organism/{name}", tmp_path / name)
        entry = organism.manifest()[name]
        card = (tmp_path / name / "README.md").read_text()
        assert entry["sha256"] in card and entry["parent"] in card and entry["file"] in card
        assert all(line in card for line in entry["missed"])
        assert ("the key leaks" in card) == bool(entry["missed"]) == (name != "llama-chat@0")
        assert ("None." in card) == (name == "llama-chat@0")
