"""Chapter A1: closed forms against brute force, and the departures of the released code one by one."""

import statistics
from dataclasses import replace
from itertools import islice

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.ticker import LogLocator, NullLocator
from transformers import DataCollatorForSeq2Seq

from safetyneuron.book.claims import margin_of
from safetyneuron.book.glue import glue_text
from safetyneuron.book.ledger import glue_findings
from safetyneuron.importance.brute_force import brute_force
from safetyneuron.importance.paper_and_released import (
    divided_by_four,
    head_norms,
    paper_key,
    paper_query,
    paper_value,
    probability_change,
    unrotated,
)
from safetyneuron.importance.recorder import RULES, Recorder, recording, widen
from safetyneuron.importance.selection import select_per_layer
from safetyneuron.metrics.estimates import estimate_mean
from safetyneuron.metrics.verdict import Evidence
from safetyneuron.neurons.architecture import PROJECTIONS
from safetyneuron.neurons.encoding import encode_documents, encode_prompts, pad
from safetyneuron.neurons.sets import NeuronSet
from safetyneuron.progress import clock
from safetyneuron.tuning.sn_tune import TunedNeurons

PRINTED = "as printed"
TOP = 0.1  # share of the neurons whose survival is counted


def _everywhere(attention):
    """The layer without its causal mask: every position looks at every real one."""
    return replace(attention, allowed=attention.real[:, None, None].expand_as(attention.allowed))


def _key_width(attention):
    return attention.groups * attention.key.shape[-1]


# (projection, name) -> scores (B, channels) from what an attention layer did.
SCORES = {
    ("q", PRINTED): paper_query,
    ("q", "scale"): lambda a: probability_change(a, *unrotated(a), 1.0).flatten(1),
    ("q", "rotation"): lambda a: probability_change(a, a.query, a.key, a.scaling).flatten(1),
    ("q", "root"): lambda a: paper_query(a).square(),
    ("q", "mask"): lambda a: paper_query(_everywhere(a)),
    ("k", PRINTED): paper_key,
    ("k", "index"): lambda a: divided_by_four(paper_query(a), _key_width(a)),
    ("v", PRINTED): paper_value,
    ("v", "sum"): lambda a: (
        (a.heads.abs() * a.real[:, None, :, None])
        .sum(2)
        .unflatten(1, (a.groups, a.repeat))
        .sum(2)
        .flatten(1)
    ),
    ("v", "index"): lambda a: divided_by_four(head_norms(a).flatten(1), _key_width(a)),
}
# The same from (input of W_down, output of W_up, row norms of W_down), positions weighted by 1 or 0.
FEED_FORWARD_SCORES = {
    ("up", PRINTED): lambda hidden, up, norms: hidden.norm(dim=1) * norms,
    ("up", "gate"): lambda hidden, up, norms: up.norm(dim=1) * norms,
    ("up", "down"): lambda hidden, up, norms: hidden.norm(dim=1),
    ("up", "sum"): lambda hidden, up, norms: hidden.abs().sum(1) * norms,
}


class OneByOne(Recorder):
    """A recorder whose result has a (B, layers, channels) tensor per entry of the two tables."""

    def _attention_scores(self, layer, attention):
        return {key: score(attention) for key, score in SCORES.items()}

    def before_down(self, layer, module, inputs):
        """Hook on the input of W_down."""
        real = self.real.to(inputs[0].device)[..., None]
        hidden, up = (x * real for x in (widen(inputs[0]), self._inputs.pop((layer, "up"))))
        norms = self._weight(layer, "down", hidden).norm(dim=1)
        self._keep(
            layer, {key: score(hidden, up, norms) for key, score in FEED_FORWARD_SCORES.items()}
        )


def effects(scores, table):
    """How far each difference moves the ranks of the neurons of its projection.

    Parameters
    ----------
    scores : dict of (str, str) to torch.Tensor
        As `OneByOne` records them.
    table : pandas.DataFrame
        `appendix.compare_rules` of the same batch.

    Returns
    -------
    pandas.DataFrame
        Index (projection, difference); columns printed and changed (Spearman correlation with brute force, mean over prompts) and kept
        (share of the highest tenth by the printed formula that is still there).
    """
    rows = {}
    for (projection, name), values in scores.items():
        if name != PRINTED:
            beside = table[table["projection"] == projection].reset_index(drop=True)
            printed, changed = (
                pd.Series(x.flatten().double().cpu().numpy())
                for x in (scores[projection, PRINTED], values)
            )
            best, count = (
                (set(x.nlargest(round(TOP * len(x))).index) for x in (printed, changed)),
                round(TOP * len(beside)),
            )
            both = beside[["prompt", "brute force"]].assign(printed=printed, changed=changed)
            correlations = _by_prompt(both)[["printed", "changed"]].mean()
            rows[projection, name] = [*correlations, len(set.intersection(*best)) / count]
    return pd.DataFrame(rows, index=["printed", "changed", "kept"]).T


