"""What the notebooks hand to the pages: tables of paper and measurement, and values glued into the text."""

import base64
import json

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import HTML, Markdown
from myst_nb import glue

from safetyneuron import mechanism, reported
from safetyneuron.neurons.architecture import ATTENTION
from safetyneuron.cache import digest
from safetyneuron.importance.selection import select_without_foundation
from safetyneuron.errors import SafetyNeuronError
from safetyneuron.figures import CLASS_NAMES
from safetyneuron.metrics.rates import Rate
from safetyneuron.metrics.suite import evaluate
from safetyneuron.neurons.sets import NeuronSet
from safetyneuron.organism import behaviour
from safetyneuron.organism.answer_class import examples_of

ORIGIN, EQ3, SPECIFIC = "Origin.", "Deact-SN: Eq 3", "Deact-SN: Eq 3 without foundation"
RANDOM = {EQ3: "Deact-R: like Eq 3", SPECIFIC: "Deact-R: like without foundation"}
MEASURES = {"asr": "Attack success", "coherent": "Coherent compliance", "over_refusal": "Over-refusal", "helpful": "Helpful answers", "accuracy": "Accuracy"}
TABLE_1_ROWS = {"harmful": ["Harm Behavior", "Adv Behavior", "MultiJail-En"], "capability": ["MMLU", "GSM8K"]}


def glue_text(**values):
    """Glue values for `{glue:text}` roles in the prose."""
    for name, value in values.items():
        glue(name, str(value), display=False)


def glue_rates(**rates):
    """Glue rates as percent with their interval."""
    glue_text(**{name: rate.percent for name, rate in rates.items()})


def glue_list(name, items):
    """Glue a list for a `{glue:md}` directive."""
    glue(name, Markdown("\n".join(f"- {item}" for item in items)), display=False)


def glue_figure(name, axes):
    """Glue a figure under `name` and close it, so that it appears once, with its caption."""
    glue(name, axes.figure, display=False)
    plt.close(axes.figure)


def glue_table(name, table):
    """Glue a data frame under `name`; cells may hold several lines. Cells that stand beside the paper's go along, for the page of all."""
    glue(name, table.style.set_uuid(name).set_table_attributes('class="dataframe"'), display=False)
    glue_text(**{f"csv-{name}": table.to_csv()})
    if "cells" in table.attrs:
        glue_text(**{f"cells-{name}": json.dumps(table.attrs["cells"])})


def glue_data(name, table):
    """Glue a link that downloads the numbers behind a figure as CSV; rates become value, low, high and trials."""
    flat = table.reset_index(drop=isinstance(table.index, pd.RangeIndex))
    for column in [c for c in flat if isinstance(flat[c].iloc[0], Rate)]:
        rates = flat.pop(column)
        parts = {"": "value", " low": ("interval", 0), " high": ("interval", 1), " trials": "trials"}
        for suffix, part in parts.items():
            flat[f"{column}{suffix}"] = [getattr(r, part) if isinstance(part, str) else getattr(r, part[0])[part[1]] for r in rates]
    glue_text(**{f"csv-{name}": flat.to_csv(index=False)})
    content = base64.b64encode(flat.to_csv(index=False).encode()).decode()
    link = f'<a download="{name}.csv" href="data:text/csv;base64,{content}">Download the data of this figure ({name}.csv)</a>'
    glue(f"data-{name}", HTML(link), display=False)


def by_model(tables):
    """Tables of several models as one. tables: model to data frame."""
    return pd.concat(tables, names=["model", "row"]).droplevel("row")


def by_model_rows(tables):
    """Tables of several models below each other, the model in front; of one model as it is."""
    return next(iter(tables.values())) if len(tables) == 1 else pd.concat(tables, names=["model"])


def percent_table(table):
    """A data frame of `Rate` cells as text."""
    return table.map(lambda rate: rate.percent)


