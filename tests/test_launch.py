"""What the launch buttons start. Binder: its files, a Jupyter server in the repository, and the notebook at the button's address. Colab: the first cell."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
import urllib.request
import venv
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT

HERE = Path(sys.executable).parent
ADDRESS = "lab/tree/notebooks/01_detection.ipynb"  # as the button has it, behind `urlpath=`
FIRST = 4  # cells of code that are run: Colab's, parameters, imports, and the first that measures
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
RUN = """
import sys, nbformat
from nbclient import NotebookClient

notebook = nbformat.reads(sys.stdin.read(), 4)
code = [i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
notebook.cells = notebook.cells[: code[int(sys.argv[1]) - 1] + 1]
NotebookClient(notebook, timeout=300, resources={"metadata": {"path": "notebooks"}}).execute()
print(nbformat.writes(notebook))
"""


def start(programs, repository, log):
    """A Jupyter server in the repository as Binder starts one: its process and address, with a slash."""
    command = [programs / "jupyter-lab", "--no-browser", "--allow-root", "--port=0"]
    command += ["--ServerApp.port_retries=0", "--IdentityProvider.token="]
    with open(log, "w") as said:
        process = subprocess.Popen(command, cwd=repository, stdout=said, stderr=said)
    until = time.monotonic() + 120
    while not (found := re.search(r"http://(?:localhost|127.0.0.1):\d+/", log.read_text())):
        assert process.poll() is None and time.monotonic() < until, log.read_text()
        time.sleep(0.2)
    return process, found[0]


def open_notebook(server):
    """The notebook at the address of the button, as the server gives it."""
    assert urllib.request.urlopen(server + ADDRESS).status == 200
    inside = ADDRESS.removeprefix("lab/tree/")
    contents = json.load(urllib.request.urlopen(f"{server}api/contents/{inside}"))
    return json.dumps(contents["content"])


def run_first_cells(programs, repository, log):
    """The notebook of the button with its first cells run, by the programs of an environment."""
    process, server = start(programs, repository, log)
    try:
        notebook = open_notebook(server)
    finally:
        process.terminate()
        process.wait(30)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        [programs / "python", "-c", RUN, str(FIRST)],
        cwd=repository,
        input=notebook,
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PATH": path},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return nbformat.reads(result.stdout, 4)


def check_run(notebook):
    """The last cells ran and said something, and none of them complained."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, FIRST + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)


def test_launch_installs_the_package_at_the_versions_of_the_lock():
    lines = (ROOT / "binder" / "requirements.txt").read_text(encoding="utf-8").split("\n")
    given = dict(line.split() for line in lines if line)
    assert given["-e"] == "."  # of the folder in which pip runs
    assert (ROOT / "binder" / given["-c"]).resolve() == ROOT / "requirements.lock"
    version = (ROOT / "binder" / "runtime.txt").read_text(encoding="utf-8").strip()
    assert version == f"python-{sys.version_info.major}.{sys.version_info.minor}"


@pytest.mark.book
def test_the_notebook_of_the_button_runs_in_the_environment_of_the_book(tmp_path):
    check_run(run_first_cells(HERE, ROOT, tmp_path / "log"))


@pytest.mark.binder
def test_the_notebook_of_the_button_runs_in_what_binder_installs(tmp_path):
    repository = tmp_path / "book"
    left_out = shutil.ignore_patterns("_build", ".*", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, repository, ignore=left_out)
    venv.create(tmp_path / "venv", with_pip=True)
    programs = tmp_path / "venv" / "bin"
    install = [programs / "pip", "install", "--quiet", "--no-cache-dir"]
    subprocess.run([*install, "-r", "binder/requirements.txt"], cwd=repository, check=True)
    check_run(run_first_cells(programs, repository, tmp_path / "log"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
@pytest.mark.parametrize("where", ["elsewhere", "known", "asked"])
def test_the_first_cell_installs_the_package_on_colab_and_nothing_elsewhere(
    path, where, tmp_path, monkeypatch
):
    installed, address = [], "https://github.com/example/book"
    monkeypatch.setattr(subprocess, "check_call", installed.append)
    monkeypatch.setattr("builtins.input", lambda _: address)
    monkeypatch.delenv("BOOK_REPOSITORY", raising=False)
    if where != "elsewhere":
        monkeypatch.setitem(sys.modules, "google.colab", object())
    if where == "known":
        monkeypatch.setenv("BOOK_REPOSITORY", f"{address}s")
        address += "s"
    cells = nbformat.read(path, 4).cells
    first = next(cell for cell in cells if cell.cell_type == "code")
    assert "remove-cell" in first.metadata.tags  # the pages do not show it
    (tmp_path / "cell.py").write_text(first.source, encoding="utf-8")
    runpy.run_path(str(tmp_path / "cell.py"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", f"git+{address}"]
    assert installed == ([] if where == "elsewhere" else [pip])


STUB = """#!/bin/sh
echo "$0 $* [$UV_INDEX_URL] [$UV_EXTRA_INDEX_URL] [$UV_FIND_LINKS]" >> calls
case "$*" in
config*) printf '%s\\n' ":env:.find-links='/mine'" "global.find-links='/ours'" "global.index-url='https://a/simple'" ;;
pip*) exit "${UV_FAILS:-0}" ;;
*" uv") exit "${NO_UV:-0}" ;;
esac
"""


@pytest.mark.parametrize("lacking", ["", "UV_FAILS", "NO_UV"])
def test_uv_installs_where_pip_is_told_to_look_and_pip_where_uv_cannot(tmp_path, lacking):
    (tmp_path / "bin").mkdir()
    for name in ("pip", "uv"):
        (tmp_path / "bin" / name).write_text(STUB)
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("UV_")}
    command = ["sh", ROOT / "workflow" / "install.sh", tmp_path]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment | {lacking or "UV": "1"})
    calls = (tmp_path / "calls").read_text().replace(f"{tmp_path}/bin/", "").splitlines()
    packages = "-r requirements.txt -c requirements.lock -e ."
    told = "[https://a/simple] [] [/mine,/ours]"
    begun = ["pip config list", "pip install --quiet -c requirements.lock uv"]
    assert [call.split(" [")[0] for call in calls[:2]] == begun
    by_uv = [call for call in calls if call.startswith("uv pip install")]
    assert all(call.endswith(f"{packages} {told}") for call in by_uv)
    assert len(by_uv) == (lacking != "NO_UV")
    by_pip = [call for call in calls[2:] if call.startswith(f"pip install --quiet {packages}")]
    assert len(by_pip) == bool(lacking) and len(calls) == 2 + len(by_uv) + len(by_pip)
