"""Every number the paper's tables report, with the cell it stands in, and what its figures are said to show (Zhao et al., ICLR 2025).

`table(n)` gives one row per cell: group of rows, row, model, column, value. Averages are as printed, also where
they are wrong: `SLIPS` lists those, and `DISAGREEMENTS` the places we found where the paper says two things of one."""

import io
from dataclasses import dataclass

import pandas as pd

SECTIONS = {1: "§2.2", 2: "§3.1", 3: "§3.2", 4: "§4", 5: "appendix A.2"}
_COLUMNS = {
    1: (
        ["Llama2-7B-Chat", "Llama3-8B-Instruction", "Mistral-7B-Instruct-v0.2"],
        ["Origin.", "Deact-R", "Deact-SN"],
    ),
    2: (
        ["Vicuna-13B-v1.5", "Llama3-8B-Instruction", "Mistral-7B-Instruct-v0.2"],
        ["Origin.", "Circ-Break", "SN-Tune"],
    ),
    3: (
        ["Llama2-7B-Base", "Llama3-8B-Base", "Mistral-7B-v0.1"],
        ["Origin.", "Circ-Break", "SN-Tune"],
    ),
    4: (
        ["Llama2-7B-Chat", "Mistral-7B-Instruct-v0.2"],
        ["Before", "Origin.", "SN-Tune", "RSN-Tune"],
    ),
    5: (["Llama3-8B-Instruct"], ["10", "50", "100", "200", "400", "800"]),
}
_CELLS = {
    1: """
Harmful|Harm Behavior|0.0 2.0 97.0 30.0 31.0 78.0 36.0 39.0 86.0
Harmful|Adv Behavior|0.0 3.0 83.0 7.0 13.0 96.0 30.0 30.0 87.0
Harmful|MultiJail-En|12.7 12.9 81.6 20.0 21.6 74.3 44.1 46.8 86.4
Harmful|Avg. Harmful|4.2 6.0 87.2 19.0 21.9 82.8 36.7 38.6 86.5
Capability|MMLU|48.2 48.4 47.8 65.3 63.2 62.7 59.2 59.3 58.5
Capability|GSM8K|24.8 22.7 21.9 75.9 73.6 72.4 43.6 43.6 42.1
Capability|Avg. Capability|36.5 35.6 34.8 70.6 68.4 67.6 51.4 51.5 50.3
""",
    2: """
Cost|Training Cost (min.)|- 43 4 - 24 2 - 23 2
Cost|# Parameters (M)|0 34.1 0 0 27.5 0 0 27.5 0
Capability|MMLU|53.4 52.8 55.7 65.2 65.6 67.3 58.6 56.3 59.5
Capability|ARC-c|59.7 61.3 61.6 73.7 74.1 74.9 72.6 71.8 73.4
Capability|GSM8K|33.4 35.0 34.8 63.2 64.3 69.6 43.7 42.5 44.1
Capability|Avg. Capability|48.8 49.7 50.7 67.4 68.0 68.4 58.3 56.9 59.0
Harmful|Direct|92.0 0.0 0.0 30.0 0.0 0.0 36.0 7.0 0.0
Harmful|GCG|100.0 3.0 0.0 74.0 3.0 4.0 88.0 8.0 6.0
Harmful|AutoDAN|93.0 2.0 3.0 82.0 0.0 0.0 91.0 3.0 4.0
Harmful|PAIR|89.0 16.0 9.0 76.0 9.0 4.0 68.0 22.0 8.0
Harmful|Avg. Harmful|93.5 5.3 3.0 65.5 3.0 2.0 70.8 10.0 4.5
""",
    3: """
Cost|Training Cost (min.)|- 23 2 - 35 2 - 21 2
Cost|# Parameters (M)|0 34.1 0 0 27.5 0 0 27.5 0
Capability|MMLU|49.2 49.1 49.2 70.1 68.9 69.6 68.4 68.1 69.2
Capability|ARC-c|27.6 26.8 29.3 70.7 72.0 71.8 74.8 73.4 74.7
Capability|GSM8K|12.7 13.7 16.3 58.9 58.2 59.5 50.4 47.6 52.3
Capability|Avg. Capability|29.8 29.9 31.6 66.6 66.4 67.0 62.0 63.0 65.4
Harmful|Direct|97.0 84.0 0.0 100.0 87.0 0.0 100.0 78.0 6.0
Harmful|GCG|100.0 92.0 7.0 100.0 95.0 14.0 100.0 82.0 13.0
Harmful|AutoDAN|100.0 97.0 9.0 100.0 92.0 21.0 100.0 93.0 12.0
Harmful|PAIR|98.0 89.0 5.0 100.0 96.0 19.0 100.0 97.0 24.0
Harmful|Avg. Harmful|98.8 90.5 5.3 100.0 92.5 13.5 100.0 87.5 13.8
""",
    4: """
Capability|GSM8K|16.8 26.5 27.2 26.2 43.7 63.4 61.8 63.2
Harmful|Harmful|0.0 41.0 38.0 26.0 36.0 79.0 72.0 41.0
""",
    5: """
Detection|Number of Safety Neurons|8912 4825 3594 2329 2322 2314
""",
}
NAMES = {
    "meta-llama/Llama-2-7b-chat-hf": "Llama2-7B-Chat",
    "meta-llama/Llama-2-7b-hf": "Llama2-7B-Base",
    "meta-llama/Meta-Llama-3-8B-Instruct": "Llama3-8B-Instruction",
    "meta-llama/Meta-Llama-3-8B": "Llama3-8B-Base",
    "mistralai/Mistral-7B-Instruct-v0.2": "Mistral-7B-Instruct-v0.2",
    "mistralai/Mistral-7B-v0.1": "Mistral-7B-v0.1",
    "lmsys/vicuna-13b-v1.5": "Vicuna-13B-v1.5",
}
# (table, row, model, column) -> the value its own rows give.
SLIPS = {
    (2, "Avg. Capability", "Llama3-8B-Instruction", "SN-Tune"): 70.6,
    (3, "Avg. Capability", "Mistral-7B-v0.1", "Origin."): 64.5,
}
# What §2.3.1 says in words about Figures 2 and 4: share of neurons (%) at the leap in harm and at the breakdown; first
# layers (of 32) whose safety neurons must be off for a near-complete breakdown.
MECHANISM = {
    "Llama2-7B-Chat": {"onset": 0.3, "collapse": 0.4, "layers": 10},
    "Llama3-8B-Instruction": {"onset": 0.15, "collapse": 0.5, "layers": 16},
    "Mistral-7B-Instruct-v0.2": {"onset": 0.1, "collapse": 0.2, "layers": 10},
}
MECHANISM_LAYERS = 32  # of each of these models
OVERLAP_BELOW = 30  # % (§2.3.2): the overlap of two languages' safety neurons is typically smaller


