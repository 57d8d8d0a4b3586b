"""Tables that several chapters show: paper and measurement side by side."""

import pandas as pd
import torch

from safetyneuron.book.glue import MEASURES, cell, lines, pooled, printed_cells, with_cells
from safetyneuron.neurons.architecture import ATTENTION
from safetyneuron.neurons.sets import NeuronSet


def sizes_table(sets, model):
    """Size of neuron sets: neurons, share of neurons, share of parameters. sets: name to `NeuronSet`."""
    rows = {
        name: {
            "neurons": len(s),
            "share of neurons": f"{s.share:.2%}",
            "share of parameters": f"{s.parameter_share(model):.2%}",
        }
        for name, s in sets.items()
    }
    return pd.DataFrame(rows).T.rename_axis("set")


def attention_share(neurons):
    """Share of a set that lies in attention, of its neurons and of its functional units, as text."""
    rows, units = (neurons.share_in(ATTENTION, units=each) for each in (False, True))
    return f"{rows:.0%} of the neurons ({units:.0%} of the functional units)"


def attention_share_by_chance(neurons):
    """The same of all neurons of the model that a set belongs to."""
    return attention_share(NeuronSet({p: torch.ones_like(m) for p, m in neurons.masks.items()}))


PAPER_TASKS = ("MMLU", "ARC-c", "GSM8K")
PAPER_COLUMNS = {
    2: ("Origin.", "Circ-Break", "SN-Tune"),
    3: ("Origin.", "Circ-Break", "SN-Tune"),
    4: ("Before", "Origin.", "SN-Tune", "RSN-Tune"),
}


def defence_table(number, results, paper_model, tasks, languages, attacks):
    """Paper's Table 2 or 3 beside the measurement: cost, capability, direct requests in several languages, attacks in the first one.

    results: model name to `defences.columns`; tasks stand for MMLU, ARC-challenge and GSM8K, in this order.
    """
    rows = [("Cost", "training, s (paper: min)", "Training Cost (min.)", seconds)]
    rows += [
        (
            "Cost",
            "parameters (paper: million)",
            "# Parameters (M)",
            lambda draws: f"{draws[0].parameters:,}" if draws[0].parameters else "–",
        )
    ]
    rows += [
        ("Accuracy", f"{task} (paper: {paper})", paper, rate("accuracy", task))
        for task, paper in zip(tasks, PAPER_TASKS)
    ]
    rows += [
        ("Accuracy", "average", "Avg. Capability", lambda draws: lines(mean_accuracy(draws, tasks)))
    ]
    direct = language_rows(languages, "Direct")
    for measure in ("asr", "coherent"):

        def paper(row):
            return row if measure == "asr" else None

        rows += [row for row in direct if row[0] == MEASURES[measure]]
        rows += [
            (MEASURES[measure], f"{name}, {languages[0]}", paper(name), rate(measure, name))
            for name in attacks
        ]
        rows += [
            (
                MEASURES[measure],
                f"average with direct, {languages[0]}",
                paper("Avg. Harmful"),
                _average(measure, (languages[0], *attacks)),
            )
        ]
    rows += [row for row in direct if row[0] in (MEASURES["over_refusal"], MEASURES["helpful"])]
    return side_by_side(number, results, paper_model, rows)


def _average(measure, names):
    """The function that writes the mean of direct requests and attacks, which share their requests."""
    return lambda draws: lines(mean_rate(draws, measure, names))


def language_rows(languages, paper_row):
    """Attack success, coherent compliance, over-refusal and helpful answers per language; the paper has the first one in English."""

    def paper(measure, language):
        return paper_row if (measure, language) == ("asr", "en") else None

    def name(measure, language):
        return f"direct, {language}" if measure in ("asr", "coherent") else language

    return [
        (MEASURES[m], name(m, l), paper(m, l), rate(m, l))
        for m in ("asr", "coherent", "over_refusal", "helpful")
        for l in languages
    ]


def side_by_side(number, results, paper_model, rows):
    """rows: (group, name, row of the paper or None, function from the draws of a column to text)."""
    printed, table = printed_cells(number, paper_model), []
    for _, _, paper_row, text in rows:
        line = {
            ("Paper", paper_model, column): printed.get((paper_row, column), "–")
            for column in PAPER_COLUMNS[number]
        }
        for name, columns in results.items():
            line |= {
                (f"Here: {name}", *two_line_heading(column)): text(draws)
                for column, draws in columns.items()
            }
        table.append(line)
    index = pd.MultiIndex.from_tuples([row[:2] for row in rows], names=[None, None])
    frame = pd.DataFrame(
        [list(line.values()) for line in table],
        index=index,
        columns=pd.MultiIndex.from_tuples(table[0]),
    )
    return with_cells(number, frame, [row[2] for row in rows])


def two_line_heading(column):
    """Two lines: which neurons, and which way of tuning."""
    way, _, which = column.partition(": ")
    return which, way


def rate(measure, name):
    """The function that writes this rate: percent with interval, and the range over seeds where there are several."""

    return lambda draws: cell([draw.rates for draw in draws], (measure, name))


def mean_accuracy(draws, tasks):
    """Mean accuracy of the tasks, over seeds."""
    return pooled([draw.rates for draw in draws], ("accuracy", *tasks))


def mean_rate(draws, measure, names):
    """Mean over attacks and over seeds."""
    return pooled([draw.rates for draw in draws], (measure, *names))


def seconds(draws):
    """Mean training time."""
    mean = sum(draw.seconds for draw in draws) / len(draws)
    return f"{mean:.1f}" if mean else "–"
