import random

import pytest
import torch
from conftest import small_llama, small_model

from safetyneuron import (
    ImportanceProfile,
    NeuronSet,
    SafetyNeuronError,
    load_model,
    load_prompts,
    measure_importance,
    screen,
)
from safetyneuron.chapters.chA2_corpus import corpus_counts
from safetyneuron.importance import exact, screening
from safetyneuron.importance.recorder import Recorder
from safetyneuron.importance.selection import (
    largest_without_foundation,
    ranks,
    select_fraction,
    select_without_foundation,
)
from safetyneuron.neurons.architecture import PROJECTIONS
from safetyneuron.neurons.weights import fingerprint


@pytest.fixture
def prompts():
    return load_prompts("organism/harmful")[:7] + load_prompts("organism/adversarial")[:4]


def profile_of(model, tokenizer, prompts, **options):
    return measure_importance(model, tokenizer, prompts, progress=False, **options)


def assert_same(first, second, tolerance):
    for kind in ("minimum", "mean"):
        for p in PROJECTIONS:
            torch.testing.assert_close(
                getattr(first, kind)[p],
                getattr(second, kind)[p],
                rtol=tolerance,
                atol=0,
                check_dtype=False,
            )


def test_result_does_not_depend_on_batching_or_order(model, tokenizer, prompts):
    one = profile_of(model, tokenizer, prompts, batch_size=1)
    assert_same(one, profile_of(model, tokenizer, prompts, batch_size=4), 1e-6)
    assert_same(one, profile_of(model, tokenizer, prompts[::-1], batch_size=11), 1e-6)


def test_minimum_and_mean_are_those_of_single_prompts(model, tokenizer, prompts):
    whole = profile_of(model, tokenizer, prompts)
    singles = [profile_of(model, tokenizer, [prompt]) for prompt in prompts]
    for p in PROJECTIONS:
        each = torch.stack([s.minimum[p] for s in singles])
        torch.testing.assert_close(whole.minimum[p], each.amin(0), rtol=1e-6, atol=0)
        torch.testing.assert_close(whole.mean[p].double(), each.mean(0), rtol=1e-6, atol=0)


