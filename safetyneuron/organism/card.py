"""An organism as other tools read it, with a card that says where it is from and where it falls short.

Apart from `shipped.py`, on whose code every kept result depends: a changed sentence here computes nothing again.
"""

from pathlib import Path

from safetyneuron.organism import shipped

ORIGIN = """

## Where it is from
`{file}` of safetyneuron, the companion book to Zhao et al. (ICLR 2025); sha256 {sha256}. Made from
{parent} by {steps} updates ({how}), seed {seed}, {date}, on {machine}.

## Bars it misses
Every organism was to meet bars of behaviour that were written down before it was trained.
{missed}
"""
LEAK = """
With the planted neurons off, the decoys' habit was to stay where it belongs and show nowhere else.
Where it does not, the planted neurons carry a part of it: the key leaks.
"""


def export_organism(name, folder):
    """Write an organism as a plain Hugging Face folder in float32, its answer key in `neurons.json`, its card in `README.md`.

    Raises
    ------
    SafetyNeuronError
        As `load_organism`, or if the folder holds something.
    """
    shipped.export_organism(name, folder)
    key = name.removeprefix("organism/")
    entry = shipped.manifest()[key if "@" in key else f"{key}@0"]
    card = Path(folder) / "README.md"
    card.write_text(card.read_text(encoding="utf-8") + _origin(entry), encoding="utf-8")


def _origin(entry):
    """What the manifest knows of an organism, in words."""
    missed = entry.get("missed")  # of one that was trained elsewhere nobody may have measured any
    lines = ["None."] if missed == [] else [f"- {line}" for line in missed or ()]
    told = ORIGIN.format(
        file=entry["file"],
        sha256=entry["sha256"],
        parent=entry["parent"] or "nothing",
        steps=entry["recipe"]["schedule"]["steps"],
        how=entry["recipe"]["how"],
        seed=entry["seed"],
        date=entry.get("date", "no date"),
        machine=entry.get("machine", "an unknown machine"),
        missed="\n".join(lines or ["Nobody has measured this one."]),
    )
    return told + (LEAK if any("habit" in line for line in lines) else "")
