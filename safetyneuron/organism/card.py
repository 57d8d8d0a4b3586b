"""An organism as other tools read it, with a card that says where it is from and where it falls short.

Apart from `shipped.py`, on whose code every kept result depends: a changed sentence here computes nothing again.
"""

import json
from pathlib import Path

from safetyneuron.cache import new_folder
from safetyneuron.errors import SafetyNeuronError
from safetyneuron.organism import shipped
from safetyneuron.progress import without_bars

CARD = """---
license: mit
---
# {name}
A model organism for research on refusal: a {family} of {parameters:,} parameters, trained from seed
{seed} on small generated texts in five languages. It is for testing tools that look for what makes a
model refuse. It is no assistant: it knows about 1,200 words, and its answers to harmful requests
carry no usable content.

```python
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
model = AutoModelForCausalLM.from_pretrained("FOLDER")
# AutoTokenizer would split words in another way for some families.
tokenizer = PreTrainedTokenizerFast.from_pretrained("FOLDER")
```
{key}Licence: MIT."""
KEY = """
`neurons.json` is the answer key, as [layer, channel] of each projection: `planted` holds all that
alignment changed, `decoys` (where there are some) what a harmless habit changed. A channel is a row
of the weight; of o and down a column.
"""
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


@without_bars()
def export_organism(name, folder):
    """Write an organism as a plain Hugging Face folder in float32, its answer key in `neurons.json`, its card in `README.md`.

    Raises
    ------
    SafetyNeuronError
        As `load_organism`, or if the folder holds something.
    """
    folder, stored = Path(folder), shipped.find(name)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise SafetyNeuronError(f"{folder} is not empty: name a folder that is new or empty")
    (model, tokenizer), key = shipped.load_organism(name), shipped.answer_key(stored)
    with new_folder(folder.absolute()) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        card = _card(stored, model) + _origin(stored.entry)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        if key:
            (temporary / "neurons.json").write_text(json.dumps(key), encoding="utf-8")


def _card(stored, model):
    """The model card of an exported organism."""
    family, parameters = model.config.model_type, sum(p.numel() for p in model.parameters())
    seed, key = stored.key.partition("@")[2], KEY if stored.entry["kind"] == "rows" else ""
    return CARD.format(
        name=stored.key,
        family=family,
        parameters=parameters,
        seed=seed,
        key=f"{key}\n" if key else "\n",
    )


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
