"""Time and peak memory of importance, deactivated generation and SN-Tune at the sizes of the paper's models, with random weights.

    python tests/benchmarks/gpu.py llama-2-7b llama-3-8b     (in bfloat16, on the first GPU)
    python tests/benchmarks/gpu.py tiny                      (anywhere, to see that it runs)

Prompts are the organism's, padded with its words to about the paper's length; the answers are gibberish. The paper gives "2 minutes" for SN-Tune.
"""

import sys
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from safetyneuron import (
    NeuronSet,
    deactivate,
    load_documents,
    load_prompts,
    measure_importance,
    sn_tune,
)
from safetyneuron.metrics import answers
from safetyneuron.organism.tokenizer import build_tokenizer

SHAPES = {
    "llama-2-7b": dict(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
    ),
    "llama-3-8b": dict(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "tiny": dict(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
}
LENGTH = 60  # words of a prompt


def random_model(shape, device):
    """A model of a shape with random weights."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(
                "llama",
                max_position_embeddings=4096,
                pad_token_id=0,
                eos_token_id=4,
                **SHAPES[shape],
            )
        )
    torch.set_default_dtype(torch.float32)
    return model.eval()


def long(prompts):
    """Prompts of about `LENGTH` words."""
    return [" ".join((f"{prompt} " * LENGTH).split()[:LENGTH]) for prompt in prompts]


def measured(name, work, device):
    """Run the work and print seconds and peak memory."""
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    result = work()
    if cuda:
        torch.cuda.synchronize()
    memory = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if cuda else "–"
    print(f"| {name} | {time.perf_counter() - started:.1f} s | {memory} |", flush=True)
    return result


def measure_shape(shape, tokenizer, harmful, documents, device):
    """Measure a random model of one shape, which is gone afterwards."""
    model = random_model(shape, device)
    print(
        f"\n{shape}: {model.num_parameters() / 1e9:.2f} billion weights\n\n| what | time | peak memory |\n| --- | --- | --- |"
    )
    measured(
        "200 prompts, one forward pass each",
        lambda: answers(model, tokenizer, harmful, max_new_tokens=1, batch_size=16),
        device,
    )
    profile = measured(
        "importance, exact, 200 prompts",
        lambda: measure_importance(model, tokenizer, harmful, progress=False),
        device,
    )
    neurons = NeuronSet.random_like(profile.select(fraction=0.005), 0)
    with deactivate(model, neurons):
        measured(
            "200 answers of 128 tokens, 0.5 % of the neurons off",
            lambda: answers(model, tokenizer, harmful, max_new_tokens=128),
            device,
        )
    measured(
        "SN-Tune, 50 documents, 0.5 % of the neurons",
        lambda: sn_tune(model, tokenizer, documents, neurons, learning_rate=1e-2),
        device,
    )


def main(shapes):
    """Measure every shape."""
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    tokenizer, harmful = (
        build_tokenizer(),
        long(load_prompts("organism/harmful", split="train")[:200]),
    )
    documents = [
        document | {"prompt": long([document["prompt"]])[0]}
        for document in load_documents("organism/refusals")[:50]
    ]
    print(torch.cuda.get_device_name() if device != "cpu" else "CPU", torch.__version__)
    for shape in shapes:
        measure_shape(shape, tokenizer, harmful, documents, device)


if __name__ == "__main__":
    main(sys.argv[1:] or ["llama-2-7b", "llama-3-8b"])
