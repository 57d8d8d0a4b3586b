"""Sphinx extension: every picture of a figure links to itself, so that a click, or Enter, shows it large."""

import re

PICTURE = re.compile(r'(?<!">)(<img [^>]*?src="((?:\.\./)*_images/[^"]+)"[^>]*>)')
SCALED = (
    'class="reference internal image-reference"'  # Sphinx links a picture of a given width already
)


def link_pictures(app, pagename, templatename, context, doctree):
    """Wrap the pictures of the page's body."""
    if "body" in context:
        body = context["body"].replace(SCALED, 'class="enlarge"')
        context["body"] = PICTURE.sub(r'<a class="enlarge" href="\2">\1</a>', body)


def setup(app):
    """Register the handler."""
    app.connect("html-page-context", link_pictures)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
