"""The organism's tokenizer: an ordinary fast tokenizer, one token per word, with a chat template."""

from functools import cache

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from safetyneuron.organism import language as lang

CONTEXT = 256
SPECIAL = ("<pad>", "<unk>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|> ' + message['content'] + ' <|end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@cache
def vocabulary():
    """Every word of the language, in a fixed order."""
    texts = list(_texts(vars(lang.lexicon())))
    texts += [*"0123456789+-="]
    blanks = {
        "{verb}",
        "{object}",
        "{verb_2}",
        "{object_2}",
        "{tool_1}",
        "{tool_2}",
        "{animal}",
        "{first}",
        "{second}",
    }
    blanks |= {"{person}", "{thing}", "{a}", "{b}"}
    return tuple(
        dict.fromkeys(word for text in texts for word in text.split() if word not in blanks)
    )


def _texts(part):
    """All texts in a part of the lexicon."""
    if isinstance(part, str):
        yield part
    else:
        for one in part.values() if isinstance(part, dict) else part:
            yield from _texts(one)


def build_tokenizer():
    """A `PreTrainedTokenizerFast` over the words of the language, padding on the left.

    It decodes what it encoded to the same text: numbers, one token a digit, are joined again.
    """
    words = {word: index for index, word in enumerate((*SPECIAL, *vocabulary()))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    # `WordPiece` puts a space before every word but the first; the digits of a number get none.
    spaces = decoders.WordPiece(prefix="##", cleanup=False)
    digits = decoders.Replace(Regex(r"(?<=\d) (?=\d)"), "")
    tokenizer.decoder = decoders.Sequence([spaces, decoders.Fuse(), digits])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|end|>",
        extra_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
