"""One departure of the released code at a time: each score by hand, and what the departures do together."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import small_llama, small_model
from test_detection import random_profile
from test_importance import measured, padded_batch
from test_tuning import gradient_masks

from safetyneuron import load_documents
from safetyneuron.chapters.chA1_oracle import (
    PRINTED,
    OneByOne,
    clipped_away,
    compare_rules,
    first_of_set_kept,
    gradient_norms,
    per_layer_kept,
    rank_agreement,
    released_differences,
    rules_scatter,
)
from safetyneuron.data.prompts import load_prompts
from safetyneuron.importance.recorder import RULES, recording
from safetyneuron.neurons.architecture import PROJECTIONS
from safetyneuron.neurons.encoding import encode_documents


def one_by_one(model, batch):
    with torch.inference_mode(), recording(model, "released", OneByOne) as recorder:
        recorder.start(batch["attention_mask"])
        model(**batch, use_cache=False)
        return recorder.finish()


@pytest.fixture
def batch():
    return padded_batch([7], ["left"], width=7)


def test_every_departure_starts_from_the_printed_formula(batch):
    model = small_model(heads=8, groups=2, hidden_size=40)
    scores, paper = one_by_one(model, batch), measured(model, batch, "paper")
    for projection in ("q", "k", "v", "up"):
        torch.testing.assert_close(scores[projection, PRINTED], paper[projection])


def test_departures_of_q_by_hand(batch):
    model, seen = small_model(heads=4, groups=2), {}
    attention = model.model.layers[0].self_attn
    handles = [
        getattr(attention, f"{p}_proj").register_forward_hook(
            lambda m, i, o, p=p: seen.update({p: o})
        )
        for p in "qk"
    ]
    scores = one_by_one(model, batch)
    for handle in handles:
        handle.remove()
    q, k = seen["q"][0, :, 10:20], seen["k"][0, :, :10]  # head 1, group 0
    logits, removed = q @ k.T / 10**0.5, torch.outer(q[:, 3], k[:, 3])

    def causal(x):
        return torch.softmax(
            x.masked_fill(~torch.ones(7, 7, dtype=torch.bool).tril(), -torch.inf), -1
        )

    changes = {"scale": causal(logits - removed) - causal(logits)}
    changes["mask"] = torch.softmax(logits - removed / 10**0.5, -1) - torch.softmax(logits, -1)
    assert scores["q", "scale"][0, 0, 13] == pytest.approx(float(changes["scale"].square().sum()))
    assert scores["q", "mask"][0, 0, 13] == pytest.approx(float(changes["mask"].norm()))
    assert torch.allclose(scores["q", "root"].sqrt(), scores["q", PRINTED])


def test_effects_start_where_the_rules_stand(chat):
    prompts = load_prompts("organism/harmful")[:1]
    table = compare_rules(*chat, prompts)
    effects, agreement = released_differences(*chat, prompts, table), rank_agreement(table)
    for projection, _ in effects.index:
        assert effects.loc[projection, "printed"].iloc[0] == pytest.approx(
            agreement.loc[projection, "paper"], abs=1e-3
        )
    assert effects.loc[("q", "root"), "kept"] == 1 and effects.loc[("k", "index"), "kept"] < 0.5


def test_the_scatter_has_a_panel_for_every_rule_and_nothing_else_and_few_ticks():
    values = np.geomspace(1e-4, 3e2, 200)
    columns = dict.fromkeys(("brute force", *RULES), values)
    parts = [pd.DataFrame(columns).assign(projection=p, prompt=0) for p in PROJECTIONS]
    panels = rules_scatter(pd.concat(parts, ignore_index=True)).figure.axes
    titles = [axes.get_title() for axes in panels]
    assert titles == [
        f"{p}: {rule.replace('_', ' ')}" for p in ("q", "k", "v", "up") for rule in RULES
    ]
    for axes in panels:
        (diagonal,) = axes.lines
        assert list(diagonal.get_xdata()) == list(diagonal.get_ydata())
        for ticks, (low, high) in (
            (axes.get_xticks(), axes.get_xlim()),
            (axes.get_yticks(), axes.get_ylim()),
        ):
            assert 2 <= sum(low <= tick <= high for tick in ticks) <= 3
    plt.close("all")


def test_selections_by_hand(model):
    profile = random_profile(model, 0)
    best, wider = profile.select(fraction=0.1), profile.select(fraction=0.2)
    kept = 0
    for projection, mask in wider.masks.items():
        for layer, row in enumerate(mask):
            first = list(set(row.nonzero().flatten().tolist()))[
                : int(best.masks[projection][layer].sum())
            ]
            kept += int(best.masks[projection][layer][first].sum())
    assert first_of_set_kept(profile, 0.1) == pytest.approx(kept / len(best))
    assert 0 < per_layer_kept(profile, 0.1) <= 1


def test_gradient_norms_are_those_of_a_masked_backward_pass(tokenizer):
    model = small_llama(groups=2)
    documents, neurons = (
        load_documents("organism/refusals")[:1],
        random_profile(model, 3).select(fraction=0.2),
    )
    whole, part = gradient_norms(model, tokenizer, documents, neurons)
    (data,) = encode_documents(model, tokenizer, documents)
    model(**{name: torch.tensor([ids]) for name, ids in data.items()}).loss.backward()
    masks = gradient_masks(model, neurons)
    gradients = {p: p.grad for p in model.parameters() if p.grad is not None}
    assert whole == pytest.approx(
        float(torch.stack([g.norm() for g in gradients.values()]).norm()), rel=1e-5
    )
    assert part == pytest.approx(
        float(torch.stack([(g * masks[p]).norm() for p, g in gradients.items()]).norm()), rel=1e-5
    )
    assert (
        clipped_away((3.0, 0.2)) == pytest.approx(10)
        and clipped_away((3.0, 0.6)) == pytest.approx(5)
        and clipped_away((0.2, 0.1)) == 1
    )