@dataclass(frozen=True)
class Fact:
    """What the text says of a figure; its curves and bars carry no numbers. chapter, glued: where this book has a counterpart, and its names."""

    figure: int
    model: str
    what: str
    said: str
    chapter: str
    glued: tuple[str, ...]


def _facts():
    mechanism, ablations = "03_mechanism", "08_ablations"
    for model, read in MECHANISM.items():
        leap, gone = (f"{read[key]:g} %" for key in ("onset", "collapse"))
        yield Fact(
            2, model, "share of neurons at which harm leaps", leap, mechanism, ("onset_eq3",)
        )
        yield Fact(
            2, model, "share at which safety has broken down", gone, mechanism, ("collapse_eq3",)
        )
    what, said = "safety neurons in attention, the rest in feed-forward", "77 %, 23 %"
    yield Fact(3, "Llama2-7B-Chat", what, said, mechanism, ("attention_eq3",))
    for model, read in MECHANISM.items():
        what = f"first layers, of {MECHANISM_LAYERS}, that must lose theirs"
        yield Fact(4, model, what, f"{read['layers']}", mechanism, ("from_front_eq3",))
    yield Fact(4, "each", "the same from the back", "nearly all", mechanism, ("from_back_eq3",))
    what = "overlap of two languages' safety neurons"
    yield Fact(
        5, "one", what, f"typically below {OVERLAP_BELOW} %", "04_languages", ("overlap_eq3",)
    )
    ends = ("forty_first", "forty_last")
    for model in ("Llama2-7B-Base", "Llama3-8B-Instruction"):
        yield Fact(6, model, "documents up to which harm falls rapidly", "40", ablations, ends)
    what = "documents that Circuit Breakers take, and as many retained"
    yield Fact(6, "Zou et al. 2024", what, "about 4000", ablations, ())
    for what, said, seen in (
        ("harmful score after 10 epochs", "0.0", ("epochs_last",)),
        ("capability after 10 epochs", "0.0", ("epochs_last",)),
        ("capability after 5 epochs at 1e-7", "3.2", ()),
        ("capability after 3 epochs at 1e-7", "6.8", ()),
        ("best epochs and rate", "1 at 1e-6", ("best_last",)),
    ):
        yield Fact(7, "Llama2-7B-Base", what, said, ablations, seen)


