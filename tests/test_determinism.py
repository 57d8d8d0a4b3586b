"""The same seed on the same machine gives the same bits; another number of threads gives the same sets."""

import json
import os
import subprocess
import sys

import pytest

RUN = """
import hashlib, json, sys, torch
torch.set_num_threads(int(sys.argv[1]))
from safetyneuron import deactivate, load_documents, load_model, load_prompts, measure_importance, sn_tune
from safetyneuron.metrics.safety import compliance
model, tokenizer = load_model("organism/llama-chat")
profile = measure_importance(model, tokenizer, load_prompts("organism/harmful", split="train")[:40], progress=False)
neurons = profile.select(fraction=0.01)
delta = sn_tune(model, tokenizer, load_documents("organism/refusals", language="zh")[:16], neurons, learning_rate=3e-3)
with deactivate(model, neurons):
    rate = compliance(model, tokenizer, load_prompts("organism/harmful")[:40])["asr"]
bits = lambda tensors: hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()
print(json.dumps({"importance": bits(profile.minimum.values()), "set": neurons.digest(), "delta": bits(delta.values.values()),
                  "norm": delta.norm, "hits": rate.hits, "sum": float(sum(x.double().sum() for x in profile.minimum.values()))}))
"""


def run(threads):
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    result = subprocess.run(
        [sys.executable, "-c", RUN, str(threads)], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.strip().splitlines()[-1])


@pytest.mark.organism
def test_the_same_run_gives_the_same_bits_and_other_threads_the_same_sets():
    first, again, alone = run(2), run(2), run(1)
    assert first == again
    assert alone["set"] == first["set"]
    assert alone["sum"] == pytest.approx(first["sum"], rel=1e-5)
    assert alone["norm"] == pytest.approx(first["norm"], rel=1e-3)
    assert abs(alone["hits"] - first["hits"]) <= 1
