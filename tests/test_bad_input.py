"""The catalogue of bad input: every case ends in one line that names the cause and the cure, and leaves nothing behind."""

import json
import pickle
import struct
from pathlib import Path

import nbformat
import pytest
import torch
from conftest import ROOT, small_llama
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

from safetyneuron import (
    NeuronDelta,
    NeuronSet,
    SafetyNeuronError,
    deactivate,
    load_documents,
    load_model,
    load_prompts,
    measure_importance,
    sn_tune,
)
from safetyneuron.attacks import searches
from safetyneuron.cli import main
from safetyneuron.importance.profile import ImportanceProfile
from safetyneuron.metrics import answers
from safetyneuron.organism.tokenizer import build_tokenizer
from safetyneuron.run.execute import run_notebook

TOKENIZER = build_tokenizer()
VERIFICATION = str(ROOT / "notebooks" / "02_verification.ipynb")


def file(name, content):
    """A file in the folder of the test."""
    path = Path(name)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def model(**options):
    return small_llama(max_position_embeddings=48, **options)


def spoiled(value):
    """A model with one weight that is no number."""
    broken = model()
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[3, 2] = value
    return broken


def measure(prompts, broken=None, **options):
    return measure_importance(broken or model(), TOKENIZER, prompts, progress=False, **options)


HEADER = {"kind": "neuron file", "version": "1", "facts": "{}"}


def neuron_file(change=lambda masks: masks, metadata=HEADER):
    """A neuron file whose tensors or metadata were changed."""
    save_file(
        change({p: m.to(torch.uint8) for p, m in NeuronSet.empty(model()).masks.items()}),
        "set.safetensors",
        metadata,
    )
    return NeuronSet.load("set.safetensors")


DELTA = HEADER | {"kind": "neuron delta"}


def saved_delta():
    whole = model()
    neurons = NeuronSet({p: torch.ones_like(m) for p, m in NeuronSet.empty(whole).masks.items()})
    sn_tune(
        whole, TOKENIZER, [{"prompt": "a", "completion": "b"}] * 8, neurons, learning_rate=1e-1
    ).save("delta.safetensors")
    return whole


def truncated(path, load):
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: len(content) // 2])
    return load(path)


def huge_header(path):
    """A safetensors file whose header claims to be an exabyte long."""
    return file(path, struct.pack("<Q", 10**18) + b"{}")


def notebook(source, tags=("parameters",)):
    """A notebook with a parameters cell and one more."""
    cells = [
        nbformat.v4.new_code_cell("n = 1  # number", metadata={"tags": list(tags)}),
        nbformat.v4.new_code_cell(source),
    ]
    kernel = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "language_info": {"name": "python"},
    }
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), "n.ipynb")
    return Path("n.ipynb")


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


