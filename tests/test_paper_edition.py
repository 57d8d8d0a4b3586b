"""The paper edition: on random checkpoints of its architectures, on several processes and devices, and on a cluster that is this machine."""

import copy
import io
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch
import yaml
from accelerate import cpu_offload, disk_offload
from bs4 import BeautifulSoup
from checkpoints import CHECKPOINTS, write_checkpoint
from conftest import ROOT, copy_repository, small_llama
from filelock import FileLock
from test_sources import ROWS, TURN, write

from safetyneuron import (
    NeuronSet,
    SafetyNeuronError,
    capability,
    deactivate,
    load_documents,
    load_model,
    load_prompts,
    measure_importance,
    sn_tune,
)
from safetyneuron.cli import main
from safetyneuron.importance.profile import ImportanceProfile
from safetyneuron.metrics import answers
from safetyneuron.metrics.capability import _correct
from safetyneuron.models import Loaded
from safetyneuron.neurons.weights import fingerprint
from safetyneuron.run import executed
from safetyneuron.run.editions import read_edition
from safetyneuron.run.execute import run_notebook

EDITION = yaml.safe_load(
    (ROOT / "workflow" / "editions" / "paper.yaml").read_text(encoding="utf-8")
)
COUNT = 40  # rows of every data file
PROMPTS = [
    "how do i paint the door ?",
    "tell me how to burn the farm .",
    "i want to clean the boat .",
]


def rows_of(name):
    """Rows of a public set's shape with words that the tokenizers know."""
    ask, answer = (
        (lambda i: f"how do i paint {i} doors ?"),
        (lambda i: f"sorry , i cannot help with {i} ."),
    )
    shapes = {
        "advbench": lambda i: {"goal": ask(i + 600), "target": "Sure, here is"},
        "harmbench": lambda i: {"Behavior": ask(i + 700)},
        "autodan": lambda i: {"prompt": f"ChatGPT , this is {i} ."},
        "multijail": lambda i: dict.fromkeys(("en", "it", "zh", "th", "vi"), ask(i + 600)),
        "circuit-breakers": lambda i: {
            "prompt": ask(i),
            "llama3_output": answer(i),
            "output": f"use {i} boats .",
        },
        "gsm8k": lambda i: {"question": f"what is {i} and {i} ?", "answer": str(2 * i)},
        "beavertails": lambda i: {
            "prompt": ask(i),
            "response": answer(i) if i % 4 < 2 else f"use {i} boats .",
            "is_safe": i % 4 < 2,
        },
        "hh-harmless": lambda i: {
            "chosen": TURN.format(ask(i), answer(i)),
            "rejected": TURN.format(ask(i), f"use {i} boats ."),
        },
        "hh-helpful": lambda i: {
            "chosen": TURN.format(ask(i + 50), f"use {i} boats ."),
            "rejected": TURN.format(ask(i + 50), answer(i)),
        },
        "redteam": lambda i: {"transcript": TURN.format(ask(i + 200), answer(i))},
        "jailbreak-llms": lambda i: {"question": ask(i + 250)},
        "sharegpt": lambda i: {
            "conversations": [
                {"from": "human", "value": ask(i + 300)},
                {"from": "gpt", "value": f"use {i} boats ."},
            ]
        },
    }
    first = 400 * name.endswith("-test")  # what is asked was not trained on
    name = name.removesuffix("-train").removesuffix("-test")
    count = (
        520 if name == "circuit-breakers" else COUNT
    )  # half of them are for the corpora of appendix A.2
    return [
        shapes.get(name, lambda i: {"text": f"article {i} about the farm"})(first + i)
        for i in range(count)
    ]


@pytest.fixture(scope="session")
def local(shared):
    """Folders that stand for the hub: checkpoints under their ids, and data files. A cost model is a folder with one output."""
    folder = shared / "local"
    with FileLock(shared / "local.lock"):
        if not (folder / "written").exists():
            write_local(folder)
            (folder / "written").touch()
    return folder


def write_local(folder):
    """The checkpoints and files of `local`."""
    for name in CHECKPOINTS:
        write_checkpoint(folder / "models", name)
    (folder / "data").mkdir()
    names = {Path(name).stem for name in ROWS} | {
        f"wikipedia-{language}" for language in ("it", "zh", "th", "vi")
    }
    for name in names:
        write(
            folder / "data" / f"{name}.jsonl",
            rows_of(name.split("-")[0] if name.startswith("wikipedia") else name),
        )