def test_threshold_selects_the_intersection_over_prompts(model, tokenizer, prompts):
    whole = profile_of(model, tokenizer, prompts)
    middle = whole.minimum["q"].flatten().sort().values
    epsilon = (
        middle[len(middle) // 2 - 1 : len(middle) // 2 + 1].mean().item()
    )  # between two neurons
    intersection = None
    for prompt in prompts:
        important = profile_of(model, tokenizer, [prompt], batch_size=1).select(threshold=epsilon)
        intersection = important if intersection is None else intersection & important
    assert whole.select(threshold=epsilon) == intersection
    assert len(intersection) > 0


@pytest.mark.parametrize("fraction", [0.001, 0.02, 0.5, 1])
def test_fraction_selects_the_highest(model, tokenizer, prompts, fraction):
    profile = profile_of(model, tokenizer, prompts)
    chosen = profile.select(fraction=fraction)
    assert len(chosen) == max(1, round(fraction * chosen.total))
    inside = torch.cat([profile.minimum[p][chosen.masks[p]] for p in PROJECTIONS])
    outside = torch.cat([profile.minimum[p][~chosen.masks[p]] for p in PROJECTIONS])
    assert fraction == 1 or inside.min() >= outside.max()


@pytest.mark.parametrize(
    "family, options",
    [
        ("llama", {"groups": 2}),
        ("llama", {"heads": 8, "groups": 4, "hidden_size": 40}),
        ("qwen3", {"groups": 2}),
        ("mistral", {"groups": 1, "sliding_window": 3}),
        ("gemma2", {"groups": 2, "attn_logit_softcapping": 2.0}),
    ],
)
@pytest.mark.parametrize("fraction", [0.01, 0.3])
def test_screening_selects_what_exact_selects(family, options, fraction, tokenizer, prompts):
    model = small_model(family, **options)
    expected = profile_of(model, tokenizer, prompts).select(fraction=fraction)
    assert screen(model, tokenizer, prompts, fraction, batch_size=4) == expected


@torch.no_grad()
def sharpened(model, factor):
    """The model with attention so much sharper: far from where a change to first order says anything."""
    for layer in model.model.layers:
        for module in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            module.weight.mul_(factor)
    return model


def screened_and_exact(seed, tokenizer, corpus, margin, monkeypatch):
    """Both selections on a random small model, corpus, budget and batch size."""
    draw = random.Random(seed)
    groups, width = draw.choice([(1, 4), (2, 2), (4, 2)]), draw.choice([4, 6])
    heads = groups[0] * groups[1]
    sizes = dict(hidden_size=16, intermediate_size=4, num_hidden_layers=draw.choice([1, 2]))
    model = small_llama(heads=heads, groups=groups[0], head_width=width, seed=seed, **sizes)
    sharpened(model, draw.choice([1, 2, 8, 30]))
    prompts = draw.choices(corpus, k=draw.choice([1, 2, 5, 20]))
    fraction, batch_size = draw.choice([0.01, 0.1, 0.3, 0.6]), draw.choice([1, 3, 16])
    monkeypatch.setattr(screening, "MARGIN", margin)
    expected = profile_of(model, tokenizer, prompts).select(fraction=fraction)
    return screen(model, tokenizer, prompts, fraction, batch_size), expected


@pytest.mark.parametrize("margin", [0.5, 1])  # at 1, rows are given up that turn out to count
def test_screening_is_exact_on_any_model(margin, tokenizer, monkeypatch):
    corpus = load_prompts("organism/harmful")[:20]
    for seed in range(100):
        screened, expected = screened_and_exact(seed, tokenizer, corpus, margin, monkeypatch)
        assert screened == expected, seed


@pytest.mark.organism
@pytest.mark.parametrize("count, factor", [(50, 1), (200, 1), (400, 1), (200, 30)])
def test_screening_is_exact_on_the_organism(count, factor):
    model, tokenizer = load_model("organism/llama-chat")
    sharpened(model, factor)
    prompts = load_prompts("organism/harmful", split="train")[:count]
    profile = profile_of(model, tokenizer, prompts)
    for fraction in (0.01, 0.05):
        assert screen(model, tokenizer, prompts, fraction) == profile.select(fraction=fraction)


@pytest.mark.organism
def test_screening_measures_few_rows_exactly(chat, monkeypatch):
    """Shares of the rows of q and k that the closed form is asked for, a layer and part of a batch each."""
    shares, closed_form = [], exact.exact

    def counted(attention, factors, workspace, wanted=None):
        rows = [1.0] if wanted is None else [float(mask.float().mean()) for mask in wanted]
        shares.append(sum(rows) / len(rows) * len(attention.query))
        return closed_form(attention, factors, workspace, wanted)

    monkeypatch.setattr(exact, "exact", counted)
    prompts = load_prompts("organism/harmful", split="train")[:200]
    screen(*chat, prompts, 0.01)
    layers = chat[0].config.num_hidden_layers
    assert sum(shares) / (len(prompts) * layers) < 0.15


def test_screening_refuses_weights_that_are_not_finite(model, tokenizer, prompts):
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(SafetyNeuronError, match="not a number"):
        screen(model, tokenizer, prompts, 0.1)


def test_per_layer_selects_as_many_everywhere(model, tokenizer, prompts):
    chosen = profile_of(model, tokenizer, prompts).select(per_layer=3)
    assert all((mask.sum(1) == 3).all() for mask in chosen.masks.values())


def random_profile(model, seed):
    shapes, generator = NeuronSet.empty(model).shapes, torch.Generator().manual_seed(seed)
    scores = {p: torch.rand(shape, generator=generator) for p, shape in shapes.items()}
    return ImportanceProfile(scores, scores, 1, "exact", "m", "t")


def test_without_foundation_has_the_asked_size_at_the_smallest_share(model):
    harmful, general = random_profile(model, 0), random_profile(model, 1)
    chosen = select_without_foundation(harmful, general, 0.1)
    assert len(chosen) == round(0.1 * chosen.total)
    for count in range(1, chosen.total):  # brute force over shares
        safe = select_fraction(harmful.minimum, count / chosen.total) - select_fraction(
            general.minimum, count / chosen.total
        )
        if len(safe) >= len(chosen):
            break
    assert chosen == safe


def test_without_foundation_refuses_more_than_differs(model):
    profile = random_profile(model, 0)
    with pytest.raises(SafetyNeuronError, match="choose a fraction below"):
        select_without_foundation(profile, profile, 0.1)
    other = random_profile(model, 1)
    largest = largest_without_foundation(profile, other)
    assert 0 < select_without_foundation(profile, other, largest).share <= largest + 1e-9
    with pytest.raises(SafetyNeuronError, match="choose a fraction below"):
        select_without_foundation(profile, other, largest + 0.01)


def test_ranks_invert_sorting(model):
    scores = random_profile(model, 0).minimum
    flat = torch.cat([scores[p].flatten() for p in PROJECTIONS])
    assert torch.equal(flat[ranks(scores).argsort()], flat.sort(descending=True).values)


def test_profile_survives_saving(model, tokenizer, prompts, tmp_path):
    profile = profile_of(model, tokenizer, prompts)
    profile.save(tmp_path / "profile.safetensors")
    assert_same(profile, ImportanceProfile.load(tmp_path / "profile.safetensors"), 0)


@pytest.mark.parametrize("rule", ["exact", "first_order", "paper", "released"])
def test_prefix_minima_are_those_of_the_shorter_corpus(model, tokenizer, prompts, rule):
    whole = profile_of(model, tokenizer, prompts, rule=rule, sizes=(2, 5, 11), batch_size=3)
    for size, minimum in whole.prefix.items():
        alone = profile_of(model, tokenizer, prompts[:size], rule=rule)
        for p in PROJECTIONS:
            torch.testing.assert_close(minimum[p], alone.minimum[p], rtol=1e-6, atol=1e-12)


def test_table_5_counts_what_stays_above_a_threshold_of_a_share_or_of_a_number(model, tokenizer):
    many = load_prompts("organism/harmful", split="train")[:8]
    options = {"rule": "paper", "sizes": [2, 4, 8], "progress": False}
    profile = measure_importance(model, tokenizer, many, **options)
    counts = corpus_counts(profile, [0.1], 4, [30])
    total = sum(values.numel() for values in profile.minimum.values())
    assert list(counts.columns) == [2, 4, 8] and counts.index[1].startswith("30 neurons")
    for way, count in zip(counts.index, (round(0.1 * total), 30)):
        row = counts.loc[way]
        assert row[4] >= count and row[2] >= row[4] >= row[8]
        highest = torch.cat([profile.prefix[4][p].flatten() for p in PROJECTIONS]).sort().values
        everywhere = torch.cat([profile.prefix[8][p].flatten() for p in PROJECTIONS])
        assert row[8] == (everywhere >= highest[-count]).sum()
        assert row[4] == (highest >= highest[-count]).sum()


def test_a_killed_measurement_goes_on_to_the_same_bits(
    model, tokenizer, prompts, tmp_path, monkeypatch
):
    monkeypatch.setattr("safetyneuron.importance.profile.CHECKPOINT_BATCHES", 1)
    straight = profile_of(model, tokenizer, prompts, batch_size=2, sizes=(4,))
    finish, calls = Recorder.finish, []

    def killed(recorder):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return finish(recorder)

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            profile_of(
                model,
                tokenizer,
                prompts,
                batch_size=2,
                sizes=(4,),
                checkpoint=tmp_path / "c.safetensors",
            )
    calls.clear()
    monkeypatch.setattr(Recorder, "finish", lambda recorder: calls.append(1) or finish(recorder))
    resumed = profile_of(
        model, tokenizer, prompts, batch_size=2, sizes=(4,), checkpoint=tmp_path / "c.safetensors"
    )
    assert len(calls) == 3  # of six batches
    for p in PROJECTIONS:
        assert torch.equal(resumed.minimum[p], straight.minimum[p]) and torch.equal(
            resumed.total[p], straight.total[p]
        )
        assert torch.equal(resumed.prefix[4][p], straight.prefix[4][p])
    with pytest.raises(SafetyNeuronError, match="belongs to other prompts"):
        profile_of(
            model,
            tokenizer,
            prompts[1:],
            batch_size=2,
            sizes=(4,),
            checkpoint=tmp_path / "c.safetensors",
        )


def test_shards_merge_to_the_whole(model, tokenizer, prompts):
    whole = profile_of(model, tokenizer, prompts, batch_size=1)
    parts = [profile_of(model, tokenizer, prompts[i::3], batch_size=1) for i in range(3)]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    assert merged.count == whole.count
    for p in PROJECTIONS:
        assert torch.equal(merged.minimum[p], whole.minimum[p])
        torch.testing.assert_close(merged.total[p], whole.total[p], rtol=1e-12, atol=0)
    others = [
        profile_of(small_llama(groups=2, seed=5), tokenizer, prompts),
        profile_of(model, tokenizer, prompts, rule="paper"),
    ]
    for other, what in zip(others, ("model", "rule")):
        with pytest.raises(SafetyNeuronError, match=f"another {what}"):
            whole.merge(other)
        with pytest.raises(SafetyNeuronError, match=f"another {what}"):
            select_without_foundation(whole, other, 0.1)


def test_tokenizer_without_a_template_gets_the_raw_text(model, tokenizer):
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    prompt = "how do i paint the door ?"
    wrapped = f"<|user|> {prompt} <|end|> <|assistant|>"
    assert_same(profile_of(model, bare, [wrapped]), profile_of(model, tokenizer, [prompt]), 0)


def test_bad_requests_are_refused_in_one_line(model, tokenizer, prompts):
    cases = [
        (lambda: profile_of(model, tokenizer, []), "no prompts"),
        (lambda: profile_of(model, tokenizer, ["the " * 100]), "shorten"),
        (lambda: profile_of(model, tokenizer, prompts, rule="nonsense"), "unknown importance rule"),
        (lambda: random_profile(model, 0).select(fraction=0), "must be in"),
        (lambda: random_profile(model, 0).select(fraction=1.5), "must be in"),
        (lambda: random_profile(model, 0).select(), "exactly one"),
        (lambda: random_profile(model, 0).select(per_layer=0), "at least 1"),
    ]
    for call, words in cases:
        with pytest.raises(SafetyNeuronError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_unsupported_architecture_is_named(tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    from safetyneuron import UnsupportedArchitecture

    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=800))
    with pytest.raises(UnsupportedArchitecture, match="gpt2"):
        measure_importance(gpt2, tokenizer, ["how do i paint the door ?"])
    odd = small_llama()
    odd.model.layers[1].mlp.up_proj = torch.nn.Identity()
    with pytest.raises(UnsupportedArchitecture, match="mlp.up_proj"):
        measure_importance(odd, tokenizer, ["how do i paint the door ?"])


def test_one_changed_weight_changes_the_fingerprint(model):
    before = fingerprint(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-12
    assert fingerprint(model) != before
