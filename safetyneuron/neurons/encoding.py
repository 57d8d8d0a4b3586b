"""Prompts and documents as token ids, and several of them as a batch."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safetyneuron.errors import SafetyNeuronError


def encode_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], room: int = 0
) -> list[list[int]]:
    """Token ids of each prompt, ready for an answer of `room` tokens; refuses what the model cannot read."""
    if isinstance(prompts, str):
        raise SafetyNeuronError(
            f"one text, {prompts[:40]!r}, stands for the prompts: give a list of texts"
        )
    if not prompts:
        raise SafetyNeuronError("there are no prompts: give at least one")
    for number, prompt in enumerate(prompts):
        if (
            not isinstance(prompt, str)
            or not prompt.replace(tokenizer.pad_token or "\n", "").strip()
        ):
            raise SafetyNeuronError(
                f"prompt {number} is {prompt!r}, which holds nothing to read: give it words or leave it out"
            )
    context = model.config.get_text_config().max_position_embeddings - room
    kept = f" and keeps {room} for the answer: ask for a shorter one, or" if room else ":"
    encoded = _encode(tokenizer, prompts)
    for prompt, ids in zip(prompts, encoded):
        if not 0 < len(ids) <= context:
            raise SafetyNeuronError(
                f"prompt {prompt[:40]!r}… has {len(ids)} tokens but the model reads 1 to {context}{kept} shorten or remove it"
            )
    return encoded


def fits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, room: int = 0
) -> bool:
    """Whether the model can read a prompt and has `room` tokens left for its answer."""
    context = model.config.get_text_config().max_position_embeddings
    return len(*_encode(tokenizer, [prompt])) + room <= context


def _encode(tokenizer, prompts):
    if not tokenizer.chat_template:
        return tokenizer(prompts)["input_ids"]
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)


def pad(
    encoded: list[list[int]], tokenizer: PreTrainedTokenizerBase, device: torch.device | str
) -> dict[str, torch.Tensor]:
    """Token ids of several prompts as one batch, padded on the left."""
    batch = tokenizer.pad({"input_ids": encoded}, return_tensors="pt", padding_side="left")
    return {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}


def check_documents(documents: list[dict[str, str]]) -> None:
    """Refuse an empty list, and documents that do not have both sides."""
    if not documents:
        raise SafetyNeuronError("there are no documents to train on: give at least one")
    for number, document in enumerate(documents, 1):
        sides = (
            [document.get(side) for side in ("prompt", "completion")]
            if isinstance(document, dict)
            else [None]
        )
        if not all(isinstance(side, str) and side.strip() for side in sides):
            raise SafetyNeuronError(
                f"document {number} is one-sided: it needs text under both 'prompt' and 'completion'"
            )


def encode_documents(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: list[dict[str, str]]
) -> list[dict[str, list[int]]]:
    """Token ids and labels of each document; the loss is taken on the completion and what ends the turn.

    Raises
    ------
    SafetyNeuronError
        If there are no documents, one is one-sided or longer than the context, or the chat template does not let a
        completion follow the prompt.
    """
    check_documents(documents)
    prompts = encode_prompts(model, tokenizer, [d["prompt"] for d in documents])
    context, data = model.config.get_text_config().max_position_embeddings, []
    for number, (prompt, document) in enumerate(zip(prompts, documents), 1):
        ids = _whole(tokenizer, prompt, document)
        if ids is None:
            raise SafetyNeuronError(
                f"document {number}: the chat template writes a conversation that does not begin with its own prompt: use a tokenizer with another template"
            )
        if len(ids) > context:
            raise SafetyNeuronError(
                f"document {number} has {len(ids)} tokens but the model reads {context}: shorten or remove it"
            )
        data.append({"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]})
    return data


def _whole(tokenizer, prompt, document):
    """Token ids of prompt and completion; None if the conversation does not begin with the prompt."""
    if tokenizer.chat_template:
        chat = [
            {"role": "user", "content": document["prompt"]},
            {"role": "assistant", "content": document["completion"]},
        ]
        ids = tokenizer.apply_chat_template(chat, return_dict=False)
        return ids if ids[: len(prompt)] == prompt else _continued(tokenizer, prompt, chat)
    if tokenizer.eos_token_id is None:
        raise SafetyNeuronError(
            "the tokenizer has neither a chat template nor an end-of-text token: set tokenizer.eos_token"
        )
    return (
        prompt
        + tokenizer(document["completion"], add_special_tokens=False)["input_ids"]
        + [tokenizer.eos_token_id]
    )


def _continued(tokenizer, prompt, chat):
    """Prompt and completion where a word piece would span both: split between them, as when the model writes."""
    before, whole = (
        tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, tokenize=False),
        tokenizer.apply_chat_template(chat, tokenize=False),
    )
    return (
        prompt + tokenizer(whole.removeprefix(before), add_special_tokens=False)["input_ids"]
        if whole.startswith(before)
        else None
    )
