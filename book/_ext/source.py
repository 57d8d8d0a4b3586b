"""Sphinx extension: the directive `{source} module.function` folds the code behind a call under it, with a link to the repository."""

import html
import inspect
from importlib import import_module
from pathlib import Path

from docutils import nodes
from sphinx.util.docutils import SphinxDirective


class Source(SphinxDirective):
    """Code of a function or class of the package, as it is in the build."""

    required_arguments = 1

    def run(self):
        """A folded block of code; its page is read again when the file changes."""
        module, _, name = self.arguments[0].rpartition(".")
        try:
            found = getattr(import_module(module), name)
        except (ImportError, AttributeError, ValueError):
            return [
                self.state_machine.reporter.error(
                    f"no code is called {self.arguments[0]!r}", line=self.lineno
                )
            ]
        lines, first = inspect.getsourcelines(found)
        file = Path(inspect.getsourcefile(found))
        self.env.note_dependency(str(file))
        place = f"{found.__module__.replace('.', '/')}.py"
        code = nodes.literal_block("", inspect.cleandoc("\n" + "".join(lines)), language="python")
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


def setup(app):
    """Register the directive, and the address of the files at the commit of the build."""
    app.add_config_value("source_repository", "", "env")
    app.add_directive("source", Source)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
