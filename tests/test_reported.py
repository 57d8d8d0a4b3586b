import json

import pytest
from conftest import ROOT

from safetyneuron.book import paper as reported


def test_averages_are_those_of_their_rows_except_where_the_paper_slips():
    checked = 0
    for number in (1, 2, 3):
        cells = reported.table(number)
        for (group, model, column), rows in cells[cells["group"] != "Cost"].groupby(
            ["group", "model", "column"]
        ):
            printed = rows[rows["row"] == f"Avg. {group}"]["value"].item()
            own = rows[~rows["row"].str.startswith("Avg")]["value"].mean()
            expected = reported.SLIPS.get((number, f"Avg. {group}", model, column), printed)
            assert own == pytest.approx(expected, abs=0.0501)
            checked += 1
    assert checked == 54


def test_slips_really_differ_from_what_is_printed():
    for (number, row, model, column), right in reported.SLIPS.items():
        cells = reported.table(number).query(
            "row == @row and model == @model and column == @column"
        )
        assert abs(cells["value"].item() - right) > 1


def test_what_the_text_says_of_figures_is_there_and_has_a_counterpart():
    said = [(fact.figure, fact.model, fact.said) for fact in reported.FACTS]
    assert [x for x in said if x[0] == 3] == [(3, "Llama2-7B-Chat", "77 %, 23 %")]
    assert [x[2] for x in said if x[0] == 4] == ["10", "16", "10", "nearly all"]
    assert [x[2] for x in said if x[0] == 6] == ["40", "40", "about 4000"]
    assert [x[2] for x in said if x[0] == 7] == ["0.0", "0.0", "3.2", "6.8", "1 at 1e-6"]
    for fact in reported.FACTS:
        source = (ROOT / "notebooks" / f"{fact.chapter}.ipynb").read_text(encoding="utf-8")
        assert all(f"{{glue:text}}`{name}`" in source for name in fact.glued)


def matrices(name):
    """Outputs and inputs of the seven matrices of a layer, and the number of layers, from a model's shape."""
    path = ROOT / "safetyneuron" / "run" / "shapes" / f"{name.replace('/', '--')}.json"
    config = json.loads(path.read_text(encoding="utf-8"))["config"]
    width, inner = config["hidden_size"], config["intermediate_size"]
    shared = width * config["num_key_value_heads"] // config["num_attention_heads"]
    sizes = {"q": (width, width), "k": (shared, width), "v": (shared, width), "o": (width, width)}
    sizes |= {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}
    return sizes, config["num_hidden_layers"]


def test_parameters_of_circuit_breakers_follow_from_the_shapes():
    named = {column: name for name, column in reported.NAMES.items()}
    for column, millions in reported.BREAKER_MILLIONS.items():
        sizes, layers = matrices(named[column])
        one = 16 * sum(map(sum, sizes.values())) / 1e6
        assert reported.BREAKER_LAYERS * one == pytest.approx(millions, abs=0.05)
        number = 3 if column.endswith("Base") else 2
        cells = reported.table(number).query("row == '# Parameters (M)' and model == @column")
        printed = cells.set_index("column")["value"]["Circ-Break"]
        exact = [n for n in range(1, layers + 1) if abs(n * one - printed) <= 0.05]
        assert exact == ([reported.BREAKER_LAYERS] if printed == millions else [])


def test_shares_of_the_detected_neurons_follow_from_the_shape():
    sizes, layers = matrices("meta-llama/Meta-Llama-3-8B-Instruct")
    rows = {name: size[name in ("o", "down")] for name, size in sizes.items()}
    whole, five = sum(rows.values()), sum(rows[x] for x in ("q", "k", "v", "up", "down"))
    shares = [100 * reported.DETECTED / (layers * count) for count in (whole, five)]
    assert shares == pytest.approx(list(reported.DETECTED_SHARES.values()), abs=0.005)
    assert reported.DETECTED in reported.table(5)["value"].to_list()


def test_what_the_paper_says_twice_is_told_with_its_places_and_numbers():
    table = {x.about: f"{x.said} | {x.right}" for x in reported.DISAGREEMENTS}
    assert len(table) == len(reported.DISAGREEMENTS) == 11
    for numbers in (
        ("68.4", "70.6"),
        ("62.0", "64.5"),
        ("70.6 and 68.4", "67.6"),
        ("100.0 to 13.8", "64.5 to 65.4"),
        ("75.9", "63.2"),
        ("24.8", "16.8"),
        ("34.1", "32.9", "26.2"),
        ("1 %", "0.5 %", "0.1 %", "§2.2", "§5.1", "§6"),
        ("2329", "0.14 %", "0.21 %"),
        ("10 %", "5 %", "§6"),
        ("59.2", "58.6", "65.3", "65.2"),
    ):
        assert any(all(number in row for number in numbers) for row in table.values()), numbers
    assert all("|" not in part for x in reported.DISAGREEMENTS for part in vars(x).values())


def test_every_table_is_there():
    assert {n: len(reported.table(n)) for n in reported.SECTIONS} == {
        1: 63,
        2: 99,
        3: 99,
        4: 16,
        5: 6,
    }
