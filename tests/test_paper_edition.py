"""The paper edition: on random checkpoints of its architectures, on several processes and devices, and on a cluster that is this machine."""

import copy
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
import yaml
from accelerate import cpu_offload, disk_offload
from checkpoints import CHECKPOINTS, write_checkpoint
from conftest import ROOT, small_llama
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
        "advbench": lambda i: {"goal": ask(i), "target": "Sure, here is"},
        "harmbench": lambda i: {"Behavior": ask(i + 100)},
        "multijail": lambda i: dict.fromkeys(("en", "it", "zh", "th", "vi"), ask(i)),
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


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Folders that stand for the hub: checkpoints under their ids, and data files. A cost model is a folder with one output."""
    folder = tmp_path_factory.mktemp("local")
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
    return folder


@pytest.fixture
def offline(local, monkeypatch):
    monkeypatch.setenv("SAFETYNEURON_MODELS", str(local / "models"))
    monkeypatch.setenv("SAFETYNEURON_DATA", str(local / "data"))
    monkeypatch.setenv("SAFETYNEURON_CACHE", str(local / "cache"))
    return local


SMALL = {
    "n_detect": 6,
    "draws": 1,
    "n_prompts": 4,
    "n_questions": 2,
    "n_attacked": 1,
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
@pytest.mark.parametrize(
    "name", sorted(set(EDITION["notebooks"]) - {"00_organism", "A1_parallel_detection"})
)
def test_every_chapter_runs_on_checkpoints_of_the_papers_architectures(offline, tmp_path, name):
    run_notebook(ROOT / "notebooks" / f"{name}.ipynb", small(name), tmp_path / f"{name}.ipynb")
    assert (tmp_path / f"{name}.ipynb").is_file()


@pytest.mark.paper
@pytest.mark.parametrize("name", ["05_sn_tune_instruct", "06_sn_tune_base"])
def test_the_tuning_chapters_run_without_attacks(offline, tmp_path, name):
    given = small(name) | {"n_attacked": 0}
    run_notebook(ROOT / "notebooks" / f"{name}.ipynb", given, tmp_path / f"{name}.ipynb")
    found = executed.texts(nbformat.read(tmp_path / f"{name}.ipynb", 4))
    assert (
        found["attacked_eq3"] == "–"
        and "GCG" not in found[f"csv-table-{2 + name.startswith('06')}"]
    )


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


def test_models_are_loaded_when_asked_for_and_on_a_gpu_one_at_a_time(offline, monkeypatch):
    loaded = Loaded(["meta-llama/Llama-2-7b-hf", "google/gemma-7b"], dtype="float32")
    assert (
        len(loaded) == 2 and not loaded.held and loaded["google/gemma-7b"][0].dtype == torch.float32
    )
    assert loaded["google/gemma-7b"] is loaded["google/gemma-7b"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("safetyneuron.models.load_model", lambda name, dtype: name)
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
        and plan.count("rule notebook:") == 1
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
