"""Cost of measuring importance, as ratios to one plain batched forward pass of the same prompts in the same process.

    python tests/benchmarks/importance.py [--json]

Model: Llama type, 512 wide, 8 layers, 8 heads in 4 groups, 1792 feed-forward channels, float32, 2 threads. `exact@64` is
the rule `exact` on 32 prompts of 64 tokens in batches of 8. `naive@32` is zeroing one neuron at a time, extrapolated from 20 neurons.
`screen@64` is `screen` for a 1 % selection from 32 prompts of 64 tokens, scouting and encoding included. `exact_memory@512` is the peak memory above the loaded model for one batch of 2 prompts of 512 tokens, each measured in a process of its own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from safetyneuron.importance.recorder import RULES, recording
from safetyneuron.importance.screening import screen
from safetyneuron.neurons.architecture import PROJECTIONS
from safetyneuron.neurons.sets import NeuronSet
from safetyneuron.organism.tokenizer import build_tokenizer

PROMPTS, BATCH, REPEATS, LENGTHS = 32, 8, 5, (32, 64, 128)


def benchmark_model():
    """The model of the benchmark, with random weights."""
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=512,
        intermediate_size=1792,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=len(build_tokenizer()), max_position_embeddings=1024, **sizes)
    ).eval()


def batch_of(length, prompts=PROMPTS):
    ids = torch.randint(0, 1000, (prompts, length), generator=torch.Generator().manual_seed(length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def forward(model, batch):
    """Plain forward passes of the decoder over all prompts, as `measure_importance` runs them."""
    with torch.inference_mode():
        for part in parts(batch):
            model.get_decoder()(**part, use_cache=False)


def parts(batch):
    """The prompts in batches."""
    return [
        {name: x[i : i + BATCH] for name, x in batch.items()}
        for i in range(0, len(batch["input_ids"]), BATCH)
    ]


def measured(model, batch, rule):
    """The same with every neuron measured."""
    with recording(model, rule) as recorder:
        for part in parts(batch):
            recorder.start(part["attention_mask"])
            forward(model, part)
            recorder.finish()


def ratio_to(plain, other):
    """Median over interleaved repeats of the time of `other` over that of `plain`."""
    plain(), other()
    ratios = []
    for _ in range(REPEATS):
        ratios.append(_seconds(other) / _seconds(plain))
    return statistics.median(ratios)


def _seconds(action):
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def naive_ratio(model, batch, sample=20):
    """Cost of one forward pass per neuron, from a sample of neurons."""
    from safetyneuron import deactivate

    empty = NeuronSet.empty(model)

    def one():
        masks = {p: m.clone() for p, m in empty.masks.items()}
        masks["up"][0, 0] = True
        with deactivate(model, NeuronSet(masks)):
            forward(model, batch)

    return ratio_to(lambda: forward(model, batch), one) * sum(
        empty.masks[p].numel() for p in PROJECTIONS
    )


def screen_ratio(model, length):
    """Cost of `screen`, on prompts of random words of the organism's language."""
    tokenizer, generator = build_tokenizer(), torch.Generator().manual_seed(length)
    words = sorted(word for word in tokenizer.get_vocab() if word.isalpha())
    around = len(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": ""}], add_generation_prompt=True
        )["input_ids"]
    )
    drawn = torch.randint(len(words), (PROMPTS, length - around), generator=generator)
    prompts = [" ".join(words[i] for i in row) for row in drawn]
    return ratio_to(
        lambda: forward(model, batch_of(length)),
        lambda: screen(model, tokenizer, prompts, 0.01, BATCH),
    )


def peak_memory(rule):
    """Bytes at the peak above the loaded model: of a plain forward pass (rule `plain`) or a measured one."""
    model, batch = benchmark_model(), batch_of(512, prompts=2)
    forward(model, batch_of(8, prompts=1))  # what the first pass allocates once and keeps
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
    loaded = _status("VmRSS")
    forward(model, batch) if rule == "plain" else measured(model, batch, rule)
    return _status("VmHWM") - loaded


def _status(name):
    """One line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def memory_ratio(rule):
    """Peak memory of a rule over that of a plain forward pass.

    A fixed threshold makes the C library return freed tensors at once: its heap's holes, which vary by half from run
    to run, would be counted otherwise.
    """
    options = dict(
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**19)},
    )
    runs = [
        subprocess.run([sys.executable, __file__, "--memory", r], **options)
        for r in ("plain", rule)
    ]
    plain, other = (int(run.stdout.split()[-1]) for run in runs)
    return other / plain


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object as the last line"
    )
    parser.add_argument(
        "--memory", metavar="RULE", help="only print the peak memory of one rule, in bytes"
    )
    options = parser.parse_args()
    torch.set_num_threads(2)
    if options.memory:
        print(peak_memory(options.memory))
        return
    model, ratios = benchmark_model(), {}
    for length in LENGTHS:
        batch = batch_of(length)
        for rule in RULES:
            ratios[f"{rule}@{length}"] = ratio_to(
                lambda: forward(model, batch), lambda: measured(model, batch, rule)
            )
            print(f"{rule}@{length:<4} {ratios[f'{rule}@{length}']:.2f}", flush=True)
    ratios["screen@64"] = screen_ratio(model, 64)
    print(f"screen@64  {ratios['screen@64']:.2f}", flush=True)
    for rule in ("first_order", "exact"):
        ratios[f"{rule}_memory@512"] = memory_ratio(rule)
        print(f"{rule}_memory@512 {ratios[f'{rule}_memory@512']:.2f}", flush=True)
    ratios["naive@32"] = naive_ratio(model, batch_of(32))
    print(f"naive@32   {ratios['naive@32']:.0f}")
    if options.json:
        print(json.dumps(ratios))


if __name__ == "__main__":
    main()
