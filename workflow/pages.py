"""What is made from the executed notebooks: the page of every cell of the paper's tables, how everything was run, slides, and data to download."""

import html
import json
import re
import zipfile
from collections import Counter
from pathlib import Path

import nbformat

from safetyneuron.book import paper as reported
from safetyneuron.book.claims import badge_of, load_claims, say_claim, sentence_of
from safetyneuron.run import executed

TABLES = range(1, 6)
UNITS = {"Training Cost (min.)": " seconds", "# Parameters (M)": " parameters"}  # of organisms
RESULT = (
    "11_answer_key",
    "poster",
    "book/_static/poster.png",
)  # the figure of the first page: chapter, glued name, place

# Chapter, figure, and the claim that it shows; a claim that an edition does not judge has no slide.
SLIDES = (
    ("00_organism", "classes", "alignment-refuses"),
    ("01_detection", "overlaps", "apart-from-foundation"),
    ("02_verification", "conditions", "eq3-helps"),
    ("03_mechanism", "sweep", "small-share-breaks"),
    ("03_mechanism", "places-bars", "attention-units"),
    ("03_mechanism", "depth", "front-carries"),
    ("04_languages", "overlap", "languages-overlap-little"),
    ("04_languages", "causal", "own-language-breaks"),
    ("05_sn_tune_instruct", "defences", "aligned-price"),
    ("05_sn_tune_instruct", "attacks", "aligned-resists"),
    ("06_sn_tune_base", "defences-base", "base-judges"),
    ("06_sn_tune_base", "attacks-base", "base-resists"),
    ("07_rsn_tune", "downstream", "rsn-keeps"),
    ("08_ablations", "documents", "documents-judge"),
    ("08_ablations", "grid", "some-cell-judges"),
    ("09_activation_contrast", "restoration", "patch-restores"),
    ("10_comparison", "areas-figure", "contrast-above-eq3"),
    ("11_answer_key", "poster", "best-finds-planted"),
    ("A1_parallel_detection", "rules", "closed-forms-exact"),
    ("A2_detection_corpus", "losses", "corpus-suffices"),
)

# The claims that the ledger shows first, in the order of the argument.
MAIN = """
alignment-refuses closed-forms-exact corpus-suffices apart-from-foundation eq3-breaks eq3-helps eq3-capability
small-share-breaks attention-units front-carries languages-overlap-little own-language-breaks aligned-refuses
aligned-price base-refuses base-judges base-above-random rsn-keeps rsn-above-random documents-judge patch-restores
trainings-mostly guard-above-words tax-paid contrast-above-eq3 eq3-finds-planted best-finds-planted second-set-breaks
""".split()

TAKEN_HOME = ("eq3-helps", "contrast-above-eq3", "best-finds-planted")  # on the closing slide


def write(stage):
    """Write the pages into the stage, the figure of the first page, the slides, and every chapter's data."""
    notebooks = {
        path.stem: nbformat.read(path, 4) for path in sorted(Path(stage).glob("notebooks/*.ipynb"))
    }
    chapter, name, place = RESULT
    (Path(stage) / place).write_bytes(executed.picture(notebooks[chapter], name))
    (Path(stage) / "book" / "paper_and_here.md").write_text(
        paper_and_here(notebooks), encoding="utf-8"
    )
    (Path(stage) / "book" / "ledger.md").write_text(ledger(notebooks), encoding="utf-8")
    (Path(stage) / "book" / "status.md").write_text(status(notebooks), encoding="utf-8")
    static = Path(stage) / "book" / "_static"
    (static / "data").mkdir(exist_ok=True)
    for name, notebook in notebooks.items():
        write_data(notebook, static / "data" / f"{name}.zip")
    write_slides(notebooks, static / "slides")


def write_data(notebook, path):
    """A zip archive of the chapter's tables and figures as CSV, its glued values and its parameters."""
    tables, values = executed.data(notebook)
    files = {f"{name}.csv": text for name, text in tables.items()}
    files["values.json"] = json.dumps(values, ensure_ascii=False, indent=1)
    files["parameters.json"] = json.dumps(
        executed.parameters(notebook), ensure_ascii=False, indent=1
    )
    write_archive(path, files)


