"""Sphinx extension: the role {from}`chapter:name` shows a text that another chapter glued."""

from pathlib import Path

from docutils import nodes

from safetyneuron.run import executed


def glued_text(name, rawtext, text, lineno, inliner, options=None, content=None):
    """Look the text up in the executed chapter, so that the page is read again when the chapter changes."""
    environment = inliner.document.settings.env
    chapter, _, key = text.partition(":")
    path = Path(environment.srcdir) / "notebooks" / f"{chapter}.ipynb"
    environment.note_dependency(str(path))
    found = executed.texts(executed.read(path)) if path.is_file() else {}
    if key not in found:
        message = inliner.reporter.error(f"chapter {chapter!r} glues no text {key!r}", line=lineno)
        return [inliner.problematic(rawtext, rawtext, message)], [message]
    return [nodes.Text(found[key])], []


def setup(app):
    """Register the role."""
    app.add_role("from", glued_text)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