def answers_table(requests, answers):
    """Requests beside answers. For the organism, whose answers carry nothing usable."""
    table = pd.DataFrame({"request": requests, "answer": answers}).style.hide(axis="index")
    table.set_uuid(digest(list(requests), list(answers))[:8])  # not drawn at random: equal runs are equal pages
    return table.set_table_attributes('class="dataframe texts"')


def glue_examples(name, model_name, prompts, texts):
    """Glue three answers of each class of an organism; what another model answers to harmful requests is not shown."""
    if not model_name.startswith("organism/"):
        return glue_text(**{name: "Answers of this model are scored and dropped."})
    rows = [(CLASS_NAMES.get(kind, kind), *pair) for kind, pairs in examples_of(prompts, texts).items() for pair in pairs]
    table = pd.DataFrame(rows, columns=["class", "request", "answer"]).style.hide(axis="index").set_uuid(name)
    glue(name, table.set_table_attributes('class="dataframe texts"'), display=False)


def behaviour_table(models):
    """The bars of behaviour and the value of any model and language that comes nearest to each. models: as from `organism.manifest`."""
    text = lambda bar, kind: f"{'≥' if bar.is_floor else '≤'} {getattr(bar, kind)}: {behaviour.worst(models, bar, kind):.1f}"
    kinds = [kind for kind in ("base", "chat", "planted") if any(behaviour.kind_of(name) == kind for name in models)]
    rows = {(bar.measure, bar.set): {k: "–" if getattr(bar, k) is None else text(bar, k) for k in kinds} for bar in behaviour.BARS}
    return pd.DataFrame(rows).T.rename_axis(["%", "set"])


def scores_table(scores):
    """Rates in percent: one row per measure and set, one column per model. scores: name to `evaluate`'s result."""
    columns = {name: {(MEASURES[m], s): rate.percent for (m, s), rate in rates.items()} for name, rates in scores.items()}
    return pd.DataFrame(columns).rename_axis(["%", "set"])


def sizes_table(sets, model):
    """Size of neuron sets: neurons, share of neurons, share of parameters. sets: name to `NeuronSet`."""
    rows = {
        name: {"neurons": len(s), "share of neurons": f"{s.share:.2%}", "share of parameters": f"{s.parameter_share(model):.2%}"}
        for name, s in sets.items()
    }
    return pd.DataFrame(rows).T.rename_axis("set")


def attention_share(neurons):
    """Share of the set that lies in attention, as text."""
    counts = neurons.counts()
    return f"{sum(counts[p] for p in ATTENTION) / len(neurons):.0%}"


def attention_share_of_rows(neurons):
    """Share of all the model's neurons that lie in attention, as text."""
    return f"{sum(neurons.masks[p].numel() for p in ATTENTION) / neurons.total:.0%}"


def verification_sets(harmful, general, fraction):
    """The two readings of N_safe that Table 1 deactivates, from profiles on harmful and on general prompts."""
    return {EQ3: harmful.select(fraction=fraction), SPECIFIC: select_without_foundation(harmful, general, fraction)}


def verify(model, tokenizer, suite, sets, draws):
    """Evaluate a model whole, without each set, and without matched random sets.

    Returns
    -------
    dict of str to list of dict
        Condition to one result of `evaluate` per draw (one for the conditions that are not random).
    """
    if draws < 1:
        raise SafetyNeuronError(f"draws is {draws}: it must be at least 1")
    results = {ORIGIN: [evaluate(model, tokenizer, suite)]}
    for name, neurons in sets.items():
        random = [NeuronSet.random_like(neurons, seed) for seed in range(draws)]
        results[RANDOM[name]] = [evaluate(model, tokenizer, suite, without=drawn) for drawn in random]
        results[name] = [evaluate(model, tokenizer, suite, without=neurons)]
    return results


def pooled(draws, key):
    """`Rate.mean` of one measure over several results of `evaluate`."""
    return Rate.mean([draw[key] for draw in draws])