# Low-rank adapters of rank 16 on the seven matrices of 21 layers: millions of parameters.
BREAKER_LAYERS = 21
BREAKER_MILLIONS = {
    "Vicuna-13B-v1.5": 32.9,
    "Llama2-7B-Base": 26.2,
    "Llama3-8B-Instruction": 27.5,
    "Mistral-7B-Instruct-v0.2": 27.5,
}
DETECTED = 2329  # safety neurons of Llama3-8B-Instruct on 200 documents (Table 5)
DETECTED_SHARES = {"qkvo gate up down": 0.14, "qkv up down": 0.21}  # % of rows and columns


@dataclass(frozen=True)
class Disagreement:
    """Two things that the paper says of one. about: what; said: its words, with their places; right: what holds; known: how that is known."""

    about: str
    said: str
    right: str
    known: str


def _cell(number, row, model, column):
    """One printed number."""
    key = {"row": row, "model": model, "column": column}
    cells = table(number)
    return cells.loc[(cells[list(key)] == pd.Series(key)).all(axis=1), "value"].item()


def _disagreements():
    for (number, row, model, column), own in SLIPS.items():
        said = f"{_cell(number, row, model, column):.1f} (Table {number})"
        about = f"average capability, {model}, {column}"
        yield Disagreement(about, said, f"{own:.1f}", "mean of the three rows above it")
    yield from _prose()
    yield _accuracy("Llama3-8B-Instruction", 2, "Origin.")
    yield _accuracy("Llama2-7B-Chat", 4, "Before")
    yield from _counts()


def _accuracy(model, number, column):
    """GSM8K of a model that nothing was done to, in Table 1 and in another."""
    places = ((1, "Origin."), (number, column))
    own, mistral = (
        [f"{_cell(table, 'GSM8K', name, column):.1f}" for table, column in places]
        for name in (model, "Mistral-7B-Instruct-v0.2")
    )
    same = " and ".join(mistral)
    return Disagreement(
        f"accuracy of {model} on GSM8K, nothing done to it",
        f"{own[0]} (Table 1), {own[1]} (Table {number})",
        "one number; which one is not known",
        f"same model, same task; Mistral's numbers agree ({same}), so it is hardly the number of examples",
    )


