"""What the appendix chapters compute: importance rules against brute force, their cost, and counts by corpus size."""

import statistics
import time

import pandas as pd
import torch

from safetyneuron.neurons.architecture import PROJECTIONS
from safetyneuron.importance.brute_force import brute_force
from safetyneuron.neurons.encoding import encode_prompts, pad
from safetyneuron.importance.selection import select_fraction
from safetyneuron.differences import OneByOne, effects
from safetyneuron.importance.recorder import Recorder, recording, RULES


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

    Columns: projection, `brute force` and the rules. Brute force runs a block once per neuron.
    """
    batch = one_batch(model, tokenizer, prompts)
    scores = {"brute force": brute_force(model, batch)} | {rule: run_rule(model, batch, rule) for rule in RULES}
    tables = []
    for projection in PROJECTIONS:
        columns = {name: values[projection].flatten().double().cpu().numpy() for name, values in scores.items()}
        tables.append(pd.DataFrame(columns).assign(projection=projection))
    return pd.concat(tables, ignore_index=True)


def released_differences(model, tokenizer, prompts, table):
    """`differences.effects` on prompts whose `compare_rules` is `table`."""
    scores = run_rule(model, one_batch(model, tokenizer, prompts), "released", OneByOne)
    return effects(scores, table)


def rank_agreement(table):
    """Spearman correlation of each rule with brute force, per projection; NaN where a rule does not score it."""
    scored = {p: rows.drop(columns="projection") for p, rows in table.groupby("projection")}
    rows = {p: scored[p].corr("spearman")["brute force"].drop("brute force") for p in PROJECTIONS}
    return pd.DataFrame(rows).T.rename_axis("projection")


def top_overlap(table, fraction):
    """Share of the neurons that brute force ranks highest which each rule ranks highest too, all projections together."""
    count = max(1, round(fraction * len(table)))
    best = set(table["brute force"].nlargest(count).index)
    return {rule: len(best & set(table[rule].nlargest(count).index)) / count for rule in RULES}


def rule_costs(model, tokenizer, prompts, repeats=5):
    """Time of each rule as a ratio to a plain forward pass of the same batch, median over interleaved repeats."""
    batch = one_batch(model, tokenizer, prompts)

    def seconds(action):
        start = time.perf_counter()
        action()
        return time.perf_counter() - start

    def plain():
        with torch.inference_mode():
            model.get_decoder()(**batch, use_cache=False)

    costs = {}
    for rule in RULES:
        plain(), run_rule(model, batch, rule)
        costs[rule] = statistics.median(seconds(lambda: run_rule(model, batch, rule)) / seconds(plain) for _ in range(repeats))
    return costs


def corpus_counts(profile, shares, reference):
    """Neurons at or above ε for each corpus size, with ε set so that `share` of all neurons remain at `reference` prompts.

    Returns a data frame: one row per share, one column per corpus size.
    """
    rows = {}
    for share in shares:
        minimum = profile.prefix[reference]
        inside = select_fraction(minimum, share)
        epsilon = min(minimum[p][mask].min() for p, mask in inside.masks.items() if mask.any())
        rows[f"{share:.1%} (ε = {epsilon:.3g})"] = {
            size: sum(int((values >= epsilon).sum()) for values in prefix.values()) for size, prefix in profile.prefix.items()
        }
    return pd.DataFrame(rows).T
