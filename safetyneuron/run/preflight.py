"""What an edition needs, looked up before a GPU hour is spent: models, data, licences, disk, and by rehearsal memory and time."""

import ast
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from safetyneuron.cache import cache_folder
from safetyneuron.data import sources
from safetyneuron.errors import SafetyNeuronError
from safetyneuron.models import local_model
from safetyneuron.run import editions
from safetyneuron.run.editions import items_of
from safetyneuron.run.imagined import GPUS, SHARE, imagine_model, weight_bytes
from safetyneuron.run.rehearsal import USABLE, rehearse, shape_of

MODEL_PARAMETERS = (*editions.MODEL_PARAMETERS, "bases", "attacker", "cost_model", "judge")
SETS = sources.PROMPTS | sources.DOCUMENTS | sources.PREFERENCES | sources.TEXTS
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the report: what, whether it is there, bytes on disk still to come, its licence, and the cure if it is not there."""

    what: str
    status: str
    download: int = 0
    licence: str = ""
    cure: str = ""


def check(edition):
    """Print what the edition names and whether it is there, then what every chapter takes on every model, rehearsed on shapes.

    Raises
    ------
    SafetyNeuronError
        If something is missing or gated, the disk is too small, or a stage does not fit the edition's GPU; the tables say what to do.
    """
    findings = [look_up_model(name) for name in model_names(edition)]
    findings += [look_up_data(*key) for key in data_names(edition)]
    if not findings:
        return print("nothing to look up: organisms are files of this package")
    width = max(len(finding.what) for finding in findings)
    print(f"{'what':{width}}  {'status':18} {'disk GiB':>8}  licence")
    for f in findings:
        line = f"{f.what:{width}}  {f.status:18} {f.download / GIB:8.1f}  {f.licence}"
        print(line + (f"; {f.cure}" if f.cure else ""))
    needed = sum(f.download for f in findings)
    free = shutil.disk_usage(_existing(cache_folder())).free
    print(f"disk: {needed / GIB:.0f} GiB to download, {free / GIB:.0f} GiB free\n", flush=True)
    wrong = [f.what for f in findings if f.cure] + _rehearsed(edition)
    if wrong or needed > free:
        reasons = ", ".join(wrong) or "the disk is too small"
        raise SafetyNeuronError(f"not ready: {reasons}: see the table")


def _rehearsed(edition):
    """Print the rehearsal; return what does not fit the GPU."""
    gpu, large, sums = _gpu(edition), [], {False: 0.0, True: 0.0}
    line = "{:24} {:44} {:>8} {:18} {:>9} {:>9} {:>9}".format
    print(f"rehearsing {edition.get('edition', 'the chapters')}: some minutes", flush=True)
    print(line("chapter", "model", "peak GiB", "at", "PFLOP", "TB", "hours"))
    for row in rehearse(with_defaults(edition), gpu):
        hours = row.cost.seconds / 3600
        sums[row.attack] += hours
        name = row.chapter + ", attacks" * row.attack
        numbers = [f"{x:.2f}" for x in (row.cost.operations / 1e15, row.cost.traffic / 1e12, hours)]
        model, peak = row.model.partition("@")[0], f"{row.cost.peak / GIB:.1f}"
        fits = row.cost.peak <= USABLE * gpu.memory
        print(line(name, model, peak, row.at, *numbers) + "  does not fit" * (not fits), flush=True)
        large += [] if fits else [f"{name} on {model}"]
    print(
        f"time: {sums[False]:.1f} hours of one {gpu.name}, and {sums[True]:.1f} for attacks, if arithmetic reaches {SHARE:.0%} of its peak ({gpu.half / 1e12:.0f} TFLOP/s in"
        f" half precision, {gpu.single / 1e12:.0f} in single), memory {gpu.bandwidth / 1e12:.2f} TB/s, and a kernel takes {gpu.launch * 1e6:.0f} µs at least; loading is not counted"
    )
    return large


def _gpu(edition):
    name = edition.get("hardware", "H100")
    if name not in GPUS:
        raise SafetyNeuronError(
            f"the edition names the hardware {name!r}: it must be one of {', '.join(GPUS)}"
        )
    return GPUS[name]


def _existing(path):
    return next(parent for parent in (path, *path.parents) if parent.exists())


def model_names(edition):
    """Models and what their stages start from, without organisms, which are shipped."""
    from safetyneuron.alignment.stages import first_model

    named = []
    for parameters in edition["notebooks"].values():
        named += parameters.get("templates", {}).values()
        for key, value in parameters.items():
            if key in MODEL_PARAMETERS:
                named += items_of(value)
    starts = [first_model(stage) for name in named for stage in stages_of(name)] + [
        name for name in named if not stages_of(name)
    ]
    return [
        name for name in dict.fromkeys(starts) if "/" in name and not name.startswith("organism/")
    ]


def stages_of(name):
    """The stages that an aligned model, or one training of a family, goes through."""
    from safetyneuron.alignment.stages import stages_behind

    return stages_behind(name) if name.startswith("aligned/") else []


def data_names(edition):
    """(source, language) of every public set that the notebooks or the stages of their models name."""
    from safetyneuron.alignment.stages import all_stages

    found = {}
    for parameters in with_defaults(edition).values():
        values = [v for value in parameters.values() for v in items_of(value) if isinstance(v, str)]
        stages = [stage for value in values for stage in stages_of(value)]
        values += [name for stage in stages for each in all_stages(stage) for name in each.data]
        languages = parameters.get("languages") or [parameters.get("language", "en")]
        for value in [v for v in values if v in SETS]:
            source = sources.SOURCES[SETS[value][0]]
            found |= {
                (SETS[value][0], language): None
                for language in languages
                if language in source.languages
            }
    return list(found)


def look_up_model(name):
    """Where a model is: in a local folder, or on the hub and open to this user; and its licence, where its shape is known."""
    repository, _, revision = name.partition("@")
    try:
        shape = shape_of(name)
        licence = shape["licence"] + ", gated" * shape["gated"]
    except SafetyNeuronError as error:
        return Finding(name, "unknown shape", cure=str(error))
    folder = local_model(repository)
    if folder:
        size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        cure = "" if size else f"{folder} holds no .safetensors: convert it"
        return Finding(name, "local" if size else "no safetensors", 0, licence, cure)
    put = f"put its folder into $SAFETYNEURON_MODELS/{repository}"
    found = _on_hub(name, repository, revision or None, "model", put)
    return replace(found, download=found.download or stored_size(shape), licence=licence)


def stored_size(shape):
    """Bytes of a model's weights as they are stored."""
    return weight_bytes(imagine_model(shape["config"], getattr(torch, shape["dtype"])))


