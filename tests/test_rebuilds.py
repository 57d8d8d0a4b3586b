"""What a change makes a build run again, by the plan of a build whose outputs are all there. That a change recomputes no score is held in test_keys."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, copy_repository

CHAPTERS = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}


def plan(copy):
    """What the next build of the small edition would make: names of chapters, `site`, `playground`."""
    snakemake = Path(sys.executable).with_name("snakemake")
    edition = ["-s", "workflow/Snakefile", "--configfile", "workflow/editions/smoke.yaml"]
    command = [snakemake, *edition, "--cores", "1", "--dry-run", "--rerun-triggers", "mtime"]
    result = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    made = re.findall(r"output: (_build/\S+)", result.stdout + result.stderr)
    return {"site" if path.endswith("index.html") else Path(path).stem for path in made}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A copy of the repository with an empty file in the place of every output."""
    copy = tmp_path_factory.mktemp("built") / "repository"
    copy_repository(copy, "*.safetensors")
    assert plan(copy) == CHAPTERS | {"site", "playground", "runtime", "handout", "neurons"}
    stage = copy / "_build" / "stage" / "smoke"
    for folder in ("playground", "runtime"):
        (stage / "book" / "_static" / folder).mkdir(parents=True)
        (stage / "book" / "_static" / folder / ".snakemake_timestamp").touch()
    (stage / "book" / "_static" / "handout.zip").touch()
    (stage / "book" / "neurons.md").touch()
    (stage / "notebooks").mkdir()
    for name in CHAPTERS:
        (stage / "notebooks" / f"{name}.ipynb").touch()
    (copy / "_build" / "html").mkdir()
    (copy / "_build" / "html" / "index.html").touch()
    assert not plan(copy)
    return copy


def planned(copy, path, change):
    """The plan with one file changed; afterwards that file and what the plan wrote are as they were, older than all outputs."""
    stage, kept = copy / "_build" / "stage" / "smoke", copy.parent / "kept"
    file, before = copy / path, (copy / path).read_text("utf-8")
    for name in ("code", "parameters"):
        shutil.copytree(stage / name, kept / name, dirs_exist_ok=True)
    try:
        file.write_text(change(before))
        return plan(copy)
    finally:
        file.write_text(before)
        os.utime(file, (0, 0))
        shutil.copytree(kept, stage, dirs_exist_ok=True)


@pytest.mark.parametrize(
    "path, expected",
    [
        ("chapters/ch03_mechanism.py", {"03_mechanism"}),
        ("book/plots.py", CHAPTERS),
        (
            "detectors/change_scores.py",
            {
                "09_activation_contrast",
                "10_comparison",
                "11_answer_key",
                "playground",
                "handout",
                "neurons",
            },
        ),
        ("cli.py", set()),
    ],
)
def test_a_change_of_code_runs_the_chapters_that_import_it_and_no_others(built, path, expected):
    found = planned(built, f"safetyneuron/{path}", lambda text: text + "\nADDED = 1\n")
    assert found == expected | {"site"}  # whose pages show code


def test_a_changed_parameter_or_notebook_runs_its_own_chapter_and_no_other(built):
    def one_more(text):
        edition = yaml.safe_load(text)
        edition["notebooks"]["01_detection"]["n_detect"] += 1
        return yaml.safe_dump(edition)

    def other_words(text):
        notebook = json.loads(text)
        notebook["cells"][0]["source"] = ["# Other words"]
        return json.dumps(notebook)

    wanted = {"01_detection", "site"}
    assert planned(built, "workflow/editions/smoke.yaml", one_more) == wanted
    assert planned(built, "notebooks/01_detection.ipynb", other_words) == wanted


def test_the_command_of_the_readme_plans_a_whole_book_with_or_without_solutions(tmp_path):
    copy_repository(tmp_path, "*.safetensors")
    shutil.copy(ROOT / "Makefile", tmp_path)
    venv = Path(sys.executable).parent.parent
    command = ["make", "--dry-run", "book", f"VENV={venv}", "-o", venv / "installed"]
    plans = {}
    for solutions in ("yes", "no", "perhaps"):
        told = subprocess.run([*command, f"SOLUTIONS={solutions}"], cwd=tmp_path, capture_output=True, text=True)  # fmt: skip
        line = next(line for line in told.stdout.splitlines() if "snakemake" in line)
        line = line.partition(" || ")[0]  # what it says where that fails comes behind
        plan = subprocess.run(f"{line} --dry-run", shell=True, cwd=tmp_path, capture_output=True, text=True)  # fmt: skip
        plans[solutions] = plan.returncode
        if solutions == "perhaps":
            assert "SOLUTIONS is 'perhaps': use yes or no" in plan.stderr
        else:
            kept = json.loads((tmp_path / "_build/stage/organism/code/solutions.json").read_text())
            assert kept == (solutions == "yes")
    assert plans["yes"] == plans["no"] == 0 != plans["perhaps"]


def test_other_organisms_run_every_chapter(built):
    path = "safetyneuron/organism/weights/manifest.json"
    found = planned(built, path, lambda text: text + "\n")
    assert found == CHAPTERS | {"site", "playground", "handout", "neurons"}
