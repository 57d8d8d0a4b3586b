"""Assignments for nbgrader, made of chapters: their exercises with cells to answer, tests that compute the answer again, and an open question graded by hand.

python workflow/assignment.py FOLDER NOTEBOOK [NOTEBOOK ...]     # writes FOLDER/source/NAME/NAME.ipynb, as `nbgrader generate_assignment` reads it
"""

import ast
import re
import sys
from pathlib import Path

import nbformat

from safetyneuron.cache import new_file
from safetyneuron.errors import SafetyNeuronError

QUESTION = re.compile(
    r"(?P<fence>`{3,4}){exercise} (?P<title>.*?)\n:label: \S+\n\n(?P<text>.*?)\n(?P=fence)(?!`)",
    re.S,
)
POINTS = {"Easy": 1, "Medium": 2, "Hard": 4}
OPEN_POINTS = 3


def main(folder, *paths):
    """Write an assignment for each chapter."""
    if not paths:
        raise SafetyNeuronError("no notebook is named: give one or more of notebooks/*.ipynb")
    for path in map(Path, paths):
        target = Path(folder) / "source" / path.stem / path.name
        assignment = make_assignment(nbformat.read(path, 4))
        with new_file(target) as new:
            nbformat.write(assignment, new)
        print(f"{target}: {len(list(graded(assignment)))} cells to grade")


def make_assignment(chapter):
    """The chapter as it is, with its exercises as cells that nbgrader releases and grades."""
    found = nbformat.v4.new_notebook(metadata=chapter.metadata)
    cells = iter(chapter.cells)
    for cell in cells:
        question = QUESTION.search(cell.source) if cell.cell_type == "markdown" else None
        if question is None:
            found.cells.append(cell)
        elif "{open}`" in cell.source:
            found.cells += ask_openly(question["title"], question["text"])
        else:
            _stub, _start, solution, _end = (next(cells) for _ in range(4))
            before = cell.source[: question.start()].partition("Write your guess down")[0].strip()
            found.cells += [nbformat.v4.new_markdown_cell(before)] if before else []
            found.cells += ask(question["title"], question["text"], solution.source)
    return found


def graded(notebook):
    """The cells that give points."""
    return (c for c in notebook.cells if c.metadata.get("nbgrader", {}).get("grade"))


def ask(title, text, solution):
    """A question, a cell for `answer` that holds the solution until it is released, and a test that computes the answer again."""
    name, code, value = split_solution(solution)
    points = POINTS[re.search(r"^\*(\w+), ", text, re.M)[1]]
    answer = f"### BEGIN SOLUTION\n{code}answer = {value}\n### END SOLUTION"
    test = (
        "from safetyneuron.book.exercises import judge_guess\n\n"
        f"### BEGIN HIDDEN TESTS\n{code}expected = {value}\n"
        "said = judge_guess(str(answer), str(expected))\nassert said == 'right', said\n### END HIDDEN TESTS"
    )
    return [
        nbformat.v4.new_markdown_cell(f"## {title}\n\n{plain(text)}\n\nPut it into `answer`."),
        graded_cell(nbformat.v4.new_code_cell(answer), f"{name}-answer", solution=True),
        graded_cell(nbformat.v4.new_code_cell(test), f"{name}-test", points, grade=True, locked=True),
    ]  # fmt: skip


def ask_openly(title, text):
    """An open question and a cell for sentences, graded by hand."""
    name = "open-" + re.sub(r"\W+", "-", title.lower()).strip("-")
    cell = nbformat.v4.new_markdown_cell("Write your answer here.")
    return [
        nbformat.v4.new_markdown_cell(f"## {title}\n\n{plain(text)}"),
        graded_cell(cell, name, OPEN_POINTS, grade=True, solution=True),
    ]


def split_solution(source):
    """Name of the exercise, the code before its value, and the expression of the value."""
    last = ast.parse(source).body[-1]
    (keyword,) = last.value.keywords
    before = "".join(source.splitlines(keepends=True)[: last.lineno - 1])
    return keyword.arg, before, ast.get_source_segment(source, keyword.value)


def plain(text):
    """A question without what only the page can show."""
    text = re.sub(r"```{admonition} Hint\n.*?\n(.*?)\n```", r"*Hint:* \1", text, flags=re.S)
    text = re.sub(r"{(?:check|open)}`\w+`\s*|^\*Open question.*?\*$", "", text, flags=re.M)
    return re.sub(r"{\w+}`([^`<]*?)(?: <[^`]*>)?`", r"\1", text).strip()


def graded_cell(cell, name, points=None, grade=False, solution=False, locked=False):
    """The cell with what nbgrader has to know of it (schema 3)."""
    facts = dict(grade_id=name, grade=grade, solution=solution, locked=locked, task=False)
    facts |= {"schema_version": 3} | ({"points": points} if grade else {})
    cell.metadata["nbgrader"] = facts
    return cell


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except SafetyNeuronError as error:
        sys.exit(str(error))
