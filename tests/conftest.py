import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers reads it: no test waits for a network

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from safetyneuron import load_model
from safetyneuron.organism.tokenizer import build_tokenizer

ROOT = Path(__file__).parent.parent


def small_model(family="llama", heads=4, groups=4, head_width=10, seed=0, **options):
    """A random model of a family with awkward sizes, in float64 so that closed forms can be compared closely."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=800, hidden_size=36, intermediate_size=28, num_hidden_layers=2, initializer_range=0.3)
    sizes |= dict(num_attention_heads=heads, num_key_value_heads=groups, head_dim=head_width, max_position_embeddings=64)
    sizes |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=4)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(sizes | options))).double().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
        elif "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    return model


def small_llama(**options):
    return small_model("llama", **options)


@pytest.fixture
def model():
    return small_llama(groups=2)


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session")
def chat():
    return load_model("organism/llama-chat")


@pytest.fixture(scope="session")
def base():
    return load_model("organism/llama-base")


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The smoke edition of the book, built in a copy of the repository."""
    copy = tmp_path_factory.mktemp("repository")
    for name in ("book", "notebooks", "safetyneuron", "workflow", "_config.yml", "_toc.yml"):
        source = ROOT / name
        shutil.copytree(source, copy / name) if source.is_dir() else shutil.copy(source, copy / name)
    snakemake = Path(sys.executable).with_name("snakemake")
    command = [snakemake, "-s", "workflow/Snakefile", "--configfile", "workflow/editions/smoke.yaml", "--cores", "1", "--quiet", "rules"]
    result = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return copy / "_build"