def look_up_data(name, language):
    """Where a data set is, and for a local file whether its columns can be read."""
    source = sources.SOURCES[name]
    what, splits = f"{name} ({language})", sources.splits_of(source)
    if all(sources.local_file(source, language, split) for split in splits):
        return _readable(what, name, language)
    file = sources.file_of(source, language, "{train,test}" if len(splits) > 1 else splits[0])
    if source.repository is None:
        return Finding(
            what,
            "local file only",
            cure=f"get it from {source.page}; put it into $SAFETYNEURON_DATA as {file}.json",
        )
    return _on_hub(
        what if source.revision else f"{what}, not pinned",
        source.repository,
        source.revision,
        "dataset",
        f"put it into $SAFETYNEURON_DATA as {file}.jsonl",
    )


def _readable(what, name, language):
    """Every set that reads this source can read its files."""
    groups = sources.PROMPTS, sources.DOCUMENTS, sources.PREFERENCES, sources.TARGETS
    entries = [entry for group in groups for entry in group.values() if entry[0] == name]
    try:
        for split in sources.splits_of(sources.SOURCES[name]):
            for entry in entries:
                sources.load_rows(entry, split, language)
        for text in [text for text, entry in sources.TEXTS.items() if entry[0] == name]:
            sources.load_text(text)
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
    return Finding(what, "on the hub" if revision else f"on the hub: {found.sha}", size)


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
