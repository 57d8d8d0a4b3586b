"""Tables 2, 3 and 4 of the paper beside our own measurement."""

import pandas as pd

from safetyneuron.book import MEASURES, cell, lines, printed_cells, with_cells
from safetyneuron.metrics.rates import Rate

PAPER_TASKS = ("MMLU", "ARC-c", "GSM8K")
PAPER_COLUMNS = {2: ("Origin.", "Circ-Break", "SN-Tune"), 3: ("Origin.", "Circ-Break", "SN-Tune"), 4: ("Before", "Origin.", "SN-Tune", "RSN-Tune")}


def defence_table(number, results, paper_model, tasks, languages, attacks):
    """Paper's Table 2 or 3 beside the measurement: cost, capability, direct requests in several languages, attacks in the first one.

    results: model name to `defences.columns`; tasks stand for MMLU, ARC-challenge and GSM8K, in this order.
    """
    rows = [("Cost", "training, s (paper: min)", "Training Cost (min.)", seconds)]
    rows += [("Cost", "parameters (paper: million)", "# Parameters (M)", lambda draws: f"{draws[0].parameters:,}" if draws[0].parameters else "–")]
    rows += [("Accuracy", f"{task} (paper: {paper})", paper, rate("accuracy", task)) for task, paper in zip(tasks, PAPER_TASKS)]
    rows += [("Accuracy", "average", "Avg. Capability", lambda draws: lines(mean_accuracy(draws, tasks)))]
    direct = _language_rows(languages, "Direct")
    for measure in ("asr", "coherent"):
        paper = lambda row: row if measure == "asr" else None
        rows += [row for row in direct if row[0] == MEASURES[measure]]
        rows += [(MEASURES[measure], f"{name}, {languages[0]}", paper(name), rate(measure, name)) for name in attacks]
        rows += [(MEASURES[measure], f"average with direct, {languages[0]}", paper("Avg. Harmful"), _average(measure, (languages[0], *attacks)))]
    rows += [row for row in direct if row[0] in (MEASURES["over_refusal"], MEASURES["helpful"])]
    return _side_by_side(number, results, paper_model, rows)


def _average(measure, names):
    """The function that writes the mean of direct requests and attacks, which share their requests."""
    return lambda draws: lines(mean_rate(draws, measure, names))


def costs_of_attacks(results, attacks):
    """What the attacks spent on each column: queries and tokens per request. results: column name to draws of `Column`."""
    spent = lambda draws, name, part: sum(sum(getattr(draw.attacks[name], part)) / len(draw.attacks[name].queries) for draw in draws) / len(draws)
    text = lambda draws, name: f"{spent(draws, name, 'queries'):,.0f}\n{spent(draws, name, 'tokens'):,.0f} tokens"
    cells = {_heading(column): [text(draws, name) for name in attacks] for column, draws in results.items()}
    return pd.DataFrame(cells, index=pd.Index(attacks, name="queries per request"))


def downstream_table(results, paper_model, task, languages):
    """Paper's Table 4 beside the measurement. results: name of the run to `defences.downstream`."""
    rows = [("Accuracy", f"{task} (paper: GSM8K)", "GSM8K", rate("accuracy", task))]
    rows += [("Attack success before fine-tuning", l, None, rate("asr before", l)) for l in languages]
    return _side_by_side(4, results, paper_model, rows + _language_rows(languages, "Harmful"))


def _language_rows(languages, paper_row):
    """Attack success, coherent compliance, over-refusal and helpful answers per language; the paper has the first one in English."""
    paper = lambda measure, language: paper_row if (measure, language) == ("asr", "en") else None
    name = lambda measure, language: f"direct, {language}" if measure in ("asr", "coherent") else language
    return [(MEASURES[m], name(m, l), paper(m, l), rate(m, l)) for m in ("asr", "coherent", "over_refusal", "helpful") for l in languages]


