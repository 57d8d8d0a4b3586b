"""Sphinx extension: the role {organism}`text` and the directive {organism} show a text only where its chapter ran on organisms.

A page that is no chapter names one: `:::{organism} 02_verification`.
"""

from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive

from safetyneuron.run import executed


def is_shown(environment, chapter=None):
    """Whether a chapter, by default the page that is being read, ran on organisms."""
    name = f"notebooks/{chapter}" if chapter else environment.docname
    path = Path(environment.srcdir) / f"{name}.ipynb"
    environment.note_dependency(str(path))
    return executed.on_organisms(executed.read(path))


def organism_text(name, rawtext, text, lineno, inliner, options=None, content=None):
    """A part of a sentence; more backticks around it let it hold roles of its own."""
    document = inliner.document
    if not is_shown(document.settings.env):
        return [], []
    return inliner.parse(text, lineno, None, inliner.parent)


class Organism(Directive):
    """Whole paragraphs."""

    has_content = True
    optional_arguments = 1

    def run(self):
        environment = self.state.document.settings.env
        if not is_shown(environment, *self.arguments):
            return []
        box = nodes.Element()
        self.state.nested_parse(self.content, self.content_offset, box)
        return box.children


def setup(app):
    """Register role and directive."""
    app.add_role("organism", organism_text)
    app.add_directive("organism", Organism)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
