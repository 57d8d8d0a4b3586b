"""Sphinx extension: figures of a chapter link to themselves, so that a click, or Enter, shows them large; on a narrow screen their panels stand below each other; their numbers are folded below."""

import csv
import html
import io
import re
from pathlib import Path

from safetyneuron.run import executed

PICTURE = re.compile(r'(?<!">)(<img [^>]*?src="((?:\.\./)*_images/[^"]+)"[^>]*>)')
SCALED = (
    'class="reference internal image-reference"'  # Sphinx links a picture of a given width already
)
GLUED = re.compile(r"\{glue:figure\} (\S+)\n:name: (\S+)")
FIGURE = re.compile(r'<figure [^>]*id="([\w-]+)".*?</figure>', re.S)
MOST_ROWS = 60  # of a table in the page; the file holds all


def dress_figures(app, pagename, templatename, context, doctree):
    """Wrap the pictures of the page's body, and add below every glued figure and table what was glued with it."""
    if "body" not in context:
        return
    body = context["body"].replace(SCALED, 'class="enlarge"')
    body = PICTURE.sub(r'<a class="enlarge" href="\2">\1</a>', body)
    path = Path(app.srcdir) / f"{pagename}.ipynb"
    if path.is_file():
        chapter = executed.read(path)
        names = {
            label: name for cell in chapter.cells for name, label in GLUED.findall(cell.source)
        }
        page = Page(app.outdir, pagename, executed.texts(chapter))
        body = FIGURE.sub(lambda found: page.dress(names.get(found[1]), found), body)
    context["body"] = body


class Page:
    """A page that is being written: where its files go, and the texts that its chapter glued."""

    def __init__(self, site, pagename, texts):
        self.site, self.texts, self.chapter = Path(site), texts, Path(pagename).name
        self.tables = executed.tables(texts)
        self.up = "../" * pagename.count("/")

    def dress(self, name, found):
        """A figure or table, given as a match, with all that belongs to the glued `name`."""
        figure = found[0]
        if f"narrow-{name}" in self.texts:
            file = f"{self.chapter}-{name}-narrow.svg"
            link = self._write("_images", file, self.texts[f"narrow-{name}"])
            source = f'<source media="(max-width: 600px)" srcset="{link}">'
            figure = re.sub(r"<img [^>]*>", rf"<picture>{source}\g<0></picture>", figure, count=1)
        if name in self.tables:
            figure += self._fold(found[1], name, self.tables[name])
        return figure

    def _write(self, folder, file, text):
        (self.site / folder).mkdir(exist_ok=True)
        (self.site / folder / file).write_text(text, encoding="utf-8")
        return f"{self.up}{folder}/{file}"

    def _fold(self, label, name, text):
        """A link to the CSV; of a figure in a folded table."""
        link = self._write("_downloads", f"{self.chapter}-{name}.csv", text)
        if label.startswith("tab-"):
            return f'<p class="data"><a download href="{link}">This table as CSV</a></p>'
        head, *rows = csv.reader(io.StringIO(text, newline=""))
        shown = "".join(_row(row, "td") for row in rows[:MOST_ROWS])
        more = f"The first {MOST_ROWS} of {len(rows)} rows. " if len(rows) > MOST_ROWS else ""
        return f"""<details class="data"><summary>The data of this figure as a table</summary>
<div class="scroll" tabindex="0" role="region" aria-label="The data of figure {name}"><table class="dataframe">
<thead>{_row(head, "th")}</thead><tbody>{shown}</tbody></table></div>
<p>{more}<a download href="{link}">All as CSV</a></p></details>"""


def _row(cells, tag):
    scope = ' scope="col"' if tag == "th" else ""
    return (
        "<tr>"
        + "".join(f"<{tag}{scope}>{html.escape(_short(cell))}</{tag}>" for cell in cells)
        + "</tr>"
    )


def _short(cell):
    """A number in four digits; anything else as it is."""
    return f"{float(cell):.4g}" if re.fullmatch(r"-?\d+\.\d{4,}(e-?\d+)?", cell) else cell


def setup(app):
    """Register the handler."""
    app.connect("html-page-context", dress_figures)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
