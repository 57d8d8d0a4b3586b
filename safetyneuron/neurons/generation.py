"""Writing on from a prompt, token by token, in the same way for every model."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


@contextmanager
def plain_settings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Iterator[PreTrainedModel]:
    """The model's own generation settings count for nothing but the ends of an answer, for the length of a `with` block.

    A model may ship a penalty, a temperature or a least length; `generate` fills in whatever its caller leaves open from these.
    """
    shipped = model.generation_config
    ends = shipped.eos_token_id if shipped.eos_token_id is not None else tokenizer.eos_token_id
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
    )
    try:
        yield model
    finally:
        model.generation_config = shipped


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: dict,
    max_new_tokens: int,
    sample: bool = False,
) -> torch.Tensor:
    """Prompt and continuation of every row of a batch, greedy or sampled at temperature 1: (B, n) token ids.

    Parameters
    ----------
    batch : dict of str to torch.Tensor
        As from `pad`.
    """
    how = {"do_sample": True, "top_k": 0} if sample else {"do_sample": False}
    with plain_settings(model, tokenizer):
        return model.generate(**batch, max_new_tokens=max_new_tokens, **how)