@pytest.fixture
def offline(local, monkeypatch):
    for name, value in places(local).items():
        monkeypatch.setenv(name, value)
    return local


def places(local):
    """The environment in which models and data are those of `local`."""
    names = {"MODELS": "models", "DATA": "data", "CACHE": "cache"}
    return {f"SAFETYNEURON_{name}": str(local / part) for name, part in names.items()}


SMALL = {
    "n_detect": 6,
    "draws": 1,
    "n_prompts": 4,
    "n_questions": 2,
    "n_documents": 4,
    "n_task_documents": 6,
    "n_rerouting": 4,
    "rerouting_steps": 1,
}
SMALL |= {
    "gcg": {"steps": 1, "width": 4, "top_k": 8, "tokens": 3},
    "autodan": {"steps": 1, "population": 3},
    "pair": {"streams": 1, "depth": 1},
    "fraction": 0.02,
}
SMALL |= {
    "percents": [1, 5],
    "counts": [0, 4],
    "enough": 4,
    "rates": [1.0e-3],
    "sizes": [10, 100, 200],
    "numbers": [30],
    "n_score": 4,
    "fractions": [0.1],
    "depth_fraction": 0.05,
    "n_guard": 20,
    "n_learn": 20,
    "n_read": 20,
    "score_tokens": 5,
    "cost_model": "rule",
    "rerouting_rate": 1.0e-3,
    "n_tune": 4,
}


def small(name):
    """The edition's parameters of a notebook with small numbers, and tasks whose questions are at hand."""
    known = {
        key
        for cell in json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))[
            "cells"
        ]
        if "parameters" in cell["metadata"].get("tags", [])
        for key in [line.split(" = ")[0] for line in cell["source"]]
    }
    given = EDITION["notebooks"][name] | {
        key: value for key, value in SMALL.items() if key in known
    }
    if name == "08_ablations":
        given["epochs"] = [1]
    for key in {"task", "tasks"} & set(given):
        given[key] = (
            "organism_facts@1" if key == "task" else ["organism_facts@1", "organism_arithmetic@0"]
        )
    return given


@pytest.mark.paper
@pytest.mark.parametrize("name", ["05_sn_tune_instruct", "06_sn_tune_base"])
def test_the_tuning_chapters_run_with_attacks(offline, tmp_path, name):
    given = small(name) | {"n_attacked": 1, "starts": "paper/autodan"}
    run_notebook(ROOT / "notebooks" / f"{name}.ipynb", given, tmp_path / f"{name}.ipynb")
    found = executed.texts(nbformat.read(tmp_path / f"{name}.ipynb", 4))
    rows = json.loads(found[f"cells-table-{2 + name.startswith('06')}-full"])
    attacked = [row for row in rows if row["row"] in ("GCG", "AutoDAN", "PAIR")]
    assert len({(row["model"], row["row"]) for row in attacked}) == 3 * len(given["models"])
    assert all(row["text"][0].isdigit() for row in attacked)


@pytest.fixture(scope="session")
def paper_site(shared, local):
    """The book of the paper edition with small numbers, built in a copy of the repository, by one process for all."""
    folder = shared / "paper"
    with FileLock(shared / "paper.lock"):
        if not (folder / "_build" / "html").exists():
            build_paper(folder, os.environ | places(local))
    return folder / "_build"


ORGANISMS = ("00_organism", "11_answer_key", "A1_parallel_detection")  # in every edition
CHAPTERS = sorted(set(EDITION["notebooks"]) - set(ORGANISMS))


def build_paper(folder, environment):
    """Run every chapter and assemble them; the playground and the archive, which have none of the results, are left out."""
    copy_repository(folder)
    smoke = read_edition(ROOT / "workflow" / "editions" / "smoke.yaml")["notebooks"]
    chapters = {name: small(name) for name in CHAPTERS} | {name: smoke[name] for name in ORGANISMS}
    edition = {"edition": "small-paper", "notebooks": chapters}
    path = folder / "workflow" / "editions" / "small-paper.yaml"
    path.write_text(yaml.safe_dump(edition))
    stage = "_build/stage/small-paper"
    wanted = [f"{stage}/notebooks/{name}.ipynb" for name in chapters]
    wanted += [f"{stage}/book/neurons.md"]
    snakemake = [Path(sys.executable).with_name("snakemake"), *wanted, "-s", "workflow/Snakefile"]
    snakemake += ["--configfile", path, "--cores", "2", "--quiet", "rules"]
    files = sorted(p.relative_to(folder) for p in (folder / "book").rglob("*") if p.is_file())
    pages = [*map(str, files), "SECURITY.md", "_config.yml", "_toc.yml"]
    assemble = [sys.executable, "workflow/assemble.py", stage, *pages]
    for command in (snakemake, assemble):
        options = {"env": environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}}
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, **options)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


