"""Chapter 10: every detector on equal terms."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from safetyneuron.book.glue import glue_text, lines
from safetyneuron.book.labels import BROKEN
from safetyneuron.book.paper import OVERLAP_BELOW
from safetyneuron.detectors.detect import MATCHED, RANDOM
from safetyneuron.importance.selection import unit_scores
from safetyneuron.metrics.rates import Rate
from safetyneuron.neurons.architecture import ATTENTION

MEASURES = ("asr", "coherent", "over_refusal", "accuracy", "perplexity")


def rates(outcomes):
    """Rates of the outcomes, and perplexity as a number."""
    return {
        m: values[0] if m == "perplexity" else Rate(sum(values), len(values))
        for m, values in outcomes.items()
    }


def without_draws(found):
    """Outcomes of random detectors side by side: {(detector, other): list of outcomes}, the draw taken out of the name."""
    grouped = {}
    for (name, other), outcomes in found.items():
        grouped.setdefault((kind(name), other), []).append(outcomes)
    return grouped


def kind(name):
    """Name of a detector without the number of its draw."""
    return next((random for random in (MATCHED, RANDOM) if name.startswith(f"{random} ")), name)


def long_table(found):
    """Long table of mean rates: columns detector, budget (or intervention), measure, rate; perplexity is a mean number."""
    rows = []
    for (name, other), draws in without_draws(found).items():
        each = [rates(outcomes) for outcomes in draws]
        for m in MEASURES:
            values = [draw[m] for draw in each]
            rows.append(
                (name, other, m, float(np.mean(values)) if m == "perplexity" else Rate.mean(values))
            )
    return pd.DataFrame(rows, columns=["detector", "budget", "measure", "rate"])


def numbers(table):
    """`long_table` for a file: percent with both ends of its interval; perplexity as it is."""

    def plain(rate):
        return isinstance(rate, float)

    parts = [
        (r, "", "") if plain(r) else (100 * r.value, 100 * r.interval[0], 100 * r.interval[1])
        for r in table["rate"]
    ]
    return table.drop(columns="rate").assign(**dict(zip(("value", "low", "high"), zip(*parts))))


def trade_off(harm, kept):
    """Area under the front of harm against kept capability, 0 to 1: harm (…, points) at kept shares (…, points) of the whole model's accuracy.

    The front at c is the most harm done by any point that keeps at least c: a point counts as much as the capability that it keeps.
    """
    order = np.argsort(-kept, axis=-1)
    kept, harm = (
        np.take_along_axis(np.clip(kept, 0, 1), order, -1),
        np.take_along_axis(harm, order, -1),
    )
    front = np.maximum.accumulate(harm, axis=-1)
    widths = kept - np.concatenate([kept[..., 1:], np.zeros_like(kept[..., :1])], -1)
    return (front * widths).sum(-1)


def areas(whole, found, measure="coherent", draws=1000):
    """The trade-off of every detector over its budgets, with the 95 % interval of a bootstrap over prompts, questions and random draws.

    whole: outcomes of the model as it is; found: `matrix`.

    Returns
    -------
    pandas.DataFrame
        Index detector; columns area, low, high.
    """
    generator, rows = np.random.default_rng(0), {}
    grouped = {}
    for (name, budget), outcomes in found.items():
        grouped.setdefault(kind(name), {}).setdefault(name, []).append(outcomes)
    for name, by_draw in grouped.items():
        samples = np.stack(
            [_resampled(whole, points, measure, generator, draws) for points in by_draw.values()]
        )
        value = float(
            np.mean([_resampled(whole, points, measure, None, 1)[0] for points in by_draw.values()])
        )
        chosen = generator.integers(len(samples), size=(len(samples), draws))
        low, high = np.quantile(np.take_along_axis(samples, chosen, 0).mean(0), (0.025, 0.975))
        rows[name] = {"area": value, "low": float(low), "high": float(high)}
    return pd.DataFrame(rows).T.rename_axis("detector")


def _resampled(whole, points, measure, generator, draws):
    """Areas of one detector on resampled prompts and questions, the same for all its budgets: (draws,)."""
    outcomes = [whole, *points]
    harm, correct = (np.array([o[m] for o in outcomes], dtype=float) for m in (measure, "accuracy"))

    def pick(count):
        return (
            np.arange(count)[None]
            if generator is None
            else generator.integers(count, size=(draws, count))
        )

    def means(values):
        return values[:, pick(values.shape[1])].mean(-1).T  # (draws, points)

    harm, accuracy = means(harm), means(correct)
    return trade_off(harm, accuracy / np.maximum(accuracy[:, :1], 1e-9))


def agreement(detectors, budget):
    """Overlap of the sets (shared functional units over those of either) and rank correlation of the units' scores, for every two detectors."""
    names = [name for name in detectors if kind(name) == name]
    sets = {name: detectors[name].select(budget) for name in names}
    names = [name for name in names if sets[name] is not None]
    overlap = pd.DataFrame(
        {
            a: {
                b: len((sets[a] & sets[b]).units()) / len((sets[a] | sets[b]).units())
                for b in names
            }
            for a in names
        }
    )
    flat = {
        name: np.concatenate(
            [score.flatten().numpy() for score in unit_scores(detectors[name].scores).values()]
        )
        for name in names
    }
    return overlap, pd.DataFrame(flat).corr("spearman")  # equal scores share their rank


