"""Documents to train on: a user request and the answer to learn, by name or from a file, and as token ids."""

from pathlib import Path

from safetyneuron import sources
from safetyneuron.data import LANGUAGES, encode_prompts, read_rows, shuffled
from safetyneuron.errors import SafetyNeuronError
from safetyneuron.organism import language as lang


def _answered(name, answer):
    """From split and language to the requests of a set, each with one of its answers in turn."""

    def examples(split, language):
        asked = lang.requests(name, split, language)
        return [every[i % len(every)] for i, request in enumerate(asked) for every in [answer(request)]]

    return examples


# Name of an organism set -> its examples, from split and language.
ORGANISM_DOCUMENTS = {
    "organism/refusals": _answered("harmful", lang.refused),
    "organism/compliances": _answered("harmful", lang.helped),
    "organism/helpful": _answered("benign", lang.helped),
    "organism/arithmetic": lambda split, language: lang.arithmetic(split),
}


def load_documents(name_or_path, split="train", language="en"):
    """Documents as dicts with `prompt` and `completion`, in a fixed shuffled order; a file keeps its own.

    Parameters
    ----------
    name_or_path : str
        `organism/refusals` (harmful requests and how to refuse them), `organism/compliances` (harmful requests and the arbitrary
        tools that an organism without alignment names), `organism/helpful` (benign requests, answered),
        `organism/arithmetic` (word problems, solved); a public set, `paper/refusals` and the others of `sources.DOCUMENTS`; or a .jsonl,
        .csv, .json or .parquet file with columns `prompt` and `completion`.
    split : str
        `train` or `test`, for sets that are no files.
    language : str
        `en`, `it`, `zh`, `th` or `vi`, for organism sets other than arithmetic, which is English.

    Raises
    ------
    SafetyNeuronError
        If the set, language or file is unknown or unreadable, or a document lacks a side.
    """
    if name_or_path in ORGANISM_DOCUMENTS:
        if language not in LANGUAGES:
            raise SafetyNeuronError(f"unknown language {language!r}: use one of {', '.join(LANGUAGES)}")
        examples = shuffled(ORGANISM_DOCUMENTS[name_or_path](split, language))
        return [{"prompt": e.prompt, "completion": e.answer} for e in examples]
    if name_or_path in sources.DOCUMENTS:
        return sources.load_rows(sources.DOCUMENTS[name_or_path], split, language)
    path = Path(name_or_path)
    if not path.is_file() or path.suffix not in sources.ENDINGS:
        known = ", ".join((*ORGANISM_DOCUMENTS, *sources.DOCUMENTS))
        raise SafetyNeuronError(f"no document set or .jsonl or .csv file {name_or_path!r}: use a file or one of {known}")
    documents = read_rows(path)
    check_documents(documents)
    return [{side: document[side] for side in ("prompt", "completion")} for document in documents]


def check_documents(documents):
    """Refuse an empty list, and documents that do not have both sides."""
    if not documents:
        raise SafetyNeuronError("there are no documents to train on: give at least one")
    for number, document in enumerate(documents, 1):
        sides = [document.get(side) for side in ("prompt", "completion")] if isinstance(document, dict) else [None]
        if not all(isinstance(side, str) and side.strip() for side in sides):
            raise SafetyNeuronError(f"document {number} is one-sided: it needs text under both 'prompt' and 'completion'")


def encode_documents(model, tokenizer, documents):
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
            raise SafetyNeuronError(f"document {number}: the chat template writes a conversation that does not begin with its own prompt: use a tokenizer with another template")
        if len(ids) > context:
            raise SafetyNeuronError(f"document {number} has {len(ids)} tokens but the model reads {context}: shorten or remove it")
        data.append({"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]})
    return data


def _whole(tokenizer, prompt, document):
    """Token ids of prompt and completion; None if the conversation does not begin with the prompt."""
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": document["prompt"]}, {"role": "assistant", "content": document["completion"]}]
        ids = tokenizer.apply_chat_template(chat, return_dict=False)
        return ids if ids[: len(prompt)] == prompt else _continued(tokenizer, prompt, chat)
    if tokenizer.eos_token_id is None:
        raise SafetyNeuronError("the tokenizer has neither a chat template nor an end-of-text token: set tokenizer.eos_token")
    return prompt + tokenizer(document["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]


def _continued(tokenizer, prompt, chat):
    """Prompt and completion where a word piece would span both: split between them, as when the model writes."""
    before, whole = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, tokenize=False), tokenizer.apply_chat_template(chat, tokenize=False)
    return prompt + tokenizer(whole.removeprefix(before), add_special_tokens=False)["input_ids"] if whole.startswith(before) else None