def _side_by_side(number, results, paper_model, rows):
    """rows: (group, name, row of the paper or None, function from the draws of a column to text)."""
    printed, table = printed_cells(number, paper_model), []
    for _, _, paper_row, text in rows:
        line = {("Paper", paper_model, column): printed.get((paper_row, column), "–") for column in PAPER_COLUMNS[number]}
        for name, columns in results.items():
            line |= {(f"Here: {name}", *_heading(column)): text(draws) for column, draws in columns.items()}
        table.append(line)
    index = pd.MultiIndex.from_tuples([row[:2] for row in rows], names=[None, None])
    frame = pd.DataFrame([list(line.values()) for line in table], index=index, columns=pd.MultiIndex.from_tuples(table[0]))
    return with_cells(number, frame, [row[2] for row in rows])


def _heading(column):
    """Two lines: which neurons, and which way of tuning."""
    way, _, which = column.partition(": ")
    return which, way


def rate(measure, name):
    """The function that writes this rate: percent with interval, and the range over seeds where there are several."""

    return lambda draws: cell([draw.rates for draw in draws], (measure, name))


def mean_accuracy(draws, tasks):
    """Accuracy over all questions of all tasks, which are equally many, and over seeds."""
    totals = []
    for draw in draws:
        rates = [draw.rates["accuracy", task] for task in tasks]
        totals.append(sum(rates[1:], start=rates[0]))
    return Rate.mean(totals)


def mean_rate(draws, measure, names):
    """Mean over attacks and over seeds; all share the requests of the one that is asked fewest."""
    return Rate.mean([draw.rates[measure, name] for draw in draws for name in names])


def seconds(draws):
    """Mean training time."""
    mean = sum(draw.seconds for draw in draws) / len(draws)
    return f"{mean:.1f}" if mean else "–"


def cases_table(cases):
    """Rates of several cases: one row per case, one column per measure and set. cases: name to `evaluate`'s result."""
    keys = list(next(iter(cases.values())))
    rows = {name: [rates[key].percent for key in keys] for name, rates in cases.items()}
    return pd.DataFrame.from_dict(rows, orient="index", columns=pd.MultiIndex.from_tuples([(MEASURES[m], s) for m, s in keys]))


def interval_table(results):
    """Numbers with intervals: one row per model, one column per measure. results: measure to name to (value, low, high)."""
    text = lambda numbers: "{:.3f} [{:.3f}, {:.3f}]".format(*numbers)
    return pd.DataFrame({measure: {name: text(numbers) for name, numbers in found.items()} for measure, found in results.items()})


def transfer_table(table):
    """`patching.transfer` as text: rates, and the share of safety restored where there is a gap to close."""
    share = lambda row: "no gap" if row["restored"] != row["restored"] else f"{100 * row['restored']:.0f} [{100 * row['low']:.0f}, {100 * row['high']:.0f}]"
    text = table[["recipient", "donor", "patched", "random"]].map(lambda rate: rate.percent)
    return text.assign(**{"safety restored (%)": [share(row) for _, row in table.iterrows()]})


def alone_table(single):
    """Rows of `patching.alone` as text."""
    rows = [{"neuron": f"layer {row.layer}, channel {row.channel}", "attack success": row.rate.percent} for row in single.itertuples()]
    return pd.DataFrame(rows).set_index("neuron").rename_axis(None)


def areas_table(areas, places):
    """The trade-off of every detector beside where its neurons lie and what it costs. areas, places: `comparison.areas` and `comparison.places`."""
    text = areas.apply(lambda row: f"{row['area']:.2f} [{row['low']:.2f}, {row['high']:.2f}]", axis=1).to_frame("trade-off")
    formats = {"in attention": "{:.0%}", "in the first half": "{:.0%}", "seconds": "{:.1f}", "passes": "{:.1f}"}
    shown = pd.DataFrame({column: places[column].map(form.format) for column, form in formats.items()})
    joined = text.join(shown.rename(columns={"passes": "forward passes"})).fillna("–")
    return joined.loc[areas["area"].sort_values(ascending=False, kind="stable").index]


def interventions_table(table, titles):
    """Rates of every detector and intervention: one row per detector, one column per intervention and measure. table: `comparison.long_table`."""
    kept = table[table["measure"].isin(titles)]
    cells = kept.assign(text=kept["rate"].map(lines), measure=kept["measure"].map(titles))
    wide = cells.pivot(index="detector", columns=["budget", "measure"], values="text").reindex(table["detector"].unique())
    columns = [(intervention, title) for intervention in table["budget"].unique() for title in titles.values()]
    return wide[columns].fillna("–").rename_axis(columns=[None, None])
