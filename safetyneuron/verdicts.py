"""Sentences that say, from the numbers of a run, whether a claim of the paper is seen.

One rule throughout: a difference is seen when the 95 % intervals do not overlap, and a quantity is called unchanged
when they do. Overlap is a conservative test of a difference and a weak test of equality; the sentences say which.
"""

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
