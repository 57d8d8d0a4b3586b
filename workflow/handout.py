"""An archive to hand out in a class without Python: prompts, planted neurons and decoys, and the answer key, as CSV.

python workflow/handout.py ARCHIVE
"""

import itertools
import sys
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
from pages import write_archive

from safetyneuron import load_prompts, organism
from safetyneuron.cache import new_file
from safetyneuron.errors import SafetyNeuronError
from safetyneuron.organism.language import LANGUAGES, ONLY_TEST
from safetyneuron.organism.prompts import NAMES


def main(path):
    """Write the archive, whole or not at all."""
    truth = Path(find_spec("safetyneuron").origin).parent / "truth"
    files = {f"truth/{file.name}": file.read_text(encoding="utf-8") for file in sorted(truth.glob("*.csv"))}  # fmt: skip
    files["truth/README.md"] = (truth / "README.md").read_text(encoding="utf-8")
    files["prompts.csv"] = pd.DataFrame(_prompts()).to_csv(index=False)
    files["planted.csv"] = pd.DataFrame(_planted()).to_csv(index=False)
    with new_file(path) as new:
        write_archive(new, files)


def _prompts():
    """A row for each of the first 200 prompts of every set, split and language of the organisms."""
    for name, language in itertools.product(NAMES, LANGUAGES):
        only_test = name.removeprefix("organism/") in ONLY_TEST
        for split in ("test",) if only_test else ("train", "test"):
            for text in load_prompts(name, split, language)[:200]:
                yield {"set": name, "split": split, "language": language, "prompt": text}


def _planted():
    """A row for each neuron of the answer key of one training of every kind of planting."""
    for name in ("llama-planted", "llama-planted-mlp", "llama-planted-attention"):
        for role in ("planted", "decoy"):
            found = getattr(organism, f"{role}_neurons")(f"organism/{name}")
            for projection, layer, index in found.cells():
                yield {"organism": name, "role": role, "projection": projection, "layer": layer, "index": index}  # fmt: skip


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except SafetyNeuronError as error:
        sys.exit(str(error))
