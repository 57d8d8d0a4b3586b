"""Sentences that compare, and those that chapters 05 and 06 share."""

from safetyneuron.book.glue import glue_list, glue_rates, glue_text, pooled
from safetyneuron.book.tables import mean_accuracy, mean_rate, seconds
from safetyneuron.kept import defences

BENIGN = {"over_refusal": "over-refusal", "helpful": "the share of helpful answers"}
ALL_TASKS, ALL_ATTACKS = "all tasks", "the average over direct requests and attacks"


def above(first, second):
    """Whether the whole interval of `first` lies above that of `second`."""
    return first.interval[0] > second.interval[1]


def glue_defence(results, tasks, languages, attacks):
    """Glue what tuning did to harm, over-refusal and capability, for every model and set, against origin and random neurons.

    results: model to name to draws of `Column`. Capability is judged on all questions of all tasks together, attacks on average.
    """
    parts = []
    for model, found in results.items():
        rates = _summaries(found, tasks, languages, attacks)
        for name in (defences.CIRCUIT_BREAK, *defences.RANDOM):
            after, before = rates[name], rates[defences.ORIGIN]
            everywhere = [*languages, ALL_ATTACKS]
            phrases = [
                change_sentence(after, before, m, everywhere, label)
                for m, label in (("asr", "attack success"), ("coherent", "coherent compliance"))
            ]
            phrases += [
                change_sentence(after, before, m, languages, label) for m, label in BENIGN.items()
            ]
            phrases.append(change_sentence(after, before, "accuracy", [ALL_TASKS], "accuracy"))
            if name in defences.RANDOM:
                random = rates[defences.RANDOM[name]]
                phrases.append(
                    change_sentence(
                        after,
                        random,
                        "asr",
                        everywhere,
                        "against as many random neurons, attack success",
                        "is lower",
                        "is higher",
                        "does not differ",
                    )
                )
            parts.append(
                f"{model}, {name}: {'; '.join(phrases)}. Safer under direct requests by the keyword rule, without a measurable loss of capability: {_safer(after, before, languages)}."
            )
    glue_list("verdict_defence", parts)
    rates = _summaries(next(iter(results.values())), tasks, languages, attacks)
    for label, name in {
        "origin": defences.ORIGIN,
        "broken": defences.CIRCUIT_BREAK,
        "sn": defences.EQ3,
        "rsn": defences.SPECIFIC,
    }.items():
        direct = ", ".join(
            f"{language} {rates[name]['asr', language].percent}" for language in languages
        )
        glue_text(**{f"direct_{label}": direct})
        glue_rates(
            **{
                f"attacked_{label}": rates[name]["asr", ALL_ATTACKS],
                f"accuracy_{label}": rates[name]["accuracy", ALL_TASKS],
            }
        )


def glue_differences(results, tasks, languages, attacks):
    """Glue where Circ-Break and SN-Tune differ in what they cost: training, over-refusal, capability, robustness."""
    parts = []
    for model, found in results.items():
        rates = _summaries(found, tasks, languages, attacks)
        broken = rates[defences.CIRCUIT_BREAK]
        for name in defences.RANDOM:

            def compare(measure, names, label):
                return change_sentence(
                    broken,
                    rates[name],
                    measure,
                    names,
                    label,
                    "is lower",
                    "is higher",
                    "does not differ",
                )

            phrases = [compare(m, languages, label) for m, label in BENIGN.items()] + [
                compare("accuracy", [ALL_TASKS], "accuracy")
            ]
            phrases += [
                compare(m, [*languages, ALL_ATTACKS], label)
                for m, label in (("asr", "attack success"), ("coherent", "coherent compliance"))
            ]
            cost = [
                f"{seconds(found[column])} s for {found[column][0].parameters:,} parameters"
                for column in (defences.CIRCUIT_BREAK, name)
            ]
            parts.append(
                f"{model}: Circ-Break trains {cost[0]}, {name} {cost[1]}. Of Circ-Break, set against the latter, {'; '.join(phrases)}."
            )
    glue_list("verdict_differences", parts)


def _summaries(found, tasks, languages, attacks):
    """Mean rates of every column, and those of all tasks and of direct requests and all attacks together."""
    rates = {name: mean_rates(draws) for name, draws in found.items()}
    for name, draws in found.items():
        rates[name]["accuracy", ALL_TASKS] = mean_accuracy(draws, tasks)
        rates[name] |= {
            (m, ALL_ATTACKS): mean_rate(draws, m, (languages[0], *attacks))
            for m in ("asr", "coherent")
        }
    return rates


def _safer(after, before, languages):
    """Whether harm falls somewhere and rises nowhere while capability holds, and what is paid in refusals."""
    falls, rises = (
        [l for l in languages if above(high["asr", l], low["asr", l])]
        for high, low in ((before, after), (after, before))
    )
    if not falls or rises or above(before["accuracy", ALL_TASKS], after["accuracy", ALL_TASKS]):
        return "not seen"
    price = any(above(after["over_refusal", l], before["over_refusal", l]) for l in languages)
    return "seen, at the price of refusing harmless requests" if price else "seen"


def mean_rates(draws):
    """Every rate over the draws of a column."""
    return {key: pooled([draw.rates for draw in draws], key) for key in draws[0].rates}


def change_sentence(
    after, before, measure, names, label, falls="falls", rises="rises", same="does not change"
):
    """What one measure does, with the numbers of the languages or tasks in which the intervals do not overlap."""
    moved, texts = {falls: (before, after), rises: (after, before)}, []
    for verb, (high, low) in moved.items():
        where = [
            f"{n} ({before[measure, n].percent} → {after[measure, n].percent} %)"
            for n in names
            if above(high[measure, n], low[measure, n])
        ]
        texts += [f"{verb} in {', '.join(where)}"] if where else []
    return f"{label} {' and '.join(texts)}" if texts else f"{label} {same} measurably"