def lines(rate):
    """A rate as text, its interval on a line of its own."""
    return rate.percent.replace(" [", "\n[")


def cell(draws, key):
    """A table cell: percent, interval, and the range over draws where there are several, on lines of their own."""
    text = lines(pooled(draws, key))
    values = [100 * draw[key].value for draw in draws]
    return text if len(draws) == 1 else f"{text}\n{min(values):.1f} to {max(values):.1f}"


def printed_cells(number, paper_model):
    """Cells of one model in a table of the paper, (row, column) to text; an asterisk where its own rows give another value."""
    cells = reported.table(number).query("model == @paper_model")
    if cells.empty:
        raise SafetyNeuronError(f"Table {number} has no model {paper_model!r}: use one of {', '.join(reported.table(number)['model'].unique())}")
    slips = {(row, column): slip for (table, row, model, column), slip in reported.SLIPS.items() if (table, model) == (number, paper_model)}
    texts = {}
    for row, column, value in cells[["row", "column", "value"]].itertuples(index=False):
        slip = f"*\n(its rows: {slips[row, column]})" if (row, column) in slips else ""
        texts[row, column] = "–" if value != value else f"{value:.1f}{slip}"
    return texts


def table_1(results, paper_model, harmful_sets, tasks):
    """Paper's Table 1 beside the measurement: rows are sets and tasks, columns are conditions.

    results: model name to `verify`'s result.
    """
    printed = printed_cells(1, paper_model)
    papers = dict(zip(harmful_sets, TABLE_1_ROWS["harmful"])) | dict(zip(tasks, TABLE_1_ROWS["capability"]))
    rows, heads, paper_rows = [], [], []
    averages = {"asr": ("Avg. Harmful", harmful_sets), "accuracy": ("Avg. Capability", tasks)}
    wanted = [(measure, papers.get(name) if measure in averages else None, [name]) for measure, name in _keys(results)]
    wanted += [(measure, paper_row, names) for measure, (paper_row, names) in averages.items()]
    for measure, paper_row, names in sorted(wanted, key=lambda row: list(MEASURES).index(row[0])):
        paper_rows.append(paper_row)
        name = names[0] if len(names) == 1 else "average"
        heads.append((MEASURES[measure], name if paper_row is None else f"{name}\n(paper: {paper_row})"))
        row = {("Paper", paper_model, c): printed.get((paper_row, c), "–") for c in ("Origin.", "Deact-R", "Deact-SN")}
        for model, conditions in results.items():
            row |= {(f"Here: {model}", *_heading(c)): cell(_over_sets(draws, measure, names), "mean") for c, draws in conditions.items()}
        rows.append(row)
    columns = pd.MultiIndex.from_tuples(rows[0])
    index = pd.MultiIndex.from_tuples(heads, names=["%", "set"])
    return with_cells(1, pd.DataFrame([list(row.values()) for row in rows], index=index, columns=columns), paper_rows)


def with_cells(number, table, paper_rows):
    """The table, with its cells that stand beside the paper's in `attrs`: a list of {table, row, column, model, way, text}.

    paper_rows: the paper's row of every row, or None. Columns are (here or paper, way, the paper's column).
    """
    here = [(i, *column) for i, column in enumerate(table.columns) if column[0].startswith("Here: ")]
    table.attrs["cells"] = [
        {"table": number, "row": row, "column": column, "model": model.removeprefix("Here: "), "way": way, "text": table.iloc[r, i]}
        for r, row in enumerate(paper_rows) if row for i, model, way, column in here
    ]  # fmt: skip
    return table


def _over_sets(draws, measure, names):
    """Every draw's mean rate over sets or tasks, under the key `mean`."""
    return [{"mean": Rate.mean([draw[measure, name] for name in names])} for draw in draws]


def _keys(results):
    """Keys of a result in the order of `MEASURES`."""
    keys = next(iter(next(iter(results.values())).values()))[0]
    return sorted(keys, key=lambda key: list(MEASURES).index(key[0]))