def write_archive(path, files):
    """A zip archive. files: name to text."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(
                zipfile.ZipInfo(name), text, zipfile.ZIP_DEFLATED
            )  # without the time of day, so that equal data are equal files


def judged_in(notebooks):
    """Every claim that a build judged, by its key: (chapter, row)."""
    return {
        key: (name, row)
        for name, notebook in notebooks.items()
        for key, row in executed.judged(notebook).items()
    }


def tally(judged):
    """How many claims came out how, as text. judged: as from `judged_in`."""
    counted = Counter(row["verdict"] for _, row in judged.values())
    return ", ".join(f"{count} {verdict}" for verdict, count in counted.most_common())


def write_slides(notebooks, folder):
    """One slide for every key figure: what was found, one number, the figure, and small below it the claim."""
    folder.mkdir(exist_ok=True)
    sections, judged = "", judged_in(notebooks)
    shown = [slide for slide in SLIDES if slide[2] in judged]
    opening = {chapter: key for chapter, _, key in reversed(shown)}
    for chapter, name, key in shown:
        picture = executed.picture(notebooks[chapter], f"{name}-slide", name)
        (folder / f"{chapter}-{name}.png").write_bytes(picture)
        row, opens = judged[key][1], opening[chapter] == key
        sections += _slide(chapter, name, row, notebooks[chapter], opens)
    template = Path(__file__).with_name("slides.html").read_text(encoding="utf-8")
    sections += _closing_slide(judged)
    (folder / "index.html").write_text(template.replace("SECTIONS", sections), encoding="utf-8")


def _slide(chapter, name, row, notebook, opens):
    """A slide: its title is the finding, the claim stands small at its foot; the first of a chapter has the chapter's notes."""
    text, title = _prose(notebook), _title(notebook)
    alt = re.search(rf"```{{glue:figure}} {name}\n.*?:alt: (.*?)\n", text, re.S)[1]
    key, verdict = row["key"], row["verdict"]
    claim = load_claims()[key]
    number = row["number"].replace(" %", "\N{NO-BREAK SPACE}%")
    long = " long" * (len(number) > 80)  # several models, or several counts
    source = html.escape(claim["paper"], quote=False)
    measured = f"Measured: {least(claim)}. Ran on {html.escape(row['ran_on'])}."
    notes = f"{measured} {html.escape(notes_for_teachers(text))}" if opens else measured
    return f"""<section><p class="chapter"><a href="../../notebooks/{chapter}.html">{title}</a></p>
<h2>{html.escape(sentence_of(key, verdict))}</h2><p class="number{long}">{html.escape(number)}</p>
<img src="{chapter}-{name}.png" alt="{html.escape(alt)}">
<p class="foot">{say_claim(key, verdict)} <small>{source}</small></p><aside class="notes">{notes}</aside></section>
"""


def _prose(notebook):
    """The text cells of a notebook as one."""
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def _title(notebook):
    """The title of a chapter as HTML."""
    return _plain(re.search(r"(?m)^# (.*)", _prose(notebook))[1])


def notes_for_teachers(text):
    """What students may conclude from a chapter, what to answer, and a question to leave them with; text: of its cells."""
    wrong, better = re.search(r"\*Wrong:\* (.*?)\n\n\*Better:\* (.*?)\n```", text, re.S).groups()
    asked = re.search(r":label: \S+-open\n\n(.*?)\n\n\*Open question", text, re.S)[1]
    wrong, better, asked = (html.unescape(_plain(said)) for said in (wrong, better, asked))
    return f"Students may say: {wrong} Answer: {better} Ask: {asked}"


def _closing_slide(judged):
    """What to take home, and how many claims came out how."""
    home = "".join(
        f"<li>{html.escape(sentence_of(key, judged[key][1]['verdict']))}</li>"
        for key in TAKEN_HOME
        if key in judged
    )
    return f"""<section><h2>What to take home</h2><ul>{home}</ul>
<p class="foot">Of {len(judged)} claims: {tally(judged)}. What would count was written down before the run: <a href="../../book/ledger.html">all of them</a>.</p></section>
"""


def _plain(text):
    """Prose without its roles and emphasis."""
    text = re.sub(r"\s*\{cite:\w+\}`[^`]*`", "", text)
    text = re.sub(r"\{\w+\}`([^<`]*?)(?: <[^`]*>)?`", r"\1", text)
    return html.escape(re.sub(r"[*`]", "", text), quote=False)


