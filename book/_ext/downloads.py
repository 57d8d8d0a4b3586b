"""Sphinx extension: a line at the foot of every chapter with the notebook and its data."""

from pathlib import PurePosixPath


def add_downloads(app, pagename, templatename, context, doctree):
    """Append the line to pages under notebooks/."""
    name = PurePosixPath(pagename)
    if name.parent.name != "notebooks" or "body" not in context:
        return
    context["body"] += (
        f'<p class="downloads">Download this chapter: <a download href="../_sources/notebooks/{name.name}.ipynb">the notebook as it was run</a>, '
        f'<a download href="../_static/data/{name.name}.zip">its tables and figures as CSV</a>.</p>'
    )


def setup(app):
    """Register the handler."""
    app.connect("html-page-context", add_downloads)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