def per_layer_kept(profile, fraction):
    """Share of the neurons above a global ε that a selection per layer and matrix, of the same size, keeps."""
    chosen = profile.select(fraction=fraction)
    count = round(len(chosen) / sum(len(mask) for mask in chosen.masks.values()))
    return len(chosen & select_per_layer(profile.minimum, max(1, count))) / len(chosen)


def first_of_set_kept(profile, fraction):
    """Share of the highest neurons kept when half of a set twice as large is taken in the order of a Python set."""
    chosen, wider = profile.select(fraction=fraction), profile.select(fraction=2 * fraction)
    cells = []
    for projection, layer, channels in wider.by_layer():
        count = int(chosen.masks[projection][layer].sum())
        cells.append((projection, layer, list(islice(set(channels.tolist()), count))))
    return len(chosen & NeuronSet.from_cells(wider.shapes, cells)) / len(chosen)


def gradient_norms(model, tokenizer, documents, neurons):
    """Norm of the gradient of the loss over all parameters, and over the rows and columns of `neurons` alone."""
    batch = DataCollatorForSeq2Seq(tokenizer, padding=True)(
        encode_documents(model, tokenizer, documents)
    ).to(model.device)
    whole = torch.autograd.grad(model(**batch).loss, list(model.parameters()), allow_unused=True)
    tuned = TunedNeurons(model, neurons)
    with tuned.added():
        part = torch.autograd.grad(tuned(**batch).loss, list(tuned.parameters()))
    return tuple(
        float(torch.stack([g.norm() for g in gradients if g is not None]).norm())
        for gradients in (whole, part)
    )


def clipped_away(norms, limit=0.3):
    """How much smaller clipping over all parameters makes the neurons' gradient than clipping it alone: a factor."""
    whole, part = norms
    return min(1, limit / part) / min(1, limit / whole)


def one_batch(model, tokenizer, prompts):
    """Prompts as one padded batch on the model's device."""
    return pad(encode_prompts(model, tokenizer, prompts), tokenizer, model.device)


def run_rule(model, batch, rule, kind=Recorder):
    """Importance of every neuron for every prompt of a batch by one rule: projection to (B, layers, channels)."""
    with torch.inference_mode(), recording(model, rule, kind) as recorder:
        recorder.start(batch["attention_mask"])
        model.get_decoder()(**batch, use_cache=False)
        return recorder.finish()


def compare_rules(model, tokenizer, prompts):
    """Every rule beside brute force: a data frame with one row per prompt and neuron.

    Columns: projection, prompt, `brute force` and the rules. Brute force runs a block once per neuron.
    """
    batch = one_batch(model, tokenizer, prompts)
    scores = {"brute force": brute_force(model, batch)} | {
        rule: run_rule(model, batch, rule) for rule in RULES
    }
    tables = []
    for projection in PROJECTIONS:
        columns = {
            name: values[projection].flatten().double().cpu().numpy()
            for name, values in scores.items()
        }
        prompt = [
            i for i, row in enumerate(scores["brute force"][projection]) for _ in row.flatten()
        ]
        tables.append(pd.DataFrame(columns).assign(projection=projection, prompt=prompt))
    return pd.concat(tables, ignore_index=True)


def released_differences(model, tokenizer, prompts, table):
    """`differences.effects` on prompts whose `compare_rules` is `table`."""
    scores = run_rule(model, one_batch(model, tokenizer, prompts), "released", OneByOne)
    return effects(scores, table)


def _by_prompt(scores):
    """Spearman correlation with brute force on every prompt, a column each of the others. scores: columns prompt, `brute force` and others."""
    each = scores.groupby("prompt").corr("spearman")
    return each.xs("brute force", level=-1).drop(columns="brute force")


def rank_agreement(table):
    """Spearman correlation of each rule with brute force, mean over prompts, per projection; NaN where a rule does not score it."""
    parts = table.groupby("projection")
    rows = {
        p: _by_prompt(parts.get_group(p).drop(columns="projection")).mean() for p in PROJECTIONS
    }
    return pd.DataFrame(rows).T.rename_axis("projection")


def agreement_by_prompt(table, rule, projections):
    """Lowest rank correlation of a rule with brute force over projections, for every prompt."""
    parts = table[["prompt", "projection", "brute force", rule]].groupby("projection")
    each = [_by_prompt(parts.get_group(p).drop(columns="projection"))[rule] for p in projections]
    return pd.concat(each, axis=1).min(axis=1)


