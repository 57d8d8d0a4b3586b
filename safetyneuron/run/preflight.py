"""What an edition needs, looked up before a GPU hour is spent: models, data, memory, disk, and an estimate of the time."""

import ast
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from safetyneuron.cache import cache_folder
from safetyneuron.data import sources
from safetyneuron.errors import SafetyNeuronError
from safetyneuron.models import local_model

MODEL_PARAMETERS = ("models", "bases", "model_name", "attacker", "cost_model")
SETS = sources.PROMPTS | sources.DOCUMENTS | sources.PREFERENCES
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the report: what, whether it is there, bytes on disk still to come, bytes of weights, and the cure if it is not."""

    what: str
    status: str
    download: int = 0
    weights: int = 0
    cure: str = ""


def check(edition):
    """Print one table of everything the edition names.

    Raises
    ------
    SafetyNeuronError
        If something is missing or gated, or the disk is too small; the table says what to do.
    """
    wide = {
        name
        for values in edition["notebooks"].values()
        if values.get("dtype") == "float32"
        for name in model_names({"notebooks": {"": values}})
    }
    findings = [look_up_model(name, 2 if name in wide else 1) for name in model_names(edition)] + [
        look_up_data(*key) for key in data_names(edition)
    ]
    if not findings:
        return print("nothing to look up: organisms are files of this package")
    width = max(len(finding.what) for finding in findings)
    print(f"{'what':{width}}  {'status':18} {'disk GiB':>8} {'GPU GiB':>8}")
    for f in findings:
        print(
            f"{f.what:{width}}  {f.status:18} {f.download / GIB:8.1f} {f.weights * HEADROOM / GIB:8.1f}"
            + (f"  {f.cure}" if f.cure else "")
        )
    needed, free = (
        sum(f.download for f in findings),
        shutil.disk_usage(_existing(cache_folder())).free,
    )
    print(
        f"disk: {needed / GIB:.0f} GiB to download, {free / GIB:.0f} GiB free; GPU: {max(f.weights for f in findings) * HEADROOM / GIB:.0f} GiB for the largest model"
    )
    print(
        f"time: about {gpu_hours(edition, {f.what: f.weights for f in findings}):.0f} GPU hours ({ASSUMPTION})"
    )
    missing = [f.what for f in findings if f.cure]
    if missing or needed > free:
        raise SafetyNeuronError(
            f"not ready: {', '.join(missing) or 'the disk is too small'}: see the table"
        )


HEADROOM = (
    1.5  # beside weights: activations, caches and the measured rows; tests/benchmarks/RESULTS.md
)
THROUGHPUT = 1e14  # operations a second that a GPU reaches in half precision
ASSUMPTION = f"at {THROUGHPUT:.0e} operations a second, which is not measured here; importance, training and attacks in forward passes from the benchmarks"


def _existing(path):
    return next(parent for parent in (path, *path.parents) if parent.exists())


def model_names(edition):
    """Models and what their stages start from, without organisms, which are shipped."""
    from safetyneuron.alignment.stages import STAGES, first_model

    named = []
    for parameters in edition["notebooks"].values():
        for key, value in parameters.items():
            if key in (*MODEL_PARAMETERS, "recipient", "donor", "harmless", "helpful"):
                named += value if isinstance(value, list) else [value]
    starts = [first_model(name) if name in STAGES else name for name in named]
    return [
        name for name in dict.fromkeys(starts) if "/" in name and not name.startswith("organism/")
    ]


def data_names(edition):
    """(source, language) of every public set that the notebooks or the stages of their models name."""
    from safetyneuron.alignment.stages import STAGES, all_stages

    found = {}
    for parameters in with_defaults(edition).values():
        values = [
            v
            for value in parameters.values()
            for v in (value if isinstance(value, list) else [value])
            if isinstance(v, str)
        ]
        values += [
            name
            for value in values
            if value in STAGES
            for stage in all_stages(value)
            for name in stage.data
        ]
        languages = parameters.get("languages") or [parameters.get("language", "en")]
        for value in [v for v in values if v in SETS]:
            source = sources.SOURCES[SETS[value][0]]
            found |= {
                (SETS[value][0], language): None
                for language in languages
                if language in source.languages
            }
    return list(found)


def look_up_model(name, factor=1):
    """Where a model is: in a local folder, or on the hub and open to this user. factor: bytes in memory for a stored one."""
    repository, _, revision = name.partition("@")
    folder = local_model(repository)
    if folder:
        size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        cure = "" if size else f"{folder} holds no .safetensors: convert it"
        return Finding(name, "local" if size else "no safetensors", 0, factor * size, cure)
    found = _on_hub(
        name,
        repository,
        revision or None,
        "model",
        "put its folder into $SAFETYNEURON_MODELS/" + repository,
    )
    return replace(found, weights=factor * found.weights)


def look_up_data(name, language):
    """Where a data set is, and for a local file whether its columns can be read."""
    source = sources.SOURCES[name]
    what = f"{name} ({language})"
    path = sources.local_file(source, language)
    if path:
        return _readable(what, name, language)
    file = source.file.format(language=language)
    if source.repository is None:
        return Finding(
            what,
            "local file only",
            cure=f"get it from {source.page}; put it into $SAFETYNEURON_DATA as {file}.json",
        )
    return _on_hub(
        what,
        source.repository,
        source.revision,
        "dataset",
        f"put it into $SAFETYNEURON_DATA as {file}.jsonl",
    )


def _readable(what, name, language):
    """Every set that reads this source can read the file."""
    entries = [
        entry
        for group in (sources.PROMPTS, sources.DOCUMENTS, sources.PREFERENCES, sources.TARGETS)
        for entry in group.values()
        if entry[0] == name
    ]
    try:
        for entry in entries:
            sources.load_rows(entry, language=language)
    except SafetyNeuronError as error:
        return Finding(what, "unreadable", cure=str(error))
    return Finding(what, "local")


def _on_hub(what, repository, revision, kind, alternative):
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"https://huggingface.co/{'datasets/' * (kind == 'dataset')}{repository}"
    try:
        found = HfApi().repo_info(
            repository, revision=revision, repo_type=kind, files_metadata=kind == "model"
        )
        HfApi().auth_check(repository, repo_type=kind)
    except (GatedRepoError, RepositoryNotFoundError):
        return Finding(
            what,
            "gated or missing",
            cure=f"accept its terms at {page} and set HF_TOKEN, or {alternative}",
        )
    except RevisionNotFoundError:
        return Finding(what, "no such revision", cure=f"see {page}/commits/main")
    except Exception as error:  # whatever way the network fails: it is named
        return Finding(
            what, "not reachable", cure=f"{type(error).__name__}: {page}, or {alternative}"
        )
    size = sum(
        file.size or 0 for file in found.siblings or [] if file.rfilename.endswith(".safetensors")
    )
    if kind == "model" and not size:
        return Finding(
            what, "no safetensors", cure=f"convert {page} to safetensors, and {alternative}"
        )
    return Finding(what, "on the hub" if revision else f"not pinned: {found.sha}", size, size)


def gpu_hours(edition, weights):
    """A rough estimate: sequences run through a model, times its weights; weights: model to bytes."""
    operations = sum(
        sequences(name, values) * TOKENS * _weights(values, weights)
        for name, values in with_defaults(edition).items()
    )
    return operations / THROUGHPUT / 3600


def _weights(values, weights):
    """Operations for a token, two for each weight of two bytes, over all models of a chapter."""
    names = values.get("models") or [values.get("model_name") or values.get("recipient", "")]
    return sum(
        weights.get(
            name, max(weights.values()) if "/" in name and not name.startswith("organism/") else 0
        )
        for name in names
    )


def with_defaults(edition):
    """Every notebook's parameters, with the edition's in place of its own."""
    from safetyneuron.run.execute import notebook_parameters

    found = {}
    for name, given in edition["notebooks"].items():
        known = notebook_parameters(Path("notebooks") / f"{name}.ipynb")
        found[name] = {
            key: ast.literal_eval(value["default"]) for key, value in known.items()
        } | given
    return found


TOKENS = 250  # of a request with its answer
IMPORTANCE = (
    5  # forward passes that `exact` costs a prompt, at 128 tokens (tests/benchmarks/RESULTS.md)
)
CHOICES = 4  # sequences of a multiple-choice question
SUBTASKS = 57  # of MMLU, each asked as many questions as are given
COLUMNS = 6  # of Tables 2 and 3, which are attacked
CONDITIONS = {  # evaluations of a chapter for one model
    "02": lambda v: 1 + 2 * (1 + v["draws"]),
    "03": lambda v: 2 * len(v["percents"]) + 3 * v["draws"] + 128,
    "04": lambda v: len(v["languages"]) * (2 * len(v["languages"]) + 1 + v["draws"]),
    "05": lambda v: (4 + 2 * v["draws"]) * len(v["languages"]),
    "06": lambda v: (4 + 2 * v["draws"]) * len(v["languages"]),
    "07": lambda v: (len(v["task_sets"]) + 1) * (5 + v["draws"]) * len(v["languages"]),
    "08": lambda v: 3 * len(v["counts"]) + v["draws"] + len(v["epochs"]) * len(v["rates"]),
    "10": lambda v: (16 + 2 * v["draws"]) * (len(v["percents"]) + 3),
    "09": lambda v: 3 * len(v["fractions"]) * v["draws"] + 100,
}


def sequences(name, values):
    """Sequences that a chapter runs through each of its models: importance, evaluations, and the attacks of chapters 05 and 06."""
    detected = (
        IMPORTANCE
        * values.get("n_detect", values.get("n_score", 0))
        * 2
        * len(values.get("languages", [1]))
    )
    sets = len(values.get("test_sets", [1])) + ("benign_set" in values)
    tasks = sum(
        SUBTASKS if str(task).startswith("mmlu") else 1
        for task in values.get("tasks", [values.get("task")])
    )
    asked = sets * values.get("n_prompts", 0) + CHOICES * values.get("n_questions", 0) * tasks
    return (
        detected
        + CONDITIONS.get(name[:2], lambda v: 1)(values) * asked
        + (_attack_sequences(values) if "gcg" in values else 0)
    )


def _attack_sequences(values):
    from safetyneuron.attacks import searches

    configs = searches(values["gcg"], values["autodan"], values["pair"], "organism/templates", "en")
    gcg, autodan, pair = configs.values()
    one = (
        gcg.steps * (gcg.width + 3) + autodan.steps * autodan.population + pair.streams * pair.depth
    )
    return COLUMNS * values["n_attacked"] * one
