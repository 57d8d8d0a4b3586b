"""Which code a result depends on: modules of this package and all that they import of it, read from their text without running it."""

import ast
from functools import cache
from pathlib import Path

from safetyneuron.cache import digest
from safetyneuron.errors import SafetyNeuronError

PACKAGE = Path(__file__).parent


def code_digest(*modules: str) -> str:
    """Hash of what modules of this package compute: their code and data, and those of all that they import of it.

    Imports inside functions count; comments, docstrings and the form of the text do not.

    Parameters
    ----------
    modules : str
        Full names, such as `safetyneuron.metrics.suite`.

    Raises
    ------
    SafetyNeuronError
        If a name is no module of this package.
    """
    found, waiting = {}, list(modules)
    while waiting:
        module = waiting.pop()
        if module not in found:
            found[module], imported = _read(module)
            waiting += imported
    return digest(sorted(found.items()))


def imports_in(tree: ast.AST) -> set:
    """Modules of this package that a parsed text imports from: where a name is written, not where it is handed on."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if _is_ours(alias.name)}
        elif isinstance(node, ast.ImportFrom) and _is_ours(node.module or ""):
            found |= {_home(node.module, alias.name) for alias in node.names}
    return found


def _is_ours(module):
    return module.partition(".")[0] == PACKAGE.name


@cache
def _read(module):
    """Hash of the code and data of a module, and what it imports. A process runs one version of a file: it is read once."""
    path = _path(module)
    if path is None:
        raise SafetyNeuronError(f"{module} is no module of {PACKAGE.name}: name one that is")
    tree = _tree(path)
    imported = imports_in(tree)
    if path.name == "__init__.py":  # who imports a package may use all that it hands on
        imported |= {_home(module, name) for name in _lazy(tree)}
    for node in ast.walk(tree):
        if _has_docstring(node):
            node.body[0].value.value = ""
    data = [[p.name, p.read_text(encoding="utf-8")] for p in sorted(path.parent.glob("*.yaml"))]
    return digest(ast.dump(tree), data), sorted(imported)


def _path(module):
    """The file of a module, or None."""
    place = PACKAGE.parent.joinpath(*module.split("."))
    paths = (place.with_suffix(".py"), place / "__init__.py")
    return next((path for path in paths if path.is_file()), None)


def _tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def _home(module, name):
    """The module behind `from module import name`: followed through packages that only hand the name on."""
    if _path(f"{module}.{name}"):
        return f"{module}.{name}"
    path = _path(module)
    if path is None or path.name != "__init__.py":
        return module
    tree = _tree(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if name == (alias.asname or alias.name) and _is_ours(node.module):
                    return _home(node.module, alias.name)
    lazy = _lazy(tree)
    return _home(f"{module}.{lazy[name]}", name) if name in lazy else module


def _lazy(tree):
    """What a package imports when it is first used: the literal `_HOMES`, from name to module."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_HOMES":
            return ast.literal_eval(node.value)
    return {}


def _has_docstring(node):
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None