def paper_and_here(notebooks):
    """One row for every row and column of the paper's tables, its models in lines, ours beside them."""
    ours, judged = {}, judged_in(notebooks)
    for name, notebook in notebooks.items():
        for cell in executed.comparisons(notebook):
            ours.setdefault((cell["table"], cell["row"], cell["column"]), []).append((name, cell))
    tables = "".join(
        _body(
            f"Table {number}, {reported.SECTIONS[number]}",
            rf"Zhao.*\bTables? ([\d ]+and )*{number}\b",
            [_row(number, key, of, ours.get((number, *key), [])) for key, of in _cells(number)],
            judged,
        )
        for number in TABLES
    )
    facts = [_fact_row(fact, notebooks) for fact in reported.FACTS]
    tables += _body("Figures 2 to 7, §§2.3 and 5", r"Zhao.*\bFigure \d", facts, judged)
    tables += _body("The second paper: Chen et al.", r"Chen et al\.", [], judged)
    return f"""# Paper and here

Every cell of the paper's tables, with every measurement of this build that stands beside it in a chapter, in percent with its interval where it is a rate; then
what the paper's text says of its figures, and the second paper. Above each stand the claims that were judged of it. An
asterisk marks an average that the paper's own rows do not give. *Not measured* means that no chapter of this build has a counterpart.

## Where the paper disagrees with itself

The numbers are quoted in this book as they are printed. In these places the paper says two things that do not agree.

{disagreements()}

## Every cell

```{{raw}} html
<p><label>Show rows with <input type="search" id="filter" placeholder="GCG, Deact-SN, MMLU …"></label> <span id="filter-count" role="status"></span></p>
<table class="dataframe" id="filtered">
<thead><tr><th scope="col">Of what</th><th scope="col">Here</th><th scope="col">Paper</th></tr></thead>
{tables}</table>
```
"""


def _body(head, source, rows, judged):
    """Part of the table of cells: its head, the claims whose source fits a pattern, with their verdicts, and its rows."""
    claims = "".join(
        _judged_row(key, name, row)
        for key, (name, row) in judged.items()
        if re.match(source, load_claims()[key]["paper"])
    )
    head = f'<tr><th scope="rowgroup" colspan="3">{head}</th></tr>'
    return f'<tbody class="head">{head}</tbody>\n<tbody>{claims}{"".join(rows)}</tbody>\n'


def _judged_row(key, name, row):
    """A claim as a row of the table of cells: its verdict and number here, where it is from there."""
    claim, number = load_claims()[key], html.escape(row["number"])
    link = f'<a href="../notebooks/{name}.html">{html.escape(row["ran_on"])}</a>'
    return f"""<tr><th scope="row">Claim: {html.escape(claim["claim"])}</th><td>{badge_of(row["verdict"])} {link}: {number}</td><td>{html.escape(claim["paper"])}</td></tr>
"""


