import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from safetyneuron import SafetyNeuronError, load_model, load_prompts
from safetyneuron.cli import main
from safetyneuron.run.execute import few_threads

ROOT = Path(__file__).parent.parent


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "safetyneuron.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


def notebook(path, *cells, tagged=True):
    book = nbformat.v4.new_notebook(
        metadata={
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}
        }
    )
    book.cells = [nbformat.v4.new_code_cell(text) for text in cells]
    if tagged:
        book.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(book, path)
    return path


PARAMETERS = 'fraction = 0.01  # share\nfractions = [0.1]  # shares\nn = 3  # count\nname = "a"  # a name\nnames = ["a"]  # some\nrate = 1e-6  # of learning\ntest_sets = ["organism/harmful"]  # to ask'


def test_params_lists_names_defaults_and_help():
    result = command("params", "notebooks/02_verification.ipynb")
    assert result.returncode == 0
    assert "fraction = 0.01    # share of neurons to deactivate" in result.stdout


def test_run_executes_with_the_given_parameters(tmp_path):
    source = notebook(
        tmp_path / "a.ipynb", PARAMETERS, "print(fraction * n, name, names, rate, fractions)"
    )
    result = command(
        "run",
        source,
        "-p",
        "n=4",
        "-p",
        "rate=2e-6",
        "-p",
        "names=[x, y]",
        "-p",
        "fractions=[0.2, 1]",
        "-o",
        tmp_path / "out" / "b.ipynb",
    )
    assert result.returncode == 0, result.stderr
    assert "0.04 a ['x', 'y'] 2e-06 [0.2, 1]" in (tmp_path / "out" / "b.ipynb").read_text()
    assert "outputs" in source.read_text() and "0.04" not in source.read_text()


def test_organisms_alone_run_on_one_thread_unless_told(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with few_threads({"models": ["organism/a", "organism/b"], "n": 3}):
        assert os.environ["OMP_NUM_THREADS"] == "1"
    for parameters in ({"models": ["organism/a", "x/y"]}, {"model_name": "x/y"}, {"n": 3}):
        with few_threads(parameters):
            assert "OMP_NUM_THREADS" not in os.environ
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    with few_threads({"model_name": "organism/a"}):
        assert os.environ["OMP_NUM_THREADS"] == "4"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["-p", "fractoin=0.1"], "has no parameter 'fractoin': it has fraction, fractions, n"),
        (["-p", "n=many"], "give a whole number"),
        (["-p", "n=0.5"], "give a whole number"),
        (["-p", "name=3"], "give a text"),
        (["-p", "fraction=0"], "must be in (0, 1]"),
        (["-p", "fraction=1.5"], "must be in (0, 1]"),
        (["-p", "fractions=[0.1, 2]"], "must be in (0, 1]"),
        (["-p", "fraction"], "is not NAME=VALUE"),
        (["-p", "test_sets=[organism/harmful, mine.txt]"], "names mine.txt, and there is no such"),
        (["-f", "nowhere.yaml"], "cannot be read"),
        (["-p", "n=7"], "stopped with ValueError: seven"),
    ],
)
def test_bad_parameters_give_one_line_and_no_file(tmp_path, arguments, words):
    source = notebook(tmp_path / "a.ipynb", PARAMETERS, "if n == 7: raise ValueError('seven')")
    result = command("run", source, *arguments, "-o", tmp_path / "out.ipynb")
    assert result.returncode == 2
    assert words in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.ipynb"]


def test_notebooks_that_are_none_are_refused(tmp_path):
    (tmp_path / "text.ipynb").write_text("hello")
    untagged = notebook(tmp_path / "untagged.ipynb", "x = 1", tagged=False)
    for path, words in [
        (tmp_path / "text.ipynb", "is not a notebook"),
        (untagged, "no cell tagged"),
        (tmp_path / "no.ipynb", "there is no notebook"),
    ]:
        result = command("run", path)
        assert (
            result.returncode == 2 and words in result.stderr and "Traceback" not in result.stderr
        )


