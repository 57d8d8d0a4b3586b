"""Sphinx extension: the directive `{source} module.function` folds the code behind a call under it, with a link to the repository."""

import ast
import html
import inspect
from pathlib import Path

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

import safetyneuron

PACKAGE = Path(safetyneuron.__file__).parent


class Source(SphinxDirective):
    """Code of a function or class of the package, as it is in the build."""

    required_arguments = 1

    def run(self):
        """A folded block of code; its page is read again when the file changes."""
        module, _, name = self.arguments[0].rpartition(".")
        place = f"{module.replace('.', '/')}.py"
        try:
            first, lines = find_lines(PACKAGE.parent / place, name)
        except (OSError, LookupError):
            return [
                self.state_machine.reporter.error(
                    f"no code is called {self.arguments[0]!r}", line=self.lineno
                )
            ]
        self.env.note_dependency(str(PACKAGE.parent / place))
        code = nodes.literal_block("", inspect.cleandoc("\n" + "\n".join(lines)), language="python")
        start = f'<details class="source"><summary>The code of <code>{html.escape(name)}</code></summary>'
        link = self._link(place, first, len(lines))
        return [
            nodes.raw("", start, format="html"),
            code,
            nodes.raw("", f"{link}</details>", format="html"),
        ]

    def _link(self, place, first, count):
        """A link to the lines in the repository, where its address is known."""
        repository = self.config.source_repository
        where = f"{place}, line {first}"
        if not repository:
            return f'<p class="place">{where}</p>'
        address = f"{repository}/{place}#L{first}-L{first + count - 1}"
        return f'<p class="place"><a href="{address}">[source] {where}</a></p>'


def find_lines(file, name):
    """The first line, from 1, and the lines of a function or class with its decorators, found without running the file: that would import torch."""
    text = file.read_text(encoding="utf-8")
    for node in ast.parse(text).body:
        if getattr(node, "name", None) == name:
            first = min([node.lineno, *(mark.lineno for mark in node.decorator_list)])
            return first, text.splitlines()[first - 1 : node.end_lineno]
    raise LookupError(name)


def setup(app):
    """Register the directive, and the address of the files at the commit of the build."""
    app.add_config_value("source_repository", "", "env")
    app.add_directive("source", Source)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
