"""Sphinx extension: the directive {findings} lists what the chapters of this build found, one line a claim."""

from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList

from safetyneuron.book.claims import load_claims, say_finding
from safetyneuron.run import executed


class Findings(Directive):
    """Each line of the content is the key of a claim: what was found, with a link to its chapter; a claim that this build does not judge is left out."""

    has_content = True

    def run(self):
        environment = self.state.document.settings.env
        lines = []
        for key in self.content:
            if key not in load_claims():
                raise self.error(f"no claim is called {key!r}")
            chapter = load_claims()[key]["chapter"]
            path = Path(environment.srcdir) / "notebooks" / f"{chapter}.ipynb"
            environment.note_dependency(str(path))
            rows = executed.judged(executed.read(path))
            if key not in rows:
                continue
            link = f"[chapter {chapter.partition('_')[0]}](../notebooks/{chapter}.ipynb)"
            lines.append(say_finding(key, rows[key]["verdict"], f"{rows[key]['number']}; {link}"))
        box = nodes.container(classes=["findings"])
        self.state.nested_parse(StringList(lines, source=""), self.content_offset, box)
        return [box]


def setup(app):
    """Register the directive."""
    app.add_directive("findings", Findings)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