def test_unknown_models_are_refused_in_one_line(tmp_path):
    for call, words in [
        (lambda: load_model("organism/llama-chatty"), "organism/llama-base, organism/llama-chat"),
        (lambda: load_model("nobody/no-such-model"), "cannot load model 'nobody/no-such-model'"),
        (lambda: load_model(str(tmp_path)), "cannot load model"),
        (lambda: load_model("organism/llama-chat", dtype="float33"), "use float32"),
        (lambda: load_model("organism/llama-chat", device="cuda:9"), "cannot be used"),
        (lambda: load_model("organism/llama-chat", device="toaster"), "cannot be used"),
    ]:
        with pytest.raises(SafetyNeuronError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_prompt_files(tmp_path):
    (tmp_path / "p.txt").write_text("one\n\n two \n", encoding="utf-8-sig")
    (tmp_path / "p.csv").write_text('goal,target\n"a, b",x\n', encoding="utf-8")
    (tmp_path / "p.jsonl").write_text('{"prompt": "ciao"}\n', encoding="utf-8")
    assert load_prompts(str(tmp_path / "p.txt")) == ["one", "two"]
    assert load_prompts(str(tmp_path / "p.csv")) == ["a, b"]
    assert load_prompts(str(tmp_path / "p.jsonl")) == ["ciao"]


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("empty.txt", b"\n\n", "is empty"),
        ("latin.txt", "perché".encode("latin-1"), "save it as UTF-8"),
        ("wrong.csv", b"a,b\n1,2\n", "has no column"),
        ("wrong.jsonl", b"{not json}\n", "cannot be read"),
        ("wrong.xlsx", b"PAR1", "must end in"),
    ],
)
def test_bad_prompt_files_are_refused_in_one_line(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SafetyNeuronError, match=words) as caught:
        load_prompts(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_unknown_sets_splits_and_languages_are_refused():
    for arguments, words in [
        (("organism/nice",), "no prompt set is called"),
        (("organism/benign", "dev"), "unknown split"),
        (("organism/benign", "test", "fr"), "unknown language"),
    ]:
        with pytest.raises(SafetyNeuronError, match=words):
            load_prompts(*arguments)


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """What the command asks to be trained and measured, which would take minutes: names and folders."""
    asked = []
    monkeypatch.setenv("SAFETYNEURON_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "safetyneuron.organism.stages.train_organism",
        lambda *arguments: asked.append(arguments),
        raising=False,
    )
    monkeypatch.setattr(
        "safetyneuron.metrics.shortfalls.note_measures",
        lambda name, folder: ["correct on harmful vi: 93.5 %, bar 95 %"] * ("base" in name),
    )
    return asked


def test_training_goes_into_the_cache_unless_a_folder_is_told(trained, tmp_path, capsys):
    assert main(["train", "organism/llama-chat@3"]) == 0
    said = capsys.readouterr().out
    assert f"SAFETYNEURON_ORGANISMS={tmp_path / 'cache' / 'organism'}" in said
    assert "misses a bar" not in said
    assert main(["train", "organism/llama-base", "-o", "own"]) == 0
    assert "misses a bar: correct on harmful vi: 93.5 %, bar 95 %\n" in capsys.readouterr().out
    assert trained == [
        ("organism/llama-chat@3", tmp_path / "cache" / "organism"),
        ("organism/llama-base", tmp_path / "own"),
    ]


def test_exports_of_unknown_organisms_and_into_full_folders_are_refused_in_one_line(tmp_path):
    (tmp_path / "mine.txt").touch()
    result = command("export", "organism/llama-huge", tmp_path / "new")
    assert (
        result.returncode == 2
        and len(result.stderr.splitlines()) == 1
        and "no organism is called" in result.stderr
    )
    result = command("export", "organism/llama-huge", tmp_path)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
