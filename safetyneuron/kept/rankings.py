"""What the rules of the table of detectors find, computed once and kept, with what it took."""

from safetyneuron.detectors import detect
from safetyneuron.detectors.table import DETECTORS
from safetyneuron.kept.files import keep_file
from safetyneuron.neurons.identity import identity, model_digest


def find(key, case):
    """`detectors.detect.find` for the rule with this key, computed once and then read from the cache."""
    base = case.base and model_digest(case.base)
    seen = [case.harmful, case.benign, case.general, case.refusals, case.helpful, case.languages]
    modules = ("safetyneuron.detectors.table", "safetyneuron.detectors.detect")
    parts = [key, identity(case.model, case.tokenizer, *modules), base, seen]
    return keep_file(
        "rankings", parts, lambda: detect.find(DETECTORS[key], case, key), detect.Detector
    )