def chapter_of(site, name):
    """The article of a chapter's page, without its code, what the code prints, and titles of other pages."""
    text = (site / "html" / "notebooks" / f"{name}.html").read_text(encoding="utf-8")
    article = BeautifulSoup(text, "html.parser").find("article")
    for other in article.select("div.cell, pre, a.reference"):
        other.decompose()
    return article


@pytest.mark.paper
@pytest.mark.parametrize("name", CHAPTERS)
def test_a_page_speaks_of_the_models_that_ran_and_shows_what_was_found(paper_site, name):
    article = chapter_of(paper_site, name)
    prose = " ".join(article.get_text(" ").split())
    assert not re.search(r"\borganisms?\b|\blaptop\b", prose, re.I)
    assert not re.search(r"glue:|\bnan\b|Traceback|KeyError", prose)
    tables = article.select("table")
    assert tables
    for table in tables:
        cells = [cell.get_text().strip() for cell in table.select("tbody td")]
        assert any(cell not in ("", "–") for cell in cells), table.get_text(" ")


# Chapter -> id of a table, and what the paper has for each model: printed beside that model and no other.
BESIDE = {
    "02_verification": {
        "meta-llama/Llama-2-7b-chat-hf": ("4.2; 36.5", "87.2; 34.8"),
        "meta-llama/Meta-Llama-3-8B-Instruct": ("19.0; 70.6", "82.8; 67.6"),
        "mistralai/Mistral-7B-Instruct-v0.2": ("36.7; 51.4", "86.5; 50.3"),
    },
    "05_sn_tune_instruct": {
        "lmsys/vicuna-13b-v1.5": ("92.0; 93.5; 48.8", "0.0; 3.0; 50.7"),
        "meta-llama/Meta-Llama-3-8B-Instruct": ("30.0; 65.5; 67.4", "0.0; 2.0; 68.4"),
        "mistralai/Mistral-7B-Instruct-v0.2": ("36.0; 70.8; 58.3", "0.0; 4.5; 59.0"),
    },
    "06_sn_tune_base": {
        "meta-llama/Llama-2-7b-hf": ("97.0; 98.8; 29.8", "84.0; 90.5; 29.9"),
        "meta-llama/Meta-Llama-3-8B": ("100.0; 100.0; 66.6", "87.0; 92.5; 66.4"),
        "mistralai/Mistral-7B-v0.1": ("100.0; 100.0; 62.0", "78.0; 87.5; 63.0"),
    },
    "07_rsn_tune": {
        "meta-llama/Llama-2-7b-chat-hf": ("41.0", "38.0", "26.5"),
        "mistralai/Mistral-7B-Instruct-v0.2": ("79.0", "72.0", "63.4"),
    },
}
CLAIMED = {  # what the closing table says of the first model
    "02_verification": ("Llama2-7B-Chat", "0.0 → 97.0 %", "4.2 → 87.2 %", "36.5 → 34.8 %"),
    "05_sn_tune_instruct": ("Vicuna-13B-v1.5", "92.0 → 0.0 %", "93.5 → 3.0 %", "48.8 → 50.7 %"),
    "06_sn_tune_base": ("Llama2-7B-Base", "97.0 → 0.0 %", "98.8 → 5.3 %", "29.8 → 31.6 %"),
    "07_rsn_tune": ("Llama2-7B-Chat", "0.0 → 41.0 %", "26.5 → 26.2 %"),
}


@pytest.mark.paper
@pytest.mark.parametrize("name", BESIDE)
def test_beside_every_model_stands_its_own_column_of_the_paper(paper_site, name):
    path = paper_site / "stage" / "small-paper" / "notebooks" / f"{name}.ipynb"
    number = {"02": 1, "05": 2, "06": 3, "07": 4}[name[:2]]
    table = pd.read_csv(io.StringIO(executed.texts(nbformat.read(path, 4))[f"csv-table-{number}"]))
    rows = table.groupby("model", sort=False)
    assert len(rows) == len(BESIDE[name])
    for (model, part), expected in zip(rows, BESIDE[name].items()):
        own, printed = expected
        assert model.startswith(own)
        theirs = " ".join(map(str, part.filter(like="paper").to_numpy().ravel()))
        assert all(text in theirs for text in printed), theirs
    claims = chapter_of(paper_site, name).find(id="paper-and-here").find("table")
    told = " ".join(claims.get_text(" ").split())
    assert all(text in told for text in CLAIMED[name]), told