def _prose():
    """Numbers of the text against those of the tables."""
    model = "Llama3-8B-Instruction"
    row = [_cell(1, "Avg. Capability", model, x) for x in ("Origin.", "Deact-R", "Deact-SN")]
    yield Disagreement(
        f"capability of {model} before and after its safety neurons are off",
        f"{row[0]:.1f} and {row[1]:.1f} (§2.2)",
        f"{row[0]:.1f} and {row[2]:.1f}",
        f"Table 1: {row[1]:.1f} is with random neurons off",
    )
    model = "Mistral-7B-v0.1"
    harm = [_cell(3, "Avg. Harmful", model, column) for column in ("Origin.", "SN-Tune")]
    tuned = _cell(3, "Avg. Capability", model, "SN-Tune")
    yield Disagreement(
        f"capability score that {model} gains by SN-Tune",
        f"from {harm[0]:.1f} to {harm[1]:.1f} (§3.2)",
        f"from {SLIPS[3, 'Avg. Capability', model, 'Origin.']:.1f} to {tuned:.1f}",
        "Table 3: the numbers quoted are its harm, which fell",
    )


def _counts():
    """Counts of parameters and of neurons."""
    fits = BREAKER_MILLIONS
    yield Disagreement(
        "parameters that Circ-Break trains, millions",
        "34.1 for Vicuna-13B (Table 2) and for Llama2-7B (Table 3), 27.5 for the others",
        f"{fits['Vicuna-13B-v1.5']} and {fits['Llama2-7B-Base']}",
        f"adapters of rank 16 on {BREAKER_LAYERS} layers, which give the others their 27.5; 34.1 comes out for no number of layers of either",
    )
    yield Disagreement(
        "share of the safety neurons",
        "less than 1 % of all parameters (abstract), about 0.5 % of neurons (§2.2), about 0.5 % of all parameters (§5.1), 0.1 % of parameters (§6)",
        "not known: no set is four shares, and neurons are not parameters",
        "sets of one model differ in size with ε, which the paper does not give",
    )
    whole, five = DETECTED_SHARES.values()
    yield Disagreement(
        "safety neurons of Llama3-8B-Instruct",
        f"{DETECTED} (Table 5), about 0.5 % of neurons (§2.2)",
        f"{DETECTED} are {whole} % of the rows and columns of all seven matrices, {five} % of q, k, v, up and down",
        "counted from the model's shape",
    )
    yield Disagreement(
        "share of the parameters that Chen et al. call safety",
        "nearly 10 % (§1, §6 Interpretability), 5 % (§6 Interpret Safety Mechanism)",
        "about 5 % of the feed-forward neurons",
        "their paper counts neurons of the feed-forward blocks",
    )
    mmlu = {
        model: [f"{_cell(number, 'MMLU', model, 'Origin.'):.1f}" for number in (1, 2)]
        for model in ("Mistral-7B-Instruct-v0.2", "Llama3-8B-Instruction")
    }
    yield Disagreement(
        "accuracy on MMLU, nothing done to the model",
        "; ".join(f"{m} {one} (Table 1), {two} (Table 2)" for m, (one, two) in mmlu.items()),
        "one number each; which one is not known",
        "same models, same task",
    )


# Chen et al. (2025): patching this share of the feed-forward neurons restores more than this share of safety (%).
CHANGE_SCORES = {"neurons": 5, "restored": 90}


def column_for(number, model, shown):
    """The paper's name of the model whose cells of a table stand beside a model's.

    That is the model itself, if the table has it; for an organism, which no paper has, `shown`; for every other model None.
    """
    if model.startswith("organism/"):
        return shown
    name = NAMES.get(model.partition("@")[0])
    return name if name in _COLUMNS[number][0] else None


def table(number):
    """The cells of one table as a long data frame: group, row, model, column, value (NaN where a dash stands)."""
    models, columns = _COLUMNS[number]
    rows = []
    for line in io.StringIO(_CELLS[number].strip()):
        group, row, values = line.strip().split("|")
        heads = [(model, column) for model in models for column in columns]
        rows += [
            (group, row, *head, value) for head, value in zip(heads, values.split(), strict=True)
        ]
    cells = pd.DataFrame(rows, columns=["group", "row", "model", "column", "value"])
    return cells.assign(value=pd.to_numeric(cells["value"].replace("-", None)))


FACTS = tuple(_facts())  # §§2.3, 5
DISAGREEMENTS = tuple(_disagreements())