def claims(detectors, others, found, budget):
    """What each detector says of the paper's claims: seen, not seen or undecided by the 95 % interval, with the rate.

    Parameters
    ----------
    detectors, others : dict of str to Detector
        Of the main language, and of another; None where there is no other.
    found : dict
        `matrix`.
    budget : float
        At which places and overlaps are counted.

    Returns
    -------
    pandas.DataFrame
        One row per claim, one column per detector, text.
    """
    columns = {}
    for name in [n for n in detectors if kind(n) == n]:
        neurons, foreign = detectors[name].select(budget), others and others[name].select(budget)
        if neurons is None:
            continue
        small = [rates(o) for (n, b), o in found.items() if n == name and b < 0.01]
        columns[name] = {
            f"fewer than 1 % break refusal ({label})": _most(small, m)
            for m, label in (("asr", "keyword rule"), ("coherent", "well-formed answers"))
        }
        columns[name] |= {
            "most lie in attention (units)": _judged(
                Rate(len(neurons.only(ATTENTION).units()), len(neurons.units())), 0.5
            ),
            "most lie in attention (rows)": _judged(
                Rate(len(neurons.only(ATTENTION)), len(neurons)), 0.5
            ),
            "most lie in the first half of the layers": _judged(
                Rate(len(_in_first_half(neurons)), len(neurons.units())), 0.5
            ),
            f"two languages share less than {OVERLAP_BELOW} %": _shared(neurons, foreign),
        }
    return pd.DataFrame(columns).rename_axis("claim")


def _shared(neurons, foreign):
    if foreign is None:
        return "undecided\nno set in another language"
    shared = Rate(len((neurons & foreign).units()), len(neurons.units()))
    return _judged(shared, OVERLAP_BELOW / 100, below=True)


def _most(small, measure):
    if not small:
        return "undecided\nno budget below 1 %"
    best = max((result[measure] for result in small), key=lambda rate: rate.value)
    return _judged(best, BROKEN)


def _judged(rate, threshold, below=False):
    """The word that the interval allows, and the rate in percent."""
    low, high = rate.interval
    word = (
        "undecided"
        if low <= threshold <= high
        else "seen"
        if (high < threshold) == below
        else "not seen"
    )
    return f"{word}\n{rate.percent}"


