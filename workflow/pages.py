"""What is made from the executed notebooks: the page of every cell of the paper's tables, how everything was run, slides, and data to download."""

import html
import json
import re
import zipfile
from collections import Counter
from pathlib import Path

import nbformat

from safetyneuron.book import paper as reported
from safetyneuron.book.claims import badge_of, load_claims, sentence_of
from safetyneuron.run import executed

TABLES = range(1, 6)
RESULT = (
    "11_answer_key",
    "poster",
    "book/_static/poster.png",
)  # the figure of the first page: chapter, glued name, place

# Chapter, figure, and the claim that it shows; a claim that an edition does not judge has no slide.
SLIDES = (
    ("00_organism", "classes", "alignment-refuses"),
    ("01_detection", "survival", "apart-from-foundation"),
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
    ("A2_detection_corpus", "corpus", "corpus-suffices"),
)


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


def write_slides(notebooks, folder):
    """One slide for every key figure: what was found, one number, the figure, and small below it the claim."""
    folder.mkdir(exist_ok=True)
    sections = ""
    shown = [slide for slide in SLIDES if slide[2] in executed.judged(notebooks[slide[0]])]
    for chapter, name, key in shown:
        (folder / f"{chapter}-{name}.png").write_bytes(executed.picture(notebooks[chapter], name))
        sections += _slide(chapter, name, key, notebooks[chapter])
    template = Path(__file__).with_name("slides.html").read_text(encoding="utf-8")
    sections += _closing_slide(notebooks)
    (folder / "index.html").write_text(template.replace("SECTIONS", sections), encoding="utf-8")


def _slide(chapter, name, key, notebook):
    """A slide: its title is the finding, the claim stands small at its foot."""
    text = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    title = _plain(re.search(r"(?m)^# (.*)", text)[1])
    alt = re.search(rf"```{{glue:figure}} {name}\n.*?:alt: (.*?)\n", text, re.S)[1]
    claim, row = load_claims()[key], executed.judged(notebook)[key]
    verdict = row["verdict"]
    foot = html.escape(f"Claim: {claim['claim']} ({claim['paper']})", quote=False)
    measured = f"Measured: {claim['effect']}; margin {claim['margin']:g}. Ran on {row['ran_on']}."
    notes = html.escape(f"{measured} {notes_for_teachers(text)}")
    return f"""<section><p class="chapter"><a href="../../notebooks/{chapter}.html">{title}</a></p>
<h2>{badge_of(verdict)} {html.escape(sentence_of(key, verdict))}</h2><p class="number">{html.escape(row["number"])}</p>
<img src="{chapter}-{name}.png" alt="{html.escape(alt)}">
<p class="claim">{foot}</p><aside class="notes">{notes}</aside></section>
"""


def notes_for_teachers(text):
    """What students may conclude from a chapter, what to answer, and a question to leave them with; text: of its cells."""
    wrong, better = re.search(r"\*Wrong:\* (.*?)\n\n\*Better:\* (.*?)\n```", text, re.S).groups()
    asked = re.search(r":label: \S+-open\n\n(.*?)\n\n\*Open question", text, re.S)[1]
    wrong, better, asked = (html.unescape(_plain(said)) for said in (wrong, better, asked))
    return f"Students may say: {wrong} Answer: {better} Ask: {asked}"


def _closing_slide(notebooks):
    """How many claims came out how."""
    found = Counter(
        row["verdict"]
        for notebook in notebooks.values()
        for row in executed.judged(notebook).values()
    )
    counts = "".join(
        f"<li>{badge_of(verdict)} {count}</li>" for verdict, count in found.most_common()
    )
    return f"""<section><h2>Of {found.total()} claims</h2><ul class="counts">{counts}</ul>
<p>Effects and margins were written down before the run: <a href="../../book/ledger.html">all of them</a>.</p></section>
"""


def _plain(text):
    """Prose without its roles and emphasis."""
    text = re.sub(r"\s*\{cite:\w+\}`[^`]*`", "", text)
    text = re.sub(r"\{\w+\}`([^<`]*?)(?: <[^`]*>)?`", r"\1", text)
    return html.escape(re.sub(r"[*`]", "", text), quote=False)


