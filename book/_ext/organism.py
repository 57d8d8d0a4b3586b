"""Sphinx extension: what a page says of its own run.

The role {organism}`text` and the directive {organism} show a text only where its chapter ran on organisms; a page that is no
chapter names one: `:::{organism} 02_verification`. In {ran}`text` stands the time that the chapter took in the place of `…`.
"""

from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive

from safetyneuron.run import executed


def run_of(environment, chapter=None):
    """The executed notebook of a chapter, by default of the page that is being read."""
    name = f"notebooks/{chapter}" if chapter else environment.docname
    path = Path(environment.srcdir) / f"{name}.ipynb"
    environment.note_dependency(str(path))
    return executed.read(path)


def is_shown(environment, chapter=None):
    """Whether a chapter ran on organisms."""
    return executed.on_organisms(run_of(environment, chapter))


def organism_text(name, rawtext, text, lineno, inliner, options=None, content=None):
    """A part of a sentence; more backticks around it let it hold roles of its own."""
    document = inliner.document
    if not is_shown(document.settings.env):
        return [], []
    return inliner.parse(text, lineno, None, inliner.parent)


def time_text(name, rawtext, text, lineno, inliner, options=None, content=None):
    """A sentence with the time that the page's run took: seconds, or minutes where they are many."""
    seconds = executed.how(run_of(inliner.document.settings.env)).get("seconds", 0)
    said = f"{seconds} seconds" if seconds < 100 else f"{round(seconds / 60)} minutes"
    return [nodes.inline(rawtext, text.replace("…", said))], []


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
    """Register the roles and the directive."""
    app.add_role("organism", organism_text)
    app.add_role("ran", time_text)
    app.add_directive("organism", Organism)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