CASES = {
    "prompt file: missing": (lambda: load_prompts("nowhere.txt"), "no prompt set or file"),
    "prompt file: a folder": (lambda: load_prompts("."), "no prompt set or file"),
    "prompt file: empty": (lambda: load_prompts(file("a.txt", "")), "is empty"),
    "prompt file: blank lines": (lambda: load_prompts(file("a.txt", "\n \n\t\n")), "is empty"),
    "prompt file: wrong encoding": (
        lambda: load_prompts(file("a.txt", "perché".encode("latin-1"))),
        "UTF-8",
    ),
    "prompt file: UTF-16": (
        lambda: load_prompts(file("a.csv", "prompt\nx\n".encode("utf-16"))),
        "UTF-8",
    ),
    "prompt file: wrong columns": (lambda: load_prompts(file("a.csv", "a,b\n1,2\n")), "no column"),
    "prompt file: broken JSON": (
        lambda: load_prompts(file("a.jsonl", '{"prompt": ')),
        "cannot be read",
    ),
    "prompt file: rows are no objects": (lambda: load_prompts(file("a.jsonl", "3\n")), "no column"),
    "prompt file: a JSON object": (
        lambda: load_prompts(file("a.json", '{"prompt": "x"}')),
        "list of rows",
    ),
    "prompt file: no Parquet": (lambda: load_prompts(file("a.parquet", "PAR1")), "cannot be read"),
    "prompt file: unknown ending": (lambda: load_prompts(file("a.xlsx", "x")), "must end in"),
    "prompts: none": (lambda: measure([]), "no prompts"),
    "prompt file: repeated prompts": (
        lambda: load_prompts(file("a.txt", "one\ntwo\none\n")),
        "'one' 2 times",
    ),
    "prompt file: a link to itself": (
        lambda: (Path("a.txt").symlink_to("a.txt"), load_prompts("a.txt")),
        "no prompt set or file",
    ),
    "prompts: one text for a list": (lambda: measure("how do i"), "give a list of texts"),
    "prompts: of no length": (lambda: measure(["a", ""]), "prompt 1 is '', which holds nothing"),
    "prompts: blank": (lambda: measure([" \t"]), "holds nothing to read"),
    "prompts: padding only": (
        lambda: measure([f"{TOKENIZER.pad_token} {TOKENIZER.pad_token}"]),
        "holds nothing to read",
    ),
    "prompts: no text": (lambda: measure(["a", None]), "prompt 1 is None"),
    "prompts: huge": (lambda: measure(["word " * 10**6]), "reads 1 to 48"),
    "prompts: a path for a set's name": (
        lambda: load_prompts("paper/../../etc/passwd"),
        "no prompt set or file",
    ),
    "documents: unknown split": (
        lambda: load_documents("organism/arithmetic", split="dev"),
        "unknown split 'dev'",
    ),
    "prompts: no room for the answer": (
        lambda: answers(model(), TOKENIZER, ["a b c"], 46),
        "keeps 46 for the answer",
    ),
    "neurons: layers that are none": (
        lambda: NeuronSet.empty(model()).within(0, 1),
        "no layers 0 to 1: count from 1",
    ),
    "prompts: over the context": (lambda: measure(["word " * 60]), "reads 1 to 48"),
    "prompts: unknown language": (
        lambda: load_prompts("organism/harmful", language="xx"),
        "unknown language",
    ),
    "prompts: unknown split": (
        lambda: load_prompts("organism/harmful", split="dev"),
        "unknown split",
    ),
    "prompts: unknown set": (lambda: load_prompts("organism/nothing"), "no prompt set"),
    "documents: missing": (lambda: load_documents("nowhere.jsonl"), "no document set"),
    "documents: empty": (lambda: load_documents(file("d.jsonl", "")), "no documents"),
    "documents: one-sided": (
        lambda: load_documents(file("d.jsonl", '{"prompt": "x"}')),
        "one-sided",
    ),
    "documents: a side that is a number": (
        lambda: load_documents(file("d.jsonl", '{"prompt": "x", "completion": 3}')),
        "one-sided",
    ),
    "documents: over the context": (
        lambda: sn_tune(
            model(),
            TOKENIZER,
            [{"prompt": "a", "completion": "b " * 60}],
            NeuronSet({p: torch.ones_like(m) for p, m in NeuronSet.empty(model()).masks.items()}),
        ),
        "tokens but the model reads",
    ),
    "model: unknown": (lambda: load_model("nobody/nothing"), "cannot load model"),
    "model: unknown organism": (lambda: load_model("organism/llama-huge"), "no organism"),
    "model: folder without files": (
        lambda: (Path("m").mkdir(), load_model("m")),
        "cannot load model",
    ),
    "model: pickled weights": (
        lambda: (
            Path("m").mkdir(),
            model().config.save_pretrained("m"),
            TOKENIZER.save_pretrained("m"),
            file("m/pytorch_model.bin", pickle.dumps(Evil())),
            load_model("m"),
        ),
        "cannot load model",
    ),
    "model: a path for an organism's name": (
        lambda: load_model("organism/../../etc"),
        "no organism",
    ),
    "model: a folder that links elsewhere": (
        lambda: (Path("m").symlink_to("/etc"), load_model("m")),
        "cannot load model",
    ),
    "model: dtype is a word": (
        lambda: load_model("organism/llama-chat", dtype="half-ish"),
        "not a floating point",
    ),
    "model: dtype is whole": (
        lambda: load_model("organism/llama-chat", dtype="int8"),
        "not a floating point",
    ),
    "model: missing GPU": (
        lambda: load_model("organism/llama-chat", device="cuda:99"),
        "cannot be used",
    ),
    "model: unknown device": (
        lambda: load_model("organism/llama-chat", device="abacus"),
        "cannot be used",
    ),
    "model: another architecture": (
        lambda: measure(
            ["a"], GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=50))
        ),
        "not supported",
    ),
    "model: a weight is NaN": (lambda: measure(["a b"], spoiled(float("nan"))), "not a number"),
    "model: a weight is infinite": (
        lambda: measure(["a b"], spoiled(float("inf"))),
        "not a number",
    ),
    "importance: unknown rule": (lambda: measure(["a"], rule="best"), "unknown importance rule"),
    "selection: nothing given": (lambda: measure(["a"]).select(), "exactly one"),
    "selection: negative share": (lambda: measure(["a"]).select(fraction=-0.1), "must be in"),
    "selection: zero share": (lambda: measure(["a"]).select(fraction=0), "must be in"),
    "selection: zero per layer": (lambda: measure(["a"]).select(per_layer=0), "at least 1"),
    "neuron file: missing": (
        lambda: NeuronSet.load("nowhere.safetensors"),
        "not a readable neuron file",
    ),
    "neuron file: truncated": (
        lambda: truncated(
            (neuron_file().save("t.safetensors"), "t.safetensors")[1], NeuronSet.load
        ),
        "not a readable neuron file",
    ),
    "neuron file: absurd header": (
        lambda: NeuronSet.load(huge_header("h.safetensors")),
        "not a readable neuron file",
    ),
    "neuron file: pickled": (
        lambda: NeuronSet.load(file("p.safetensors", pickle.dumps(Evil()))),
        "not a readable neuron file",
    ),
    "neuron file: a projection is missing": (
        lambda: neuron_file(lambda masks: {p: m for p, m in masks.items() if p != "q"}),
        "needs the projections",
    ),
    "neuron file: of another version": (
        lambda: neuron_file(metadata=HEADER | {"version": "2"}),
        "no neuron file of version 1",
    ),
    "neuron file: of no version": (
        lambda: neuron_file(metadata=None),
        "no neuron file of version 1",
    ),
    "neuron file: a link out of the folder": (
        lambda: (
            Path("l.safetensors").symlink_to("/etc/hostname"),
            NeuronSet.load("l.safetensors"),
        ),
        "not a readable neuron file",
    ),
    "neuron file: hostile names": (
        lambda: neuron_file(lambda masks: masks | {"../../q": masks["q"].clone()}),
        "needs the projections",
    ),
    "neuron file: wrong shape": (
        lambda: neuron_file(lambda masks: masks | {"q": masks["q"].flatten()}),
        "mask is needed",
    ),
    "neuron file: of another model": (
        lambda: deactivate(model(intermediate_size=20), neuron_file()).__enter__(),
        "measure importance on this model",
    ),
    "delta: truncated": (
        lambda: (saved_delta(), truncated("delta.safetensors", NeuronDelta.load)),
        "not a readable neuron delta",
    ),
    "delta: metadata of nonsense": (
        lambda: (
            save_file({"x": torch.zeros(1)}, "d.safetensors", DELTA | {"facts": "[1, 2"}),
            NeuronDelta.load("d.safetensors"),
        ),
        "not a readable neuron delta",
    ),
    "delta: absurd shapes": (
        lambda: (
            save_file(
                {"x": torch.zeros(1)},
                "d.safetensors",
                DELTA
                | {"facts": json.dumps({"shapes": {"q": [-1, 10**12]}, "model": "m", "facts": {}})},
            ),
            NeuronDelta.load("d.safetensors"),
        ),
        "not a readable neuron delta",
    ),
    "delta: a profile": (
        lambda: (measure(["a"]).save("p.safetensors"), NeuronDelta.load("p.safetensors")),
        "no neuron delta of version 1",
    ),
    "delta: of another model": (
        lambda: (saved_delta(), NeuronDelta.load("delta.safetensors").merge(model(seed=1))),
        "another model",
    ),
    "profile: truncated": (
        lambda: (
            measure(["a"]).save("p.safetensors"),
            truncated("p.safetensors", ImportanceProfile.load),
        ),
        "not a readable importance profile",
    ),
    "profile: of another rule": (
        lambda: measure(["a"]).merge(measure(["a"], rule="paper")),
        "another rule",
    ),
    "attack: unknown setting": (
        lambda: searches({"speed": 1}, {}, {}, "organism/templates", "en"),
        "no setting",
    ),
    "attack: negative setting": (
        lambda: searches({"steps": -1}, {}, {}, "organism/templates", "en"),
        "must be positive",
    ),
    "notebook: raises": (
        lambda: run_notebook(notebook("1 / 0"), {}, Path("out.ipynb")),
        "ZeroDivisionError",
    ),
    "notebook: kernel dies": (
        lambda: run_notebook(notebook("import os; os._exit(1)"), {}, Path("out.ipynb")),
        "kernel",
    ),
}
COMMANDS = {
    "parameter: unknown": ["run", VERIFICATION, "-p", "shoe=3"],
    "parameter: no value": ["run", VERIFICATION, "-p", "fraction"],
    "parameter: wrong type": ["run", VERIFICATION, "-p", "n_prompts=many"],
    "parameter: share above one": ["run", VERIFICATION, "-p", "fraction=3"],
    "parameter: negative share": ["run", VERIFICATION, "-p", "fraction=-0.1"],
    "parameter: negative number": ["run", VERIFICATION, "-p", "n_prompts=-3"],
    "parameter: zero": ["run", VERIFICATION, "-p", "draws=0"],
    "parameter: no number": ["run", VERIFICATION, "-p", "fraction=.nan"],
    "parameter: infinite": [
        "run",
        str(ROOT / "notebooks" / "05_sn_tune_instruct.ipynb"),
        "-p",
        "learning_rate=.inf",
    ],
    "parameter: negative number in a list": [
        "run",
        str(ROOT / "notebooks" / "08_ablations.ipynb"),
        "-p",
        "counts=[0, -1]",
    ],
    "parameter: broken YAML": ["run", VERIFICATION, "-p", "models=[a"],
    "parameter file: missing": ["run", VERIFICATION, "-f", "nowhere.yaml"],
    "parameter file: no mapping": ["run", VERIFICATION, "-f", "list.yaml"],
    "parameter file: runs code": ["run", VERIFICATION, "-f", "evil.yaml"],
    "parameter file: wrong encoding": ["run", VERIFICATION, "-f", "latin.yaml"],
    "notebook: missing": ["params", "nowhere.ipynb"],
    "notebook: no notebook": ["params", "list.yaml"],
    "notebook: no parameters cell": ["params", "plain.ipynb"],
    "importance: no folder to write to": [
        "importance",
        "organism/llama-chat",
        "organism/harmful",
        "-o",
        "no/where.safetensors",
    ],
    "importance: a negative number": [
        "importance",
        "organism/llama-chat",
        "organism/harmful",
        "-n",
        "-3",
        "-o",
        "p.safetensors",
    ],
    "check: missing edition": ["check", "nowhere.yaml"],
    "check: no edition": ["check", "evil.yaml"],
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    file("list.yaml", "- 1\n")
    file("evil.yaml", "!!python/object/apply:pathlib.Path.touch [executed]\n")
    file("latin.yaml", "a: perché\n".encode("latin-1"))
    notebook("1", tags=()).rename("plain.ipynb")
    return tmp_path


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_in_one_line(folder, case):
    work, words = CASES[case]
    with pytest.raises(SafetyNeuronError, match=words) as caught:
        work()
    assert "\n" not in str(caught.value) and len(str(caught.value)) > 20
    assert not Path("executed").exists() and not Path("out.ipynb").exists()
    assert not [
        path for path in folder.iterdir() if path.name.startswith(".")
    ]  # no temporary file stays


@pytest.mark.parametrize("case", COMMANDS)
def test_a_bad_command_ends_with_one_line_and_a_code(capsys, case):
    assert main(COMMANDS[case]) == 2
    output = capsys.readouterr()
    assert (
        output.err.startswith("safetyneuron: ")
        and output.err.count("\n") == 1
        and "Traceback" not in output.err
    )
    assert not Path("executed").exists()


def test_debug_shows_where_an_error_was_raised():
    with pytest.raises(SafetyNeuronError):
        main(["--debug", "params", "nowhere.ipynb"])


def test_the_catalogue_is_long_enough():
    assert len(CASES) + len(COMMANDS) >= 60
