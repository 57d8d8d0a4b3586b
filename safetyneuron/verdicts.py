"""Sentences that say, from the numbers of a run, whether a claim of the paper is seen.

One rule throughout: a difference is seen when the 95 % intervals do not overlap, and a quantity is called unchanged
when they do. Overlap is a conservative test of a difference and a weak test of equality; the sentences say which.
"""

from safetyneuron import mechanism, reported
from safetyneuron.book import EQ3, ORIGIN, RANDOM, SPECIFIC, glue_rates, glue_text, pooled


def above(first, second):
    """Whether the whole interval of `first` lies above that of `second`."""
    return first.interval[0] > second.interval[1]


def harm_sentence(results, harmful_set):
    """Does deactivation break refusal more than matched random neurons do, and coherently?"""
    parts = []
    for condition in (EQ3, SPECIFIC):
        asr, coherent = (above(pooled(results[condition], (m, harmful_set)), pooled(results[RANDOM[condition]], (m, harmful_set))) for m in ("asr", "coherent"))
        finding = "attack success rises above the random control"
        if asr and coherent:
            finding += ", and so does coherent compliance: the claim is seen"
        elif asr:
            finding += ", but coherent compliance does not: refusals give way to broken answers, so the claim is seen by the keyword rule only"
        else:
            finding = "attack success does not rise above the random control: the claim is not seen"
        parts.append(f"{condition.removeprefix('Deact-SN: ')}: {finding}.")
    return " ".join(parts)


def capability_sentence(results, tasks):
    """Does capability stay as it was?"""
    parts = []
    for condition in (EQ3, SPECIFIC):
        before, after = ({t: pooled(results[c], ("accuracy", t)) for t in tasks} for c in (ORIGIN, condition))
        lost = [t for t in tasks if above(before[t], after[t])]
        finding = f"accuracy falls measurably on {', '.join(lost)}" if lost else "no fall in accuracy can be told from sampling noise"
        parts.append(f"{condition.removeprefix('Deact-SN: ')}: {finding}.")
    return " ".join(parts)


def glue_verification(results, model, fraction, harmful_set, tasks):
    """Glue every value of the closing paragraph of the verification chapter."""
    keys = {"origin": ORIGIN, "eq3": EQ3, "specific": SPECIFIC, "random": RANDOM[EQ3], "random_specific": RANDOM[SPECIFIC]}
    for name, condition in keys.items():
        draws = results[condition]
        mean = sum(pooled(draws, ("accuracy", t)).value for t in tasks) / len(tasks)
        glue_rates(**{f"asr_{name}": pooled(draws, ("asr", harmful_set)), f"coherent_{name}": pooled(draws, ("coherent", harmful_set))})
        glue_text(**{f"capability_{name}": f"{100 * mean:.1f}"})
    glue_text(model=model, share=f"{fraction:.1%}")
    glue_text(verdict_harm=harm_sentence(results, harmful_set), verdict_capability=capability_sentence(results, tasks))


def glue_resilience(tables, name):
    """Glue what Figure 2 shows: onset, collapse and the highest attack success of both ways of choosing, for every model."""
    parts = [f"{m}, {c}: {_resilience(t[t['set'] == name], c)}" for m, t in tables.items() for c in (mechanism.EQ3, mechanism.SPECIFIC)]
    glue_text(verdict_resilience=". ".join(parts) + ".")


def _resilience(table, condition):
    onset, collapse = mechanism.onset_and_collapse(table, condition, "asr")
    rates = table[(table["condition"] == condition) & (table["measure"] == "asr")]
    peak = rates.loc[rates["rate"].map(lambda rate: rate.value).idxmax()]
    coherent = table[(table["condition"] == condition) & (table["measure"] == "coherent") & (table["fraction"] == peak["fraction"])]["rate"].iloc[0]
    seen = "seen" if collapse < 0.01 else "not seen"
    return (
        f"harm sets in {_share(onset)} and safety collapses {_share(collapse)}, so that fewer than one percent suffice is {seen}; attack success"
        f" is highest at {peak['fraction']:.2%}, {peak['rate'].percent} %, of which {coherent.percent} % of the requests get a well-formed answer"
    )


def _share(fraction):
    return "at no share tried" if fraction != fraction else f"at {fraction:.2%} of the neurons"


def glue_places(by_structure, by_layer):
    """Glue where the neurons lie: results of `mechanism.places` by `structures` and by `layers`."""
    parts = []
    for (model, name), counts in by_layer["neurons"].groupby(level=["model", "condition"], sort=False):
        attention = by_structure.loc[model, name, "attention"]
        half = counts.iloc[: len(counts) // 2].sum() / counts.sum()
        seen = "seen" if attention["share of the set"] > 0.5 else "not seen"
        parts.append(
            f"{model}, {name}: attention holds {attention['share of the set']:.0%} of the set, {attention['enrichment']:.1f} times what chance gives, so a"
            f" majority in attention is {seen}; the first half of the layers holds {half:.0%}"
        )
    glue_text(verdict_places=". ".join(parts) + ".")


def glue_depth(tables):
    """Glue the layers at which safety breaks, for every model."""
    parts = []
    for model, table in tables.items():
        forward, backward = (mechanism.broken_at(table, direction) for direction in ("layers 1 to L", "layers L to the last"))
        count = table["layer"].max()
        from_front = "not at all" if forward != forward else f"with the first {forward:.0f} of {count} layers"
        from_back = "not at all" if backward != backward else f"with layers {backward:.0f} to {count}"
        parts.append(f"{model}: safety collapses {from_front} when layers are taken from the front, and {from_back} from the back")
    glue_text(verdict_depth=". ".join(parts) + ".")


def glue_languages(matrices, random, rates):
    """Glue overlap of languages, its references, and whether a language's neurons hit their own language most.

    matrices: name to overlap matrix; random: expected overlap of random sets; rates: `mechanism.across_languages`.
    """
    means = {name: mechanism.off_diagonal(matrix) for name, matrix in matrices.items()}
    texts = [f"{name}: {100 * mean:.0f} %" for name, mean in means.items()]
    seen = [f"{'seen' if 100 * means[n] < reported.OVERLAP_BELOW else 'not seen'} for {n}" for n in (mechanism.EQ3, mechanism.SPECIFIC)]
    glue_text(verdict_overlap=f"Mean overlap of two languages is {', '.join(texts)}; random sets of that size share {100 * random:.1f} %. "
              f"An overlap below {reported.OVERLAP_BELOW} % is {' and '.join(seen)}.")  # fmt: skip
    rise = {on: {off: rates.loc[off, on].value - rates.loc["none", on].value for off in rates.index[1:]} for on in rates.columns}
    own = [on for on in rates.columns if above(rates.loc[on, on], rates.loc["none", on])]
    most = [on for on in own if max(rise[on], key=rise[on].get) == on]
    others = [f"{off} on {on}" for on in rates.columns for off in rates.index[1:] if off != on and above(rates.loc[off, on], rates.loc["none", on])]
    glue_text(verdict_causal=f"A language's own neurons raise its attack success measurably in {len(own)} of {len(rates.columns)} languages"
              f" and more than any other language's in {len(most)}; another language's neurons do in {len(others)} of {len(rates.columns) * (len(rates.columns) - 1)} pairs.")  # fmt: skip
