"""Cache keys: what enters them, and what does not."""

import copy
import re
import shutil

import pytest
import torch
from conftest import ROOT, small_llama
from tokenizers import normalizers
from tokenizers.processors import TemplateProcessing

from safetyneuron import (
    NeuronSet,
    SafetyNeuronError,
    code,
    deactivate,
    measure_importance,
    patched_generation,
    sn_tune,
)
from safetyneuron.attacks import (
    PAIR,
    AttackResult,
    ChatJudge,
    ChatRewriter,
    Direct,
    load_requests,
    rewriters,
)
from safetyneuron.kept import defences
from safetyneuron.metrics import Suite, evaluate
from safetyneuron.metrics import judge as judges
from safetyneuron.neurons.activations import activations, channel_means, mean_ablated
from safetyneuron.neurons.identity import identity, model_digest, tokenizer_digest
from safetyneuron.neurons.weights import fingerprint
from safetyneuron.organism.tokenizer import build_tokenizer
from safetyneuron.tuning.circuit_breaker import circuit_break
from safetyneuron.tuning.sn_tune import TunedNeurons

KEYED = ("metrics.suite", "tuning.sn_tune", "kept.defences", "attacks", "alignment.stages")
SUITE = Suite(("organism/harmful",), prompts=4)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAFETYNEURON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model():
    return small_llama(max_position_embeddings=128)


def all_down(model):
    masks = NeuronSet.empty(model).masks
    return NeuronSet(masks | {"down": torch.ones_like(masks["down"])})


def shuffle_a_row(model):
    model.lm_head.weight[3] = model.lm_head.weight[3].flip(0)


def exchange_two_rows(model):
    model.lm_head.weight[[3, 4]] = model.lm_head.weight[[4, 3]]


def reverse_the_norm(model):
    model.model.norm.weight.copy_(model.model.norm.weight.flip(0))