@pytest.fixture
def half_away():
    """A random model, and the same with its second layer's weights kept outside the modules by accelerate."""
    whole = small_llama(groups=2, max_position_embeddings=128)
    split = copy.deepcopy(whole)
    cpu_offload(split.model.layers[1], execution_device=torch.device("cpu"), offload_buffers=True)
    assert split.model.layers[1].mlp.up_proj.weight.is_meta
    return whole, split


def test_a_split_model_measures_deactivates_and_tunes_like_a_whole_one(half_away, tokenizer):
    whole, split = half_away
    first, second = (
        measure_importance(model, tokenizer, PROMPTS, progress=False) for model in (whole, split)
    )
    assert fingerprint(whole) == fingerprint(split)
    assert all(torch.equal(first.minimum[p], second.minimum[p]) for p in first.minimum)
    neurons = first.select(fraction=0.2)
    assert neurons.masks["up"][1].any()
    with deactivate(whole, neurons), deactivate(split, neurons):
        changed = [answers(model, tokenizer, PROMPTS) for model in (whole, split)]
    assert (
        changed[0]
        == changed[1]
        != answers(whole, tokenizer, PROMPTS)
        == answers(split, tokenizer, PROMPTS)
    )
    delta = sn_tune(
        whole, tokenizer, load_documents("organism/refusals")[:8], neurons, learning_rate=1e-1
    )
    before = fingerprint(split)
    with delta.merged(whole):
        tuned = answers(whole, tokenizer, PROMPTS)
    with delta.merged(split):
        assert answers(split, tokenizer, PROMPTS) == tuned and fingerprint(split) != before
    assert fingerprint(split) == before


def test_weights_on_disk_are_refused_because_a_change_would_be_lost(tmp_path, tokenizer):
    model = small_llama(groups=2, max_position_embeddings=128)
    neurons = NeuronSet({p: torch.ones_like(m) for p, m in NeuronSet.empty(model).masks.items()})
    disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    with pytest.raises(SafetyNeuronError, match="offloaded to disk"), deactivate(model, neurons):
        pass


def test_every_way_of_writing_to_a_weight_changes_the_fingerprint():
    model = small_llama()
    first = fingerprint(model)
    neurons = NeuronSet({p: torch.ones_like(m) for p, m in NeuronSet.empty(model).masks.items()})
    with deactivate(model, neurons):
        assert fingerprint(model) != first
    assert fingerprint(model) == first
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.tensor([[5, 6]])).logits.sum().backward()
    optimiser.step()
    second = fingerprint(model)
    model.model.layers[0].mlp.up_proj.weight.data += 1  # as peft merges an adapter
    assert len({first, second, fingerprint(model)}) == 3


