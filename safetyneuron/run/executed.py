"""What a run leaves in its executed notebook beside its outputs: how it was run, and its cells of the paper's tables."""

import ast
import base64
import json
import subprocess
from functools import lru_cache
from importlib.metadata import version

import nbformat

from safetyneuron.run.editions import models_in

PACKAGES = ("torch", "transformers", "peft", "trl", "lm_eval", "papermill", "jupyter-book")


def read(path):
    """An executed notebook, parsed once until its file changes: to look at, not to change."""
    return _read(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=32)
def _read(path, changed):
    return nbformat.read(path, 4)


def record(path, seconds):
    """Write device, versions, commit and seconds into the metadata of an executed notebook."""
    import torch  # here, because the command line must answer without it

    notebook = nbformat.read(path, 4)
    threads = torch.get_num_threads()
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    )
    notebook.metadata["safetyneuron"] = {
        "seconds": round(seconds),
        "device": device,
        "commit": _commit(),
        "versions": {name: version(name) for name in PACKAGES},
    }
    nbformat.write(notebook, path)


def _commit():
    """Short hash of the commit, with + where the working tree differs; empty outside a repository."""
    result = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--abbrev=10"], capture_output=True, text=True
    )
    return result.stdout.strip()


def how(notebook):
    """Seconds, device, commit, versions and parameters of an executed notebook."""
    given = notebook.metadata.get("papermill", {}).get("parameters", {})
    return dict(notebook.metadata.get("safetyneuron", {})) | {"parameters": dict(given)}


def parameters(notebook):
    """The parameters with which a notebook was executed."""
    found = {}
    for cell in notebook.cells:
        if {"parameters", "injected-parameters"} & set(cell.metadata.get("tags", [])):
            statements = ast.parse(cell.source).body
            found |= {
                s.targets[0].id: ast.literal_eval(s.value)
                for s in statements
                if isinstance(s, ast.Assign)
            }
    return found


def models_of(notebook):
    """Names of the models that a notebook was executed on."""
    return models_in(parameters(notebook))


def on_organisms(notebook):
    """Whether a notebook was executed on organisms."""
    return any(name.startswith("organism/") for name in models_of(notebook))


def texts(notebook):
    """Every text that the notebook glued, name to text."""
    found = {name.rpartition("/")[2]: data for name, data in _glued(notebook, "text/plain")}
    return {
        name: ast.literal_eval(data) for name, data in found.items() if data.startswith(("'", '"'))
    }


def comparisons(notebook):
    """Cells that the notebook's tables set beside the paper's: a list of {table, row, column, model, way, text}."""
    return [
        cell
        for name, text in texts(notebook).items()
        if name.startswith("cells-")
        for cell in json.loads(text)
    ]


def data(notebook):
    """The numbers behind the notebook's tables and figures, name to CSV, and every other glued text as `values`."""
    found = texts(notebook)
    values = {
        name: text
        for name, text in found.items()
        if not name.startswith(("cells-", "csv-", "drawn-", "check_", "narrow-"))
    }
    return tables(found), values


def tables(found):
    """The numbers behind tables and figures among glued texts, name to CSV: those given, else those read from the drawing."""
    given = {}
    for kind in ("drawn-", "csv-"):
        given |= {n.removeprefix(kind): text for n, text in found.items() if n.startswith(kind)}
    return given


def judged(notebook):
    """What a chapter found of its claims: key to {key, verdict, number, ran_on}."""
    return {row["key"]: row for row in json.loads(texts(notebook).get("ledger", "[]"))}


def picture(notebook, *names):
    """The PNG that a notebook glued under the first of these names that it has, as bytes."""
    found = dict(_glued(notebook, "image/png"))
    return base64.b64decode(next(found[name] for name in names if name in found))


def _glued(notebook, kind):
    """Name and content of everything glued that has content of one kind."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            name = output.get("metadata", {}).get("scrapbook", {}).get("name")
            yield from (
                (name, data)
                for key, data in output.get("data", {}).items()
                if name and key.endswith(kind)
            )
