"""What the project promises not to do, looked up in its sources."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from safetyneuron import SafetyNeuronError
from safetyneuron.book import glue
from safetyneuron.chapters import ch00_organism

ROOT = Path(__file__).parent.parent
SOURCES = [
    *(ROOT / "safetyneuron").rglob("*.py"),
    *(ROOT / "workflow").rglob("*.py"),
    *(ROOT / "tests").rglob("*.py"),
]


def calls(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


def test_nothing_is_unpickled_evaluated_or_run_remotely():
    forbidden = {
        "eval",
        "exec",
        "pickle.load",
        "pickle.loads",
        "torch.load",
        "yaml.load",
        "yaml.unsafe_load",
        "joblib.load",
    }
    for path in SOURCES:
        for name, keywords in calls(path):
            assert name not in forbidden, f"{path}: {name}"
            assert not name.endswith((".extractall", ".extract", "unpack_archive")), (
                f"{path}: {name}"
            )  # no archive is unpacked, so none can name a place outside
            assert not {"trust_remote_code", "allow_pickle"} & keywords.keys(), path


def test_nothing_that_unpickles_is_imported_under_a_name_of_its_own():
    unpickles = {"pickle", "joblib", "dill", "shelve", "marshal"}
    for path in [path for path in SOURCES if path.parent.name != "tests"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not {alias.name for alias in node.names} & unpickles, path
            if isinstance(node, ast.ImportFrom):
                assert node.module not in unpickles, path
                assert not {alias.name for alias in node.names} & {"load", "unsafe_load"}, path


def test_only_exported_organisms_are_saved():
    saving = {
        path.name
        for path in SOURCES
        if path.parent.name != "tests"
        for name, _ in calls(path)
        if name.endswith("save_pretrained") and not name.startswith("tokenizer.")
    }
    assert saving == {"card.py"}


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda path: path.stem
)
def test_workflows_name_actions_by_commit_and_ask_for_little(path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert set(job.get("permissions", {})) <= {"pages", "id-token"}
        for step in job["steps"]:
            assert "uses" not in step or re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", step["uses"])


def test_every_test_that_the_security_page_names_exists():
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:tests|safetyneuron|workflow)/[\w./-]+)`", text)
    assert len(named) >= 8 and all((ROOT / name).is_file() for name in named)


def test_every_requirement_is_locked_to_a_version_that_it_allows():
    def read(name):
        return [
            line.split("#")[0].strip()
            for line in (ROOT / name).read_text(encoding="utf-8").splitlines()
        ]

    locked = {
        canonicalize_name(r.name): r
        for r in map(Requirement, filter(None, read("requirements.lock")))
    }
    assert len(locked) > 200 and all(
        re.fullmatch(r"==[\w.!+]+", str(r.specifier)) for r in locked.values()
    )
    for wanted in map(Requirement, filter(None, read("requirements.txt"))):
        (pin,) = locked[canonicalize_name(wanted.name)].specifier
        assert wanted.specifier.contains(pin.version, prereleases=True), wanted


def test_the_core_stands_alone(tmp_path):
    """Neurons, importance and tuning, copied with the ground floor into a project of someone's, work without the other rooms."""
    package = tmp_path / "safetyneuron"
    for room in ("neurons", "importance", "tuning"):
        shutil.copytree(ROOT / "safetyneuron" / room, package / room)
    for module in ("__init__", "errors", "cache", "code", "memory", "progress"):
        shutil.copy(ROOT / "safetyneuron" / f"{module}.py", package)
    modules = [
        ".".join(path.relative_to(tmp_path).with_suffix("").parts) for path in package.rglob("*.py")
    ]
    names = "NeuronSet, NeuronDelta, deactivate, measure_importance, patched_generation, screen, sn_tune"
    code = f"from importlib import import_module\nfor name in {modules}: import_module(name)\nfrom safetyneuron import {names}"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_only_answers_of_organisms_are_shown(monkeypatch):
    with pytest.raises(SafetyNeuronError, match="organisms only"):
        ch00_organism.told("meta-llama/Llama-2-7b-chat-hf", None, None, ["how ?"])
    shown = {}
    monkeypatch.setattr(glue, "glue_text", lambda **texts: shown.update(texts))
    glue.glue_examples("examples", "meta-llama/Llama-2-7b-chat-hf", ["how ?"], ["like this"])
    assert set(shown) == {"examples"} and "like this" not in shown["examples"]


@pytest.mark.parametrize("path", sorted(ROOT.glob("notebooks/*.ipynb")), ids=lambda p: p.stem)
def test_no_cell_ends_with_answers_and_no_call_takes_stars(path):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        body = ast.parse("".join(cell["source"])).body if cell["cell_type"] == "code" else []
        calls = [node for part in body for node in ast.walk(part) if isinstance(node, ast.Call)]
        assert not [a for call in calls for a in call.args if isinstance(a, ast.Starred)]
        assert not [k for call in calls for k in call.keywords if k.arg is None]
        shown = ast.walk(body[-1]) if body and isinstance(body[-1], ast.Expr) else ()
        names = {getattr(node.func, "id", "") for node in shown if isinstance(node, ast.Call)}
        assert not names & {"answers", "print"}
