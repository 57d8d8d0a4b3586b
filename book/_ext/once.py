"""Sphinx extension: repairs of what other extensions write: inline scripts twice, and a list role without items."""


def keep_first(app, pagename, templatename, context, doctree):
    """Drop scripts whose body has been seen on this page."""
    seen, kept = set(), []
    for script in context.get("script_files", []):
        body = getattr(script, "attributes", {}).get("body")
        if body is None or body not in seen:
            kept.append(script)
        seen.add(body)
    context["script_files"] = kept
    if "body" in context:  # a list whose items are none, in the words of assistive technology
        context["body"] = context["body"].replace(
            '<div role="list" class="citation-list">', '<div class="citation-list">'
        )


def setup(app):
    """Register the handler after all others."""
    app.connect("html-page-context", keep_first, priority=1000)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