def _heading(condition):
    """Two lines of a column heading: which set, and which of the paper's conditions."""
    if condition == ORIGIN:
        return "", ORIGIN
    reading = EQ3 if condition in (EQ3, RANDOM[EQ3]) else SPECIFIC
    return reading.removeprefix("Deact-SN: "), condition.split(":")[0]


def bars_table(results, harmful_set, benign_set, tasks):
    """Long table for `figures.condition_bars`: measure, condition, rate."""
    keys = {"attack\nsuccess": ("asr", harmful_set), "coherent\ncompliance": ("coherent", harmful_set), "over-\nrefusal": ("over_refusal", benign_set)}
    keys |= {task.removeprefix("organism_"): ("accuracy", task) for task in tasks}
    rows = [(m, c, pooled(draws, key)) for m, key in keys.items() for c, draws in results.items()]
    return pd.DataFrame(rows, columns=["measure", "condition", "rate"])


def costs_table(costs):
    """Cost of each rule in plain forward passes. costs: rule to ratio."""
    return pd.DataFrame({"forward passes": {rule: f"{ratio:.1f}" for rule, ratio in costs.items()}}).rename_axis("rule")


def glue_effects(effects):
    """Glue what each difference does, as `effect_PROJECTION_NAME`. effects: `differences.effects`."""
    for (projection, name), row in effects.iterrows():
        text = f"{projection}: ρ {row['printed']:.2f} → {row['changed']:.2f}, {row['kept']:.0%} of the highest tenth stay"
        glue_text(**{f"effect_{projection}_{name}": text})


def table_5(counts, model):
    """Paper's Table 5 above the counts of `appendix.corpus_counts` of a model."""
    printed = reported.table(5).set_index("column")["value"]
    paper = pd.DataFrame([{size: f"{printed.get(str(size), float('nan')):.0f}" for size in counts.columns}], index=["paper: Llama3-8B-Instruct"])
    here = counts.map("{:.0f}".format).rename(index="here: {}".format)
    table = pd.concat([paper, here]).rename_axis("corpus size")
    cells = [(size, way, here.loc[f"here: {way}", size]) for way in counts.index for size in counts.columns]
    table.attrs["cells"] = [
        {"table": 5, "row": "Number of Safety Neurons", "column": str(size), "model": model, "way": way, "text": text} for size, way, text in cells
    ]
    return table


def onsets_table(tables, name):
    """Shares (%) at the onset of harm and at collapse: the paper's words, then every model and condition here."""
    text = lambda share: "–" if share != share else f"{share:g}"
    rows = {("paper", model): {"onset": text(r["onset"]), "collapse": text(r["collapse"])} for model, r in reported.MECHANISM.items()}
    for model, table in tables.items():
        for condition in (mechanism.EQ3, mechanism.SPECIFIC, mechanism.RANDOM):
            onset, collapse = mechanism.onset_and_collapse(table[table["set"] == name], condition, "asr")
            _, coherent = mechanism.onset_and_collapse(table[table["set"] == name], condition, "coherent")
            row = {"onset": onset, "collapse": collapse, "collapse, well-formed answers": coherent}
            rows[f"here: {model}", condition] = {column: text(round(100 * share, 2)) for column, share in row.items()}
    return pd.DataFrame(rows).T.fillna("–").rename_axis(["share of neurons (%)", ""])


def places_table(places):
    """Counts, shares and enrichment by structure: one block of rows per model, of columns per way of choosing.

    places: `mechanism.places` by `structures`.
    """
    formats = {"neurons": "{:d}", "share of the set": "{:.0%}", "share of its rows": "{:.1%}", "enrichment": "{:.1f}"}
    text = pd.DataFrame({column: places[column].map(form.format) for column, form in formats.items()})
    table = text.unstack("condition", sort=False).swaplevel(axis=1)
    return table[[(condition, column) for condition in table.columns.unique(0) for column in formats]]