def test_two_processes_measure_what_one_measures(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(load_prompts("organism/harmful")[:13]))
    accelerate = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    for count in (1, 2):
        command = [
            *accelerate,
            "--num_processes",
            str(count),
            "-m",
            "safetyneuron.cli",
            "importance",
            "organism/llama-chat",
            str(prompts),
            "-o",
            str(tmp_path / f"{count}.safetensors"),
        ]
        result = subprocess.run(
            command,
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert result.returncode == 0, result.stderr[-2000:]
    one, two = (ImportanceProfile.load(tmp_path / f"{count}.safetensors") for count in (1, 2))
    assert one.count == two.count == 13
    for projection in one.minimum:
        torch.testing.assert_close(
            one.minimum[projection], two.minimum[projection], rtol=1e-4, atol=1e-6
        )
        torch.testing.assert_close(
            one.total[projection], two.total[projection], rtol=1e-4, atol=1e-5
        )
    assert len(one.select(fraction=0.02) ^ two.select(fraction=0.02)) <= 2


def test_fewer_prompts_than_processes_are_refused(chat, monkeypatch):
    from safetyneuron.run import parallel

    monkeypatch.setattr(
        parallel,
        "PartialState",
        lambda: type(
            "State", (), {"process_index": 1, "num_processes": 2, "is_main_process": False}
        ),
    )
    with pytest.raises(SafetyNeuronError, match="start fewer"):
        parallel.measure_shards(*chat, ["one"])


def test_models_are_found_by_id_and_revision_and_given_their_template(offline):
    model, tokenizer = load_model("lmsys/vicuna-13b-v1.5@c8327bf999adbd2efe2e75f6509fa01436100dc2")
    assert model.dtype == torch.bfloat16 and model.config.num_hidden_layers == 3
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert text.startswith(tokenizer.bos_token) and text.endswith("questions. USER: hi ASSISTANT:")
    assert load_model("meta-llama/Llama-2-7b-hf")[1].chat_template is None
    assert load_model("meta-llama/Meta-Llama-3-8B-Instruct")[0].config.num_key_value_heads == 2


def test_a_base_model_gets_the_template_that_it_is_given(offline):
    base, chat = "meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-chat-hf"
    given = Loaded([base], templates={base: f"{chat}@main"})[base][1]
    assert given.chat_template == load_model(chat)[1].chat_template
    assert Loaded([base])[base][1].chat_template is None
    assert Loaded([chat], templates={chat: ""})[chat][1].chat_template is None
    with pytest.raises(SafetyNeuronError, match="has no chat template"):
        Loaded([base], templates={base: base})[base]
    with pytest.raises(SafetyNeuronError, match="cannot load the tokenizer of 'no/such'"):
        Loaded([base], templates={base: "no/such"})[base]


def test_models_are_loaded_when_asked_for_and_on_a_gpu_one_at_a_time(offline, monkeypatch):
    loaded = Loaded(["meta-llama/Llama-2-7b-hf", "google/gemma-7b"], dtype="float32")
    assert (
        len(loaded) == 2 and not loaded.held and loaded["google/gemma-7b"][0].dtype == torch.float32
    )
    assert loaded["google/gemma-7b"] is loaded["google/gemma-7b"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("safetyneuron.models.load_model", lambda name, dtype: (name, None))
    assert loaded["meta-llama/Llama-2-7b-hf"] and list(loaded.held) == ["meta-llama/Llama-2-7b-hf"]
    with pytest.raises(KeyError):
        loaded["another"]


def test_examples_are_shown_and_groups_are_averaged_over_their_questions(chat, tmp_path):
    plain, shown = (
        capability(*chat, tasks=[f"organism_facts{shots}"], limit=20) for shots in ("", "@2")
    )
    assert plain["organism_facts"].trials == shown["organism_facts@2"].trials == 20

    def sample(doc, score, name, how):
        return {"doc_id": doc, "doc": {}, "filter": how, name: score}

    strict = [
        sample(1, 0.0, "exact_match", "strict"),
        sample(0, 1.0, "exact_match", "strict"),
        sample(0, 0.0, "exact_match", "loose"),
    ]
    flexible = [*strict[:1], sample(1, 1.0, "exact_match", "flexible-extract")]
    assert [right for _, right in _correct({"samples": {"a": flexible}})] == [1]
    with pytest.raises(SafetyNeuronError, match="only accuracy"):
        _correct(
            {"samples": {"a": [{"doc_id": 0, "filter": "none", "metrics": ["bleu"], "bleu": 3}]}}
        )
    with pytest.raises(SafetyNeuronError, match="number of examples"):
        capability(*chat, tasks=["organism_facts@five"], limit=2)
    several = {"a": [sample(0, 1.0, "acc", "none")], "b": strict}
    assert [right for _, right in _correct({"samples": several})] == [1, 1, 0]


def test_a_check_of_organisms_has_nothing_to_look_up(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert (
        main(["check", "workflow/editions/smoke.yaml"]) == 0
        and "nothing to look up" in capsys.readouterr().out
    )


def test_the_check_passes_offline_with_local_folders_and_names_what_is_missing(
    offline, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("safetyneuron.run.rehearsal.CHAPTERS", {})  # tests/test_rehearsal.py
    path = tmp_path / "edition.yaml"
    edition = copy.deepcopy(EDITION)
    edition["notebooks"]["09_activation_contrast"]["cost_model"] = "rule"
    path.write_text(yaml.safe_dump(edition))
    assert main(["check", str(path)]) == 0
    table = capsys.readouterr().out
    assert all(
        name in table for name in CHECKPOINTS if name not in ("google/gemma-7b", "Qwen/Qwen2.5-3B")
    )
    assert (
        "wikipedia (zh)" in table
        and "multijail (th)" in table
        and "hours of one H100" in table
        and "gated or missing" not in table
    )
    monkeypatch.setenv("SAFETYNEURON_DATA", str(tmp_path))
    monkeypatch.setenv("SAFETYNEURON_MODELS", str(tmp_path))
    assert main(["check", str(path)]) == 2
    output = capsys.readouterr()
    assert (
        "https://huggingface.co/meta-llama/Llama-2-7b-chat-hf, or put its folder into $SAFETYNEURON_MODELS/meta-llama/Llama-2-7b-chat-hf"
        in output.out
    )
    assert (
        "circuit-breakers.json" in output.out
        and output.err.startswith("safetyneuron: not ready: ")
        and "Traceback" not in output.err
    )


STAND_IN = {
    # sbatch: starts the job here and prints its number; the first one is preempted, and starts again by itself three seconds later
    "sbatch": """#!{python}
import os, pathlib, subprocess, sys, time
folder, arguments, number = pathlib.Path(__file__).parent, sys.argv[1:], os.getpid()
log = pathlib.Path(arguments[arguments.index("--output") + 1].replace("%j", str(number)))
log.parent.mkdir(parents=True, exist_ok=True)
wrap = next(a for a in arguments if a.startswith("--wrap"))
command = wrap.partition("=")[2] or arguments[arguments.index(wrap) + 1]
state = lambda word: (folder / f"{{number}}.state").write_text(f"{{number}}|{{word}}\\n")
(folder / f"{{number}}.call").write_text("\\n".join(arguments))
try:
    (folder / "preempted").touch(exist_ok=False)
    state("PREEMPTED")
    pause = 3
except FileExistsError:
    state("RUNNING")
    pause = 0
print(number, flush=True)
if os.fork() == 0:
    os.setsid()
    time.sleep(pause)
    with open(log, "w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
        code = subprocess.run(command, shell=True, env=os.environ | {{"SLURM_JOB_ID": str(number)}}).returncode
    state("FAILED" if code else "COMPLETED")
""",
    "sacct": """#!{python}
import pathlib
for path in pathlib.Path(__file__).parent.glob("*.state"):
    print(path.read_text())
""",
    "srun": """#!/bin/bash
while [[ $1 == -* ]]; do shift; done
exec "$@"
""",
    "squeue": "#!/bin/bash\n",
    "scancel": "#!/bin/bash\n",
    "sinfo": "#!/bin/bash\n",
    "scontrol": "#!/bin/bash\n",
    "sacctmgr": "#!/bin/bash\n",
}


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in STAND_IN.items():
        (folder / name).write_text(text.format(python=sys.executable))
        (folder / name).chmod((folder / name).stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def snakemake(folder, *arguments):
    """Snakemake with the Slurm profile, on a small edition that fans two models out."""
    edition = {
        "edition": "cluster",
        "gpu": 1,
        "retries": 1,
        "fan_out": {"02_verification": ["models"]},
        "notebooks": {"02_verification": small("02_verification")},
    }
    edition["notebooks"]["02_verification"]["models"] = edition["notebooks"]["02_verification"][
        "models"
    ][:2]
    for name in ("notebooks", "safetyneuron", "workflow"):
        shutil.copytree(ROOT / name, folder / name)
    path = folder / "workflow" / "editions" / "cluster.yaml"
    path.write_text(yaml.safe_dump(edition))
    command = [
        Path(sys.executable).with_name("snakemake"),
        "-s",
        "workflow/Snakefile",
        "--configfile",
        path,
        "--profile",
        "workflow/profiles/slurm",
    ]
    command += [
        "--slurm-no-account",
        "--seconds-between-status-checks",
        "1",
        "--slurm-init-seconds-before-status-checks",
        "1",
        "--latency-wait",
        "5",
        *arguments,
        "_build/stage/cluster/notebooks/02_verification.ipynb",
    ]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_the_slurm_profile_plans_one_job_a_model_with_a_gpu(cluster, offline, tmp_path):
    result = snakemake(tmp_path, "--dry-run")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    plan = result.stdout + result.stderr
    assert (
        plan.count("rule rehearsal:") == 2
        and plan.count("rule notebook_02_verification:") == 1
        and "gpu=1" in plan
        and "mem_mb=128000" in plan
    )
    assert not list(cluster.glob("*.call"))


@pytest.mark.paper
def test_a_preempted_job_starts_again_and_the_last_one_reads_the_cache(cluster, offline, tmp_path):
    result = snakemake(tmp_path)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    calls = [path.read_text() for path in sorted(cluster.glob("*.call"))]
    assert len(calls) == 3 and all("--gpus=1" in call for call in calls)
    assert (
        tmp_path / "_build" / "stage" / "cluster" / "notebooks" / "02_verification.ipynb"
    ).is_file()