def glue_rules(overlap, agreement):
    """Glue each rule's overlap with brute force at the top, and its rank correlation by projection. agreement: of `rank_agreement`."""
    glue_text(**{f"overlap_{rule}": f"{100 * share:.0f} %" for rule, share in overlap.items()})
    glue_text(**{f"qk_{rule}": tell_agreement(agreement, rule, ("q", "k")) for rule in RULES})
    glue_text(by_projection=tell_agreement(agreement, "released", PROJECTIONS))


def tell_agreement(agreement, rule, projections):
    """The rank correlations of a rule as text, by projection, of those that it scores."""
    found = agreement.loc[list(projections), rule].dropna()
    return ", ".join(f"{p} {value:.2f}" for p, value in found.items())


def glue_agreement(table, agreement, overlap, model):
    """Glue the chapter's findings: the agreement of three rules with brute force, over prompts. agreement, overlap: of `rank_agreement` and `top_overlap`."""
    claims = {
        "closed-forms-exact": ("exact", PROJECTIONS, 0.999),
        "printed-form-close": ("paper", ("q", "k"), 0.9),
        "released-form-close": ("released", ("q", "k"), 0.9),
    }
    found, numbers = {}, {}
    for key, (rule, projections, bar) in claims.items():
        lowest = agreement_by_prompt(table, rule, projections)
        effect = estimate_mean(lowest.to_numpy()[None, None] - bar)
        found[key] = {model: Evidence(effect, margin_of(key))}
        told = f"{lowest.mean():.2f} on the worst projection"
        if len(projections) < len(PROJECTIONS):
            told = tell_agreement(agreement, rule, projections)
        numbers[key] = (
            f"rank correlation {told}; finds {100 * overlap[rule]:.0f} % of the neurons that matter most"
        )
    glue_findings(found, numbers, model)


def top_overlap(table, fraction):
    """Share of the neurons that brute force ranks highest which each rule ranks highest too, all projections together."""
    count = max(1, round(fraction * len(table)))
    best = set(table["brute force"].nlargest(count).index)
    return {rule: len(best & set(table[rule].nlargest(count).index)) / count for rule in RULES}


def rule_costs(model, tokenizer, prompts, repeats=5):
    """Time of each rule as a ratio to a plain forward pass of the same batch, median over interleaved repeats."""
    batch = one_batch(model, tokenizer, prompts)

    def seconds(action):
        start = clock()
        action()
        return clock() - start

    def plain():
        with torch.inference_mode():
            model.get_decoder()(**batch, use_cache=False)

    costs = {}
    for rule in RULES:
        plain(), run_rule(model, batch, rule)
        costs[rule] = statistics.median(
            seconds(lambda: run_rule(model, batch, rule)) / seconds(plain) for _ in range(repeats)
        )
    return costs


def costs_table(costs):
    """Cost of each rule in plain forward passes. costs: rule to ratio."""
    return pd.DataFrame(
        {"forward passes": {rule: f"{ratio:.1f}" for rule, ratio in costs.items()}}
    ).rename_axis("rule")


def glue_effects(effects):
    """Glue what each difference does, as `effect_PROJECTION_NAME`. effects: `differences.effects`."""
    for (projection, name), row in effects.iterrows():
        text = f"{projection}: ρ {row['printed']:.2f} → {row['changed']:.2f}, {100 * row['kept']:.0f} % of the highest tenth stay"
        glue_text(**{f"effect_{projection}_{name}": text})


def rules_scatter(table, projections=("q", "k", "v", "up")):
    """Each rule against brute force, one row of panels per projection, one column per rule, on logarithmic axes; dashed: equal."""
    size = (8, 1.9 * len(projections))
    figure, panels = plt.subplots(len(projections), len(RULES), figsize=size, sharex="row")
    for row, projection in zip(panels, projections):
        for axes, rule in zip(row, RULES):
            points = table[table["projection"] == projection].iloc[::7]
            axes.scatter(points["brute force"], points[rule], s=2, alpha=0.4, rasterized=True)
            seen = points["brute force"][points["brute force"] > 0]  # no zero on a logarithmic axis
            axes.plot(*[[seen.min(), seen.max()]] * 2, "--", color="black", linewidth=0.8)
            axes.set(xscale="log", yscale="log", title=f"{projection}: {rule.replace('_', ' ')}")
            axes.title.set_fontsize(9)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(LogLocator(numticks=3))
                axis.set_minor_locator(NullLocator())
    figure.supxlabel("brute force")
    figure.supylabel("rule")
    figure.tight_layout()
    return panels[0, 0]
