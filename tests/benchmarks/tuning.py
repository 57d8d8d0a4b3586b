"""Cost of an update of SN-Tune, as ratios to full fine-tuning with masked gradients (as released) and to LoRA, in one run.

    python tests/benchmarks/tuning.py [--json]

Model: Llama type, 1024 wide, 8 layers, 16 heads in 8 groups, 3584 feed-forward channels, 32,000 words (`--words`), float32, 2 threads; a batch of
8 documents of 64 tokens, loss on the second half of each; a random 0.5 % of the neurons. A step is forward, backward, clipping and AdamW.
`time` is to masked full fine-tuning, `time_lora` to LoRA on every projection with as many parameters, `time_limit` to one frozen
forward pass and one backward pass to the activations. `memory` is the peak above the loaded model over three steps, each way of
training in a process of its own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from importance import _seconds, _status
from transformers import LlamaConfig, LlamaForCausalLM

from safetyneuron.neurons.architecture import PROJECTIONS, Architecture
from safetyneuron.neurons.sets import NeuronSet
from safetyneuron.tuning.sn_tune import TunedNeurons
from safetyneuron.tuning.trainer import with_lora

BATCH, LENGTH, SHARE, REPEATS = 8, 64, 0.005, 7
KEPT = []


def benchmark_model(words):
    """The model of the benchmark, with random weights."""
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=1024,
        intermediate_size=3584,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=8,
    )
    return LlamaForCausalLM(LlamaConfig(vocab_size=words, max_position_embeddings=256, **sizes))


def documents():
    ids = torch.randint(0, 1000, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, : LENGTH // 2] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def some_neurons(model):
    """A random share of the neurons of every projection and layer."""
    empty, generator = NeuronSet.empty(model), torch.Generator().manual_seed(2)
    return NeuronSet(
        {p: torch.rand(mask.shape, generator=generator) < SHARE for p, mask in empty.masks.items()}
    )


def stepper(module, parameters, after_clip=lambda: None):
    """One update of `parameters` as a function."""
    optimizer, batch = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0), documents()

    def step():
        loss = module(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        after_clip()
        optimizer.step()

    return step


def masked(model):
    """Full fine-tuning, gradients clipped and then masked, as the released code does."""
    neurons, architecture = some_neurons(model), Architecture(model)
    masks = {
        parameter: torch.zeros_like(parameter, dtype=torch.bool) for parameter in model.parameters()
    }
    for projection in PROJECTIONS:
        for layer, row in enumerate(neurons.masks[projection]):
            place = architecture.place(layer, projection)
            mask = masks[place.module.weight]
            (mask[place.channels] if place.axis == 0 else mask[:, place.channels].T)[row] = True

    def mask_gradients():
        for parameter, mask in masks.items():
            parameter.grad.mul_(mask)

    return stepper(model, list(model.parameters()), mask_gradients)


def sn_tune(model):
    """The module that `safetyneuron.sn_tune` trains."""
    tuned = TunedNeurons(model, some_neurons(model))
    KEPT.append(tuned.added())  # for the life of the process
    KEPT[-1].__enter__()
    return stepper(tuned, list(tuned.parameters()))


def lora(model):
    """LoRA on every projection, with the rank whose parameter count is nearest to that of the neurons."""
    wanted = sum(p.numel() for p in TunedNeurons(model, some_neurons(model)).parameters())
    of_rank_one = sum(
        sum(place.weight.shape)
        for layer in range(8)
        for place in [Architecture(model).place(layer, p) for p in PROJECTIONS]
    )
    adapted = with_lora(model, max(1, round(wanted / of_rank_one)))
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    print(f"parameters: neurons {wanted}, LoRA {sum(p.numel() for p in parameters)}", flush=True)
    return stepper(adapted, parameters)


def limit(model):
    """One frozen forward pass and one backward pass to the activations."""
    model.requires_grad_(False)
    batch = documents()
    ids = batch.pop("input_ids")

    def step():
        embedded = model.get_input_embeddings()(ids).requires_grad_(True)
        model(inputs_embeds=embedded, **batch).loss.backward()

    return step


WAYS = {"masked": masked, "sn_tune": sn_tune, "lora": lora, "limit": limit}


def times(words):
    """Median seconds of a step over interleaved repeats, for every way."""
    steps = {name: way(benchmark_model(words)) for name, way in WAYS.items()}
    for step in steps.values():
        step(), step()
    rounds = [{name: _seconds(step) for name, step in steps.items()} for _ in range(REPEATS)]
    return {
        other: statistics.median(r["sn_tune"] / r[other] for r in rounds)
        for other in ("masked", "lora", "limit")
    }


def peak_memory(way, words):
    """Bytes at the peak above the loaded model over three steps."""
    model = benchmark_model(words)
    with torch.inference_mode():
        model(
            input_ids=documents()["input_ids"][:1, :8]
        )  # what the first pass allocates once and keeps
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
    loaded, step = _status("VmRSS"), WAYS[way](model)
    for _ in range(3):
        step()
    return _status("VmHWM") - loaded


def memory(way, words):
    """`peak_memory` in a process of its own."""
    options = dict(
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**19)},
    )
    return int(
        subprocess.run(
            [sys.executable, __file__, "--memory", way, "--words", str(words)], **options
        ).stdout.split()[-1]
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object as the last line"
    )
    parser.add_argument(
        "--memory",
        metavar="WAY",
        help="only print the peak memory of one way of training, in bytes",
    )
    parser.add_argument("--words", type=int, default=32_000, help="size of the vocabulary")
    options = parser.parse_args()
    torch.set_num_threads(2)
    if options.memory:
        print(peak_memory(options.memory, options.words))
        return
    measured = times(options.words)
    ratios = {
        "time": measured["masked"],
        "time_lora": measured["lora"],
        "time_limit": measured["limit"],
    }
    ratios |= {"memory": memory("sn_tune", options.words) / memory("masked", options.words)}
    for name, ratio in ratios.items():
        print(f"{name:<11}{ratio:.2f}")
    if options.json:
        print(json.dumps(ratios))


if __name__ == "__main__":
    main()