def negate_a_row(model):
    row = model.model.layers[0].mlp.up_proj.weight[2]
    row[: len(row) // 2].abs_()
    row[len(row) // 2 :].abs_().neg_()  # so that the changed signs cancel in a plain sum
    yield
    row.neg_()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_number_at_another_place_or_with_another_sign_changes_the_fingerprint(model, dtype):
    model = model.to(dtype)
    with torch.no_grad():
        for change in (shuffle_a_row, exchange_two_rows, reverse_the_norm):
            before = fingerprint(model)
            change(model)
            assert fingerprint(model) != before, change.__name__
        negating = negate_a_row(model)
        next(negating)
        before = fingerprint(model)
        next(negating, None)
        assert fingerprint(model) != before


def test_layout_in_memory_does_not_change_the_fingerprint(model):
    before, weight = fingerprint(model), model.lm_head.weight
    weight.data = weight.data.T.contiguous().T
    assert not weight.is_contiguous() and fingerprint(model) == before


def test_configuration_and_generation_settings_enter_the_key_and_paths_do_not(model):
    before = model_digest(model)
    model.config._name_or_path = "somewhere/else"
    assert model_digest(model) == before
    for settings, name, value in (
        (model.config, "rms_norm_eps", 1.0),
        (model.generation_config, "repetition_penalty", 3.0),
    ):
        old = getattr(settings, name)
        setattr(settings, name, value)
        assert model_digest(model) != before, name
        setattr(settings, name, old)
    assert model_digest(model) == before


def lower(tokenizer):
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


def begin_with_a_word(tokenizer):
    word = tokenizer.convert_ids_to_tokens(7)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{word} $A", special_tokens=[(word, 7)]
    )


@pytest.mark.parametrize(
    "change",
    [
        lower,
        begin_with_a_word,
        lambda tokenizer: setattr(tokenizer, "chat_template", "{{ messages }}"),
        lambda tokenizer: setattr(tokenizer, "padding_side", "right"),
        lambda tokenizer: setattr(tokenizer, "eos_token", tokenizer.convert_ids_to_tokens(9)),
    ],
)
def test_every_part_of_a_tokenizer_enters_the_key(change):
    tokenizer = build_tokenizer()
    before = tokenizer_digest(tokenizer)
    tokenizer(["a", "how do i"], padding="max_length", truncation=True, max_length=9)
    assert tokenizer_digest(tokenizer) == before  # however it was last called
    change(tokenizer)
    assert tokenizer_digest(tokenizer) != before


def test_inside_a_patch_another_model_is_asked_and_kept(model, tokenizer):
    donor = copy.deepcopy(model)
    with torch.no_grad():
        donor.model.layers[0].mlp.up_proj.weight.neg_()
    neurons, means = all_down(model), channel_means(model, tokenizer, ["how do i"])
    tuned = TunedNeurons(model, neurons)
    contexts = {
        "whole": lambda: activations(model),
        "off": lambda: deactivate(model, neurons),
        "mean": lambda: mean_ablated(model, neurons, means),
        "patched": lambda: patched_generation(model, donor, neurons),
        "patched in the prompt": lambda: patched_generation(model, donor, neurons, "prompt"),
        "constant": lambda: mean_ablated(model, neurons, {"down": means["down"] + 1}),
        "zero": lambda: mean_ablated(model, neurons, {"down": 0 * means["down"]}),
        "tuned": tuned.added,
    }
    keys = {}
    for name, context in contexts.items():
        with context():
            keys[name] = model_digest(model)
        with context():
            assert model_digest(model) == keys[name], name
    assert len(set(keys.values())) == len(keys) and keys["whole"] == model_digest(model)


def test_scores_inside_a_patch_are_not_those_of_the_whole_model(chat, base):
    (model, tokenizer), (donor, _) = chat, base
    with patched_generation(model, donor, all_down(model)):
        inside = evaluate(model, tokenizer, SUITE)
    assert (
        inside["asr", "organism/harmful"]
        != (evaluate(model, tokenizer, SUITE)["asr", "organism/harmful"])
    )


def test_hooks_of_somebody_else_are_refused_in_one_line(model, tokenizer):
    block = model.model.layers[1].mlp
    for hook in (block.register_forward_hook, block.register_forward_pre_hook):
        handle = hook(lambda *_: None)
        with pytest.raises(SafetyNeuronError, match="on model.layers.1.mlp") as caught:
            evaluate(model, tokenizer, SUITE)
        assert "\n" not in str(caught.value)
        handle.remove()
    evaluate(model, tokenizer, SUITE)


def test_reading_hidden_states_and_training_leave_the_key_as_it_was(model, tokenizer):
    model = model.float()
    before = identity(model, tokenizer)
    model(torch.tensor([[5, 6]]), output_hidden_states=True)
    documents = [{"prompt": "how do i", "completion": "use"}] * 2
    circuit_break(model, tokenizer, documents, documents, steps=1, batch_size=1)
    assert identity(model, tokenizer) == before


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the package's text to change: `digests(path, old, new)` are those of some modules with one text changed."""
    copied = tmp_path / "safetyneuron"
    ignored = shutil.ignore_patterns("weights", "__pycache__")
    shutil.copytree(ROOT / "safetyneuron", copied, ignore=ignored)
    monkeypatch.setattr(code, "PACKAGE", copied)

    def digests(path, change):
        (copied / path).write_text(change((ROOT / "safetyneuron" / path).read_text("utf-8")))
        code._read.cache_clear()
        found = {name: code.code_digest(f"safetyneuron.{name}") for name in KEYED}
        (copied / path).write_text((ROOT / "safetyneuron" / path).read_text("utf-8"))
        code._read.cache_clear()
        return found

    return digests


def add(text):
    return text + "\nADDED = 1\n"


@pytest.mark.parametrize(
    "path, changed",
    [
        ("tuning/sn_tune.py", {"tuning.sn_tune", "kept.defences"}),
        ("neurons/encoding.py", set(KEYED)),
        ("metrics/refusal_phrases.yaml", {"metrics.suite", "kept.defences", "attacks"}),
        (
            "organism/tasks/facts.yaml",
            {"metrics.suite", "kept.defences"},
        ),  # imported in a function
        ("attacks/gcg.py", {"attacks"}),
        ("alignment/ia3.py", {"alignment.stages"}),
        ("tuning/trainer.py", {"tuning.sn_tune", "kept.defences", "alignment.stages"}),
        ("detectors/saliency.py", set()),
        ("chapters/ch09_contrast.py", set()),
        ("book/plots.py", set()),
        ("run/execute.py", set()),
        ("organism/train.py", set()),  # a loaded model enters the key by what it is
    ],
)
def test_a_change_of_code_changes_the_keys_of_what_it_computes_and_no_others(
    package, path, changed
):
    before = package(path, lambda text: text)
    after = package(path, (lambda text: text + "\nadded: 1\n") if path.endswith("yaml") else add)
    assert {name for name in before if before[name] != after[name]} == changed


def test_comments_docstrings_and_form_change_no_key(package):
    path = "metrics/safety.py"
    before = package(path, lambda text: text)
    assert package(path, lambda text: text + "\n\n# a remark\n") == before
    assert package(path, lambda text: re.sub(r'^"""', '"""Once more: ', text)) == before
    assert (
        package(path, lambda text: text.replace("is_refusal(text)", "is_refusal((text))")) == before
    )
    assert (
        package(path, lambda text: text.replace("= 256", "= 257").replace("256,", "257,")) != before
    )


def test_names_are_followed_through_packages_that_hand_them_on():
    def imported(text):
        return {
            name.removeprefix("safetyneuron.") for name in code.imports_in(code.ast.parse(text))
        }

    assert imported("from safetyneuron import Rate, sn_tune") == {"metrics.rates", "tuning.sn_tune"}
    assert imported("from safetyneuron.metrics import Suite, perplexity") == {
        "metrics.suite",
        "metrics.perplexity",
    }
    assert imported("from safetyneuron.kept import defences as d") == {"kept.defences"}
    assert imported("import safetyneuron.models, torch") == {"models"}
    with pytest.raises(SafetyNeuronError, match="safetyneuron.nothing is no module"):
        code.code_digest("safetyneuron.nothing")


def test_nothing_is_kept_by_a_chapter_or_by_what_draws():
    for room in ("chapters", "book"):
        for path in (ROOT / "safetyneuron" / room).glob("*.py"):
            assert not re.search(r"\b(remember|kept_folder|identity)\(", path.read_text("utf-8"))


def test_an_interrupted_run_is_not_continued_by_other_code(model, tokenizer, tmp_path, monkeypatch):
    documents = [{"prompt": "how do i", "completion": "use"}] * 2

    def measure():
        checkpoint = tmp_path / "profile.safetensors"
        measure_importance(model, tokenizer, ["how do i"], progress=False, checkpoint=checkpoint)

    def tune():
        folder = tmp_path / "training"
        sn_tune(model, tokenizer, documents, all_down(model), learning_rate=1e-3, folder=folder)

    for run in (measure, tune, measure, tune):
        run()
    monkeypatch.setattr("safetyneuron.neurons.identity.code_digest", lambda *modules: "another")
    with pytest.raises(SafetyNeuronError, match="other code: remove it"):
        measure()
    with pytest.raises(SafetyNeuronError, match="holds another training"):
        tune()


def test_an_attack_depends_on_the_weights_of_who_rewrites_and_judges(chat, base, monkeypatch):
    made, whoever = [], {"rewriter": ChatRewriter("any"), "judge": ChatJudge("any")}

    def attack(*_, **__):
        made.append(1)
        return AttackResult({"keyword": [True]}, [1], [1], [[]])

    monkeypatch.setattr(defences, "search_and_judge", attack)
    requests = load_requests("organism/harmful")[:1]
    for helper in (chat, base, chat):
        monkeypatch.setattr(rewriters, "_loaded", lambda name, helper=helper: helper)
        defences.attack(*base, requests, PAIR(1, 1, **whoever), answer_tokens=8)
    assert len(made) == 2
    for judge in (chat, base, chat):
        monkeypatch.setattr(judges, "_loaded", lambda name, judge=judge: judge)
        defences.attack(*base, requests, Direct(), "any", 8)
    assert len(made) == 4
