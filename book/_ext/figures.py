"""Sphinx extension: every picture of a figure links to itself, so that a click, or Enter, shows it large."""

import re

PICTURE = re.compile(r'(<img [^>]*?src="((?:\.\./)*_images/[^"]+)"[^>]*>)')


def link_pictures(app, pagename, templatename, context, doctree):
    """Wrap the pictures of the page's body."""
    if "body" in context:
        context["body"] = PICTURE.sub(r'<a class="enlarge" href="\2">\1</a>', context["body"])


def setup(app):
    """Register the handler."""
    app.connect("html-page-context", link_pictures)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
