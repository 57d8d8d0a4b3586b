"""Random checkpoints of the paper's architectures, a few layers each, written to disk with the tokenizer classes of the real ones."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GemmaTokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from safetyneuron.organism import language

LLAMA_2 = "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CORPUS = [
    f"{e.prompt} {e.answer}"
    for request in language.requests("benign", "train")[:200]
    for e in language.helped(request)[:1]
] + ["Sure, here is [INST] [/INST] USER: ASSISTANT: 0123456789"]


def llama(chat_template=None):
    """Llama 2, Mistral and Vicuna: byte fallback, spaces as part of the words."""
    tokenizer = LlamaTokenizer().train_new_from_iterator(CORPUS, 500)
    tokenizer.chat_template = chat_template
    return tokenizer


def llama_3(chat_template=None):
    """Llama 3: byte-level pairs in a plain fast tokenizer."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    special = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ]
    raw.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    end = "<|eot_id|>" if chat_template else "<|end_of_text|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<|begin_of_text|>",
        eos_token=end,
        chat_template=chat_template,
    )


def gemma():
    """Gemma."""
    return GemmaTokenizer().train_new_from_iterator(CORPUS, 500)


def qwen():
    """Qwen 2.5."""
    return Qwen2Tokenizer().train_new_from_iterator(CORPUS, 600)


CHECKPOINTS = {
    "meta-llama/Llama-2-7b-chat-hf": ("llama", lambda: llama(LLAMA_2), {}),
    "meta-llama/Llama-2-7b-hf": ("llama", llama, {}),
    "lmsys/vicuna-13b-v1.5": ("llama", llama, {"num_hidden_layers": 3}),
    "meta-llama/Meta-Llama-3-8B-Instruct": (
        "llama",
        lambda: llama_3(LLAMA_3),
        {"num_key_value_heads": 2},
    ),
    "meta-llama/Meta-Llama-3-8B": ("llama", llama_3, {"num_key_value_heads": 2}),
    "mistralai/Mistral-7B-Instruct-v0.2": (
        "mistral",
        lambda: llama(LLAMA_2),
        {"num_key_value_heads": 2, "sliding_window": None},
    ),
    "mistralai/Mistral-7B-v0.1": (
        "mistral",
        llama,
        {"num_key_value_heads": 2, "sliding_window": 64},
    ),
    "google/gemma-7b": ("gemma", gemma, {"head_dim": 16, "num_key_value_heads": 4}),
    "Qwen/Qwen2.5-3B": ("qwen2", qwen, {"num_key_value_heads": 2}),
}


def write_checkpoint(folder, name, dtype=torch.bfloat16):
    """One of them, in Hugging Face format under its own name."""
    family, build, options = CHECKPOINTS[name]
    tokenizer = build()
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=4096,
        initializer_range=0.3,
    )
    sizes |= dict(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=None
    )
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(sizes | options))).to(
        dtype
    )
    model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    return folder / name
