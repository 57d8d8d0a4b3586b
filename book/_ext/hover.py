"""Sphinx extension: a link to the glossary carries the definition as its title, which browsers show on hover."""

from docutils import nodes

GLOSSARY = "book/glossary"


def definitions(app):
    """Anchor of a term to its definition in plain text."""
    items = app.env.get_doctree(GLOSSARY).findall(nodes.definition_list_item)
    return {
        anchor: " ".join(item[-1].astext().split())
        for item in items
        for term in item.findall(nodes.term)
        for anchor in term["ids"]
    }


def add_titles(app, doctree, docname):
    """Give every link to a term its definition."""
    if GLOSSARY not in app.env.found_docs:
        return
    found = definitions(app)
    for link in doctree.findall(nodes.reference):
        anchor = link.get("refuri", "").partition("glossary.html#")[2]
        if anchor in found:
            link["reftitle"] = found[anchor]


def setup(app):
    """Register the handler."""
    app.connect("doctree-resolved", add_titles)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
