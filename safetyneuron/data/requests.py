"""What is attacked: harmful requests, each with the beginning of the answer that an attack makes likely."""

from dataclasses import dataclass
from pathlib import Path

from safetyneuron.data import sources
from safetyneuron.data.files import prompt_column, read_rows
from safetyneuron.data.prompts import ORGANISM_SETS, load_prompts
from safetyneuron.errors import SafetyNeuronError
from safetyneuron.organism import language as lang
from safetyneuron.organism.reading import read_request

DEFAULT_TARGET = "Sure, here is"  # how every target of AdvBench begins


@dataclass(frozen=True)
class Request:
    """A harmful request and the beginning of the answer that GCG and AutoDAN make likely."""

    prompt: str
    target: str


def load_requests(name_or_path, language="en"):
    """The prompts of `load_prompts` (test split) with their targets.

    The target of an organism's request is the helpful answer that its base model gives most often. A .csv or .jsonl
    file has targets in a column `target` (as AdvBench's); where there is no such column, every target is "Sure, here is".

    Raises
    ------
    SafetyNeuronError
        As `load_prompts`, or if only some requests have a target.
    """
    prompts = load_prompts(name_or_path, language=language)
    targets = _targets(name_or_path, prompts, language)
    missing = [prompt for prompt in prompts if not targets.get(prompt)]
    if missing:
        raise SafetyNeuronError(
            f"{name_or_path} has no target for {len(missing)} of {len(prompts)} prompts: fill the column 'target' or remove it"
        )
    return [Request(prompt, targets[prompt]) for prompt in prompts]


def _targets(name, prompts, language):
    """Prompt to target."""
    if name in ORGANISM_SETS:
        return {prompt: _organism_target(prompt) for prompt in prompts}
    if name in sources.TARGETS:
        return {
            row["prompt"]: row["target"]
            for row in sources.load_rows(sources.TARGETS[name], "test", language)
        }
    return (
        dict.fromkeys(prompts, DEFAULT_TARGET)
        if name in sources.PROMPTS
        else _file_targets(name, prompts)
    )


def _organism_target(prompt):
    """The answer with a neutral opening and the wording that help with harm most often has."""
    request = read_request(prompt)
    tones = lang.TONES[request.harmful]
    return lang.openings(request)[0] + lang.helps(request)[tones.index(max(tones))]


def _file_targets(path, prompts):
    rows = read_rows(Path(path)) if not path.endswith(".txt") else [{}]
    if not any("target" in row for row in rows):
        return dict.fromkeys(prompts, DEFAULT_TARGET)
    asked = [
        row for row in rows if prompt_column(path, row).strip()
    ]  # `load_prompts` leaves out empty ones
    return dict(zip(prompts, [(row.get("target") or "").strip() for row in asked]))