def _in_first_half(neurons):
    """Functional units in the first half of the layers."""
    return neurons.within(1, len(neurons.masks["q"]) // 2).units()


def places(detectors, budget):
    """Per detector: its set's share in attention in functional units and in rows, share of its units in the first half of the layers, seconds and forward passes of detection."""
    rows = {}
    for name in [n for n in detectors if kind(n) == n]:
        neurons, d = detectors[name].select(budget), detectors[name]
        if neurons is not None:
            rows[name] = {
                "in attention (units)": neurons.share_in(ATTENTION, units=True),
                "in attention (rows)": neurons.share_in(ATTENTION),
                "in the first half": len(_in_first_half(neurons)) / len(neurons.units()),
                "seconds": d.seconds,
                "passes": d.passes,
            }
    return pd.DataFrame(rows).T


def detector_matrix(table, titles):
    """Rates in percent (perplexity as a number) by detector and budget, one panel per measure.

    table: `comparison.long_table`; titles: measure to title.
    """
    count = table["detector"].nunique()
    figure, panels = plt.subplots(
        1,
        len(titles),
        figsize=(2.6 * len(titles) + 1.5, 0.32 * count + 1.2),
        sharey=True,
        squeeze=False,
    )
    for axes, (measure, title) in zip(panels[0], titles.items()):
        rows = table[table["measure"] == measure]
        values = rows.assign(
            value=[rate if measure == "perplexity" else 100 * rate.value for rate in rows["rate"]]
        )
        wide = values.pivot(index="detector", columns="budget", values="value").reindex(
            table["detector"].unique()
        )
        form, limits = (".2f", {}) if measure == "perplexity" else (".0f", {"vmin": 0, "vmax": 100})
        sns.heatmap(
            wide.rename(columns=lambda share: f"{100 * share:g}"),
            annot=True,
            fmt=form,
            cmap="viridis",
            cbar=False,
            annot_kws={"size": 7},
            ax=axes,
            **limits,
        )
        axes.set(title=title, xlabel="% of the units", ylabel="")
        axes.grid(False)  # it would show where a cell is empty
        axes.title.set_fontsize(10)
        axes.tick_params(labelsize=8)
    figure.tight_layout()
    return panels[0, 0]


def agreement_heatmaps(overlap, correlation):
    """Overlap of the sets (percent) and rank correlation of the scores, detectors against detectors."""
    size = 0.42 * len(overlap) + 2.5
    figure, panels = plt.subplots(1, 2, figsize=(1.75 * size, size), sharey=True)
    for axes, values, form, title, limits in (
        (panels[0], 100 * overlap, ".0f", "shared units (%)", (0, 100)),
        (panels[1], correlation.round(1) + 0.0, ".1f", "rank correlation", (-1, 1)),
    ):
        sns.heatmap(
            values,
            annot=True,
            fmt=form,
            cmap="viridis",
            cbar=False,
            square=True,
            vmin=limits[0],
            vmax=limits[1],
            annot_kws={"size": 7},
            ax=axes,
        )
        axes.set_title(title, fontsize=10)
        axes.tick_params(labelsize=8)
    figure.tight_layout()
    return panels[0]


def areas_table(areas, places):
    """The trade-off of every detector beside where its neurons lie and what it costs. areas, places: `comparison.areas` and `comparison.places`."""
    text = areas.apply(
        lambda row: f"{row['area']:.2f} [{row['low']:.2f}, {row['high']:.2f}]", axis=1
    ).to_frame("trade-off")
    formats = {
        "in attention (units)": "{:.0%}",
        "in attention (rows)": "{:.0%}",
        "in the first half": "{:.0%}",
        "seconds": "{:.1f}",
        "passes": "{:.1f}",
    }
    shown = pd.DataFrame(
        {column: places[column].map(form.format) for column, form in formats.items()}
    )
    joined = text.join(shown.rename(columns={"passes": "forward passes"})).fillna("–")
    return joined.loc[areas["area"].sort_values(ascending=False, kind="stable").index]


def interventions_table(table, titles):
    """Rates of every detector and intervention: one row per detector, one column per intervention and measure. table: `comparison.long_table`."""
    kept = table[table["measure"].isin(titles)]
    cells = kept.assign(text=kept["rate"].map(lines), measure=kept["measure"].map(titles))
    wide = cells.pivot(index="detector", columns=["budget", "measure"], values="text").reindex(
        table["detector"].unique()
    )
    columns = [
        (intervention, title)
        for intervention in table["budget"].unique()
        for title in titles.values()
    ]
    return wide[columns].fillna("–").rename_axis(columns=[None, None])


def glue_comparison(areas, judged):
    """Glue for which detectors each claim is seen, and the trade-offs of Eq 3, of the best and of random neurons. areas, judged: of `comparison`."""
    names = ("break", "coherent", "attention", "attention_rows", "layers", "languages")
    for name, (_, row) in zip(names, judged.iterrows(), strict=True):
        seen = [
            detector
            for detector, text in row.items()
            if text.startswith("seen") and not detector.startswith("random")
        ]
        glue_text(
            **{
                f"seen_{name}": f"{len(seen)} of {sum(not d.startswith('random') for d in row.index)} rules"
                + (f" ({', '.join(seen)})" if 0 < len(seen) <= 3 else "")
            }
        )

    def text(row):
        return f"{row['area']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"

    best = areas["area"].idxmax()
    glue_text(
        area_eq3=text(areas.loc["exact, Eq 3"]),
        area_best=text(areas.loc[best]),
        best_detector=best,
        area_random=text(areas.loc["random"]),
    )
