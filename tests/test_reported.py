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
    assert [x for x in said if x[0] == 3] == [
        (3, "Llama2-7B-Chat", "77 %"),
        (3, "Llama2-7B-Chat", "23 %"),
    ]
    assert [x[2] for x in said if x[0] == 4] == ["10", "16", "10", "nearly all"]
    assert [x[2] for x in said if x[0] == 6] == ["40", "40", "about 4000"]
    assert [x[2] for x in said if x[0] == 7] == ["0.0", "0.0", "3.2", "6.8", "1 at 1e-6"]
    for fact in reported.FACTS:
        source = (ROOT / "notebooks" / f"{fact.chapter}.ipynb").read_text(encoding="utf-8")
        assert all(f"{{glue:text}}`{name}`" in source for name in fact.glued)


def test_every_table_is_there():
    assert {n: len(reported.table(n)) for n in reported.SECTIONS} == {
        1: 63,
        2: 99,
        3: 99,
        4: 16,
        5: 6,
    }