def paper_and_here(notebooks):
    """One row for every row and column of the paper's tables, its models in lines, ours beside them."""
    ours = {}
    for name, notebook in notebooks.items():
        for cell in executed.comparisons(notebook):
            ours.setdefault((cell["table"], cell["row"], cell["column"]), []).append((name, cell))
    rows = "".join(
        _row(number, key, group, ours.get((number, *key), []))
        for number in TABLES
        for key, group in _cells(number)
    )
    rows += "".join(_fact_row(fact, notebooks) for fact in reported.FACTS)
    return f"""# Paper and here

Every cell of the paper's tables, with every measurement of this build that stands beside it in a chapter, in percent with its interval where it is a rate; below them
what the paper's text says of its figures. An
asterisk marks an average that the paper's own rows do not give. *Not measured* means that no chapter of this build has a counterpart.

## Where the paper disagrees with itself

The numbers are quoted in this book as they are printed. In these places the paper says two things that cannot both be so.

{disagreements()}

## Every cell

```{{raw}} html
<p><label>Show rows with <input type="search" id="filter" placeholder="GCG, Deact-SN, MMLU …"></label> <span id="filter-count" role="status"></span></p>
<div class="scroll" tabindex="0" role="region" aria-label="Cells of the paper and of this build"><table class="dataframe" id="filtered">
<thead><tr><th scope="col">Table</th><th scope="col">Row</th><th scope="col">Column</th><th scope="col">Paper</th><th scope="col">Here</th></tr></thead>
<tbody>{rows}</tbody></table></div>
```
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
    head = f'<td>Figure {fact.figure}</td><th scope="row">{html.escape(fact.what)}</th>'
    return f"<tr>{head}<td>–</td><td>{html.escape(fact.model)}: {html.escape(fact.said)}</td><td>{here}</td></tr>\n"


def ledger(notebooks):
    """Every claim that the chapters judged, with its margin and its verdict; claims of chapters that are not in this build are left out."""
    judged = {
        key: (name, row)
        for name, notebook in notebooks.items()
        for key, row in executed.judged(notebook).items()
    }
    rows = "".join(
        _claim_row(claim, *judged[key]) for key, claim in load_claims().items() if key in judged
    )
    found = Counter(row["verdict"] for _, row in judged.values())
    tally = ", ".join(f"{count} {verdict}" for verdict, count in found.most_common())
    return f"""# Claims and verdicts

**Of {len(judged)} claims: {tally}.** Every claim that a chapter of this build judges, with what was found. Its effect and its margin, the smallest effect that would matter, were written down before the run.

```{{admonition}} One rule for every verdict
:class: note
An effect is a difference between two conditions that answered the same requests. Its 95 % interval is about other trainings of the model, other verbs or sums, and other random
draws than those measured. The claim is **seen** where the interval lies above the margin, **reversed** where it lies below minus the margin, **not seen** where it lies between the two,
and **undecided** otherwise. A set of neurons must also rank higher among random sets of its kind than chance allows. Claims of one chapter are corrected for their number (Holm 1979). *Partly seen*
means that some models say so and others do not. Where a model has one training, the verdict is about that training.
```

```{{raw}} html
<div class="scroll" tabindex="0" role="region" aria-label="Claims and verdicts"><table class="dataframe" id="ledger">
<thead><tr><th scope="col">Claim</th><th scope="col">Verdict</th><th scope="col">Number</th><th scope="col">Effect and margin</th><th scope="col">Ran on</th></tr></thead>
<tbody>{rows}</tbody></table></div>
```
"""


def _claim_row(claim, chapter, row):
    """A claim with its source, the verdict, the number to remember, effect and margin, and on what it ran."""
    margin = claim["margin"]
    effect = f"{claim['effect']}; margin {margin:g}" if margin else claim["effect"]
    cells = (
        badge_of(row["verdict"]),
        html.escape(row["number"]),
        html.escape(effect),
        html.escape(row["ran_on"]),
    )
    head = f'<a href="../notebooks/{chapter}.html">{html.escape(claim["claim"])}</a><br><small>{html.escape(claim["paper"])}</small>'
    return f'<tr><th scope="row">{head}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>\n'


def _cells(number):
    """(row, column) and the paper's cells of it, one per model, in the paper's order."""
    return reported.table(number).groupby(["row", "column"], sort=False)


def _row(number, key, group, found):
    printed = [
        (model, _printed(number, key, model, value))
        for model, value in group[["model", "value"]].itertuples(index=False)
    ]
    paper = "\n".join(f"{html.escape(model)}: {value}" for model, value in printed)
    here = "\n".join(_measured(name, cell) for name, cell in found) or "<em>not measured</em>"
    return f'<tr><td>Table {number}</td><th scope="row">{html.escape(key[0])}</th><td>{html.escape(key[1])}</td><td>{paper}</td><td>{here}</td></tr>\n'


def _printed(number, key, model, value):
    slip = reported.SLIPS.get((number, key[0], model, key[1]))
    return (
        "–"
        if value != value
        else f"{value:g}" + (f"* (its rows: {slip})" if slip is not None else "")
    )


def _measured(name, cell):
    text = cell["text"].replace("\n[", " [").replace("\n", "; range over draws ")
    way = f", {cell['way']}" if cell["way"] else ""
    return f'<a href="../notebooks/{name}.html">{html.escape(cell["model"] + way)}</a>: {html.escape(text)}'


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
  - models
  - dtype
  - device
  - seconds
  - commit
{rows}
```

Versions: {lists}
"""


def _status_row(name, notebook, run):
    names = ", ".join(f"`{model}`" for model in executed.models_of(notebook))
    cells = (
        f"[](../notebooks/{name}.ipynb)",
        names or "–",
        executed.parameters(notebook).get("dtype", "auto"),
        run.get("device", "–"),
        run.get("seconds", "–"),
        run.get("commit") or "–",
    )
    return "* - " + "\n  - ".join(str(cell) for cell in cells)