def disagreements():
    """A table of what the paper says twice and differently."""
    rows = [(x.about, x.said, x.right, x.known) for x in reported.DISAGREEMENTS]
    lines = [("of what", "the paper says", "it should be", "how we know"), ("---",) * 4, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _fact_row(fact, notebooks):
    """What the paper's text says of a figure, and what its chapter here says."""
    said = executed.texts(notebooks[fact.chapter]) if fact.chapter in notebooks else {}
    found = "\n".join(html.escape(said[name]) for name in fact.glued if name in said)
    link = f'<a href="../notebooks/{fact.chapter}.html">{html.escape(said.get("ran_on", ""))}</a>'
    here = f"{link}: {found}" if found else "<em>not measured</em>"
    head = f'<th scope="row">{html.escape(fact.what)} <small>Figure {fact.figure}</small></th>'
    return f"<tr>{head}<td>{here}</td><td>{html.escape(fact.model)}: {html.escape(fact.said)}</td></tr>\n"


def ledger(notebooks):
    """Every claim that the chapters judged, the main ones first; claims of chapters that are not in this build are left out."""
    judged = judged_in(notebooks)
    chapters = "".join(
        _chapter_claims(_title(notebook), {k: of for k, of in judged.items() if of[0] == name})
        for name, notebook in sorted(notebooks.items())
    )
    return f"""# Claims and verdicts

**Of {len(judged)} claims: {tally(judged)}.** Here is every claim that a chapter of this build judges, with what was found. What would be measured, and the least that would count, were written down before the run.

```{{admonition}} One rule for every verdict
:class: note
An effect is a difference between two conditions that answered the same requests. Its 95 % interval is about other trainings of the model, other verbs or sums, and other random
draws than those measured. The claim is **seen** where the interval lies above the margin, **reversed** where it lies below minus the margin, **not seen** where it lies between the two,
and **undecided** otherwise; a claim that names a bar of its own has the margin 0, and is reversed where the bar is clearly missed. Where a set of neurons is compared with random sets of its kind, it must also rank so high among them that chance would put it there once in twenty times at most, all trainings together (with one training that takes nineteen random sets; chapters 07, 10 and the safeguard of chapter 09 compare means alone). Claims of one chapter are corrected for their number (Holm 1979). *Partly seen*
means that some models say so and others do not. Where a model has one training, the verdict is about that training.
```

## The main claims

```{{raw}} html
{_claims_table("The main claims", {key: judged[key] for key in MAIN if key in judged})}
```

## All claims, by chapter

```{{raw}} html
{chapters}
```
"""


def _chapter_claims(title, judged):
    """The claims of one chapter, folded under its title."""
    if not judged:
        return ""
    count = f"{len(judged)} claim{'s' if len(judged) > 1 else ''}"
    table = _claims_table(title, judged)
    return f"<details><summary>{title}: {count}</summary>\n{table}\n</details>\n"


def _claims_table(label, judged):
    """A table of claims. judged: key to (chapter, row)."""
    rows = "".join(_claim_row(load_claims()[key], *found) for key, found in judged.items())
    return f"""<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table class="dataframe claims">
<thead><tr><th scope="col">Claim</th><th scope="col">Verdict</th><th scope="col">What was measured, and the least that counts</th><th scope="col">Ran on</th></tr></thead>
<tbody>{rows}</tbody></table></div>"""


def _claim_row(claim, chapter, row):
    """A claim with its source, the verdict and the number to remember, effect and margin, and on what it ran."""
    number = html.escape(row["number"])
    cells = f"{badge_of(row['verdict'])}<br>{number}", least(claim), html.escape(row["ran_on"])
    link = f'<a href="../notebooks/{chapter}.html">{html.escape(claim["claim"])}</a>'
    source = f"<small>chapter {chapter.partition('_')[0]}; {html.escape(claim['paper'])}</small>"
    columns = "".join(f"<td>{cell}</td>" for cell in cells)
    return f'<tr><th scope="row">{link}<br>{source}</th>{columns}</tr>\n'


def least(claim):
    """What is measured and the least that would count, as text; margins of shares are in points."""
    margin, effect = claim["margin"], html.escape(claim["effect"])
    if not margin:
        return effect
    share = not re.search("correlation|trade-off", effect)
    return f"{effect}: at least {f'{100 * margin:g} points' if share else f'{margin:g}'}"


def _cells(number):
    """(row, column) and the paper's cells of it, one per model, in the paper's order."""
    return reported.table(number).groupby(["row", "column"], sort=False)


def _row(number, key, group, found):
    printed = [
        (model, _printed(number, key, model, value))
        for model, value in group[["model", "value"]].itertuples(index=False)
    ]
    paper = "\n".join(f"{html.escape(model)}: {value}" for model, value in printed)
    unit = UNITS.get(key[0], "")
    here = "\n".join(_measured(name, cell, unit) for name, cell in found) or "<em>not measured</em>"
    row, column = (html.escape(part) for part in key)
    head = f'<th scope="row">{row}, {column} <small>Table {number}</small></th>'
    return f"<tr>{head}<td>{here}</td><td>{paper}</td></tr>\n"


def _printed(number, key, model, value):
    slip = reported.SLIPS.get((number, key[0], model, key[1]))
    return (
        "–"
        if value != value
        else f"{value:g}" + (f"* (its rows: {slip})" if slip is not None else "")
    )


def _measured(name, cell, unit):
    text = cell["text"].replace("\n[", " [").replace("\n", "; single runs ")
    way = f", {cell['way']}" if cell["way"] else ""
    link = f'<a href="../notebooks/{name}.html">{html.escape(cell["model"] + way)}</a>'
    return f"{link}: {html.escape(text)}{unit}"


def status(notebooks):
    """When, where and with what every chapter was run."""
    found = {name: executed.how(notebook) for name, notebook in notebooks.items()}
    rows = "\n".join(_status_row(name, notebooks[name], run) for name, run in found.items())
    versions = {tuple(run["versions"].items()) for run in found.values() if "versions" in run}
    lists = "\n\n".join(
        ", ".join(f"{name} {number}" for name, number in some) for some in sorted(versions)
    )
    return f"""# How this build was run

One row per chapter, written by the run itself. A + behind a commit says that the working tree differed from it. Results that an earlier run left in the cache
shorten the seconds.

```{{list-table}}
:header-rows: 1

* - chapter
  - seconds
  - models
  - device
  - dtype
  - commit
{rows}
```

Versions: {lists}
"""


def _status_row(name, notebook, run):
    names = ", ".join(f"`{model}`" for model in executed.models_of(notebook))
    cells = (
        f"[](../notebooks/{name}.ipynb)",
        run.get("seconds", "–"),
        names or "–",
        run.get("device", "–"),
        executed.parameters(notebook).get("dtype", "auto"),
        run.get("commit") or "–",
    )
    return "* - " + "\n  - ".join(str(cell) for cell in cells)
