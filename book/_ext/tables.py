"""Sphinx extension: a glued table, whose label begins with `tab-`, is numbered as a table rather than as a figure."""

from docutils import nodes
from sphinx.transforms import SphinxTransform


class table_figure(nodes.figure):
    """A figure that holds a table."""


class NumberTables(SphinxTransform):
    """Make glued tables `table_figure`s before anything is numbered."""

    default_priority = 600

    def apply(self):
        """Replace the nodes, labels included."""
        for figure in list(self.document.findall(nodes.figure)):
            if any(name.startswith("tab-") for name in figure["names"]):
                table = table_figure(figure.rawsource, *figure.children, **figure.attributes)
                figure.replace_self(table)
                self.document.ids.update(dict.fromkeys(table["ids"], table))


def caption(node):
    """Text of a caption, for references."""
    return next((child.astext() for child in node if isinstance(child, nodes.caption)), "")


def setup(app):
    """Register the node and the transform."""
    app.add_enumerable_node(
        table_figure,
        "table",
        caption,
        html=(
            lambda self, node: self.visit_figure(node),
            lambda self, node: self.depart_figure(node),
        ),
    )
    app.add_transform(NumberTables)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
