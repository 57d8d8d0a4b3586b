"""Sphinx extension: the role {check}`name` asks for a guess and holds it against what this chapter glued as `name`; {open}`name` asks for sentences."""

import html
from pathlib import Path

from docutils import nodes

from safetyneuron.run import executed

FRAME = '<span class="check" data-name="{name}"{answer}>{inside}<span role="status"></span></span>'
GUESS = '<label>Your guess, before you look: <input type="text" autocomplete="off"></label> '
BUTTONS = (
    '<button type="button" class="ask">Check</button> <button type="button" class="show">Show the value</button> '
    '<span class="value">Value: {answer}.</span>'
)
SENTENCES = '<label>Your answer, in a few sentences; only this browser keeps it:<textarea rows="4"></textarea></label> '


def ask_guess(role, rawtext, name, lineno, inliner, options=None, content=None):
    """A box for a guess, with the value of the run to check it; without the value where the solutions are left out."""
    environment = inliner.document.settings.env
    path = Path(environment.doc2path(environment.docname))
    found = executed.texts(executed.read(path))
    if name not in found and environment.config.show_solutions:
        message = inliner.reporter.error(f"this chapter reveals no {name!r}", line=lineno)
        return [inliner.problematic(rawtext, rawtext, message)], [message]
    if name not in found:
        return [_raw(name, "", GUESS)], []
    answer = html.escape(found[name])
    return [_raw(name, f' data-answer="{answer}"', GUESS + BUTTONS.format(answer=answer))], []


def ask_sentences(role, rawtext, name, lineno, inliner, options=None, content=None):
    """A box for sentences."""
    return [_raw(name, "", SENTENCES)], []


def _raw(name, answer, inside):
    text = FRAME.format(name=html.escape(name), answer=answer, inside=inside)
    return nodes.raw("", text, format="html")


def setup(app):
    """Register the roles, and whether the solutions are in the book."""
    app.add_config_value("show_solutions", True, "env")
    app.add_role("check", ask_guess)
    app.add_role("open", ask_sentences)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
