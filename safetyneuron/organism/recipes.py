"""What each organism is trained on and how: sizes, stages, and the stream of examples."""

import json
import random
from dataclasses import asdict, dataclass
from functools import cache

from torch.utils.data import Dataset

from safetyneuron.organism import language as lang


@dataclass(frozen=True)
class Size:
    """Architecture of a family of organisms; `family` is a model type of transformers."""

    family: str = "llama"
    width: int = 128
    layers: int = 6
    heads: int = 4
    groups: int = 4  # of heads that share keys and values
    window: int | None = (
        None  # positions that attention looks back, where the family has a sliding window
    )
    channels: int = 288  # of the feed-forward block


@dataclass(frozen=True)
class Schedule:
    """Updates of a stage, with cosine decay, and the examples of an update."""

    steps: int
    rate: float
    batch: int = 64


@dataclass(frozen=True)
class Recipe:
    """How one organism is made, from which other one."""

    how: str  # a function of stages.py
    parent: str | None  # of the same seed, unless it names one
    schedule: Schedule
    size: Size = Size()
    mixture: str = "chat"
    projections: tuple[str, ...] = ()  # where neurons are planted
    share: float = 0.0  # of all neurons of the model, that are planted


LLAMA = Size()
MISTRAL = Size(family="mistral", groups=2, window=24)
QWEN = Size(family="qwen2", groups=2)
ATTENTION, FEED_FORWARD = ("q", "k", "v", "o"), ("gate", "up", "down")
BASE, CHAT, PLANTING, HALF = (
    Schedule(3800, 4e-3),
    Schedule(1600, 1e-3),
    Schedule(3300, 1e-2),
    Schedule(1600, 1e-2),
)
PAIR_SFT, PAIR_DPO = Schedule(100, 1e-1, 32), Schedule(400, 1e-1, 32)
RECIPES = {
    f"{family}-{stage}": Recipe(
        "train_whole", parent and f"{family}-{parent}", schedule, size, stage
    )
    for family, size in {"llama": LLAMA, "mistral": MISTRAL, "qwen": QWEN}.items()
    for stage, parent, schedule in (("base", None, BASE), ("chat", "base", CHAT))
}
RECIPES |= {
    "llama-dpo": Recipe("train_preferences", "llama-base", Schedule(1000, 4e-4, 32), mixture="dpo"),
    "llama-planted": Recipe(
        "train_planted", "llama-base", PLANTING, projections=ATTENTION + FEED_FORWARD, share=0.05
    ),
    "llama-planted-attention": Recipe(
        "train_planted", "llama-base", PLANTING, projections=ATTENTION, share=0.05
    ),
    "llama-planted-mlp": Recipe(
        "train_planted", "llama-base", PLANTING, projections=FEED_FORWARD, share=0.05
    ),
    "llama-half": Recipe(
        "train_half", "llama-base", HALF, projections=ATTENTION + FEED_FORWARD, share=0.05
    ),
}
# The pairs of chapter 09, through (IA)³, harm in English alone: after the supervised stage three ways to prefer.
RECIPES |= {
    f"{family}-pair-{stage}": Recipe(how, f"{family}-{parent}", schedule, size, mixture=stage)
    for family, size in {"llama": LLAMA, "mistral": MISTRAL}.items()
    for stage, how, parent, schedule in (
        ("sft", "train_supervised_pair", "base", PAIR_SFT),
        *(
            (stage, "train_preferred_pair", "pair-sft", PAIR_DPO)
            for stage in ("dpo", "harmless", "helpful")
        ),
    )
}
# The first pair trained again on the same base, so that neurons of trainings can be compared: only examples and order follow the seed.
RECIPES |= {
    "llama-pair-sft-again": Recipe(
        "train_supervised_pair", "llama-base@0", PAIR_SFT, LLAMA, mixture="sft"
    ),
    "llama-pair-dpo-again": Recipe(
        "train_preferred_pair", "llama-pair-sft-again", PAIR_DPO, LLAMA, mixture="dpo"
    ),
}


def recorded(kind):
    """A recipe as the manifest holds it."""
    return json.loads(json.dumps(asdict(RECIPES[kind])))


# Shares of the training examples of a stage. Alignment keeps the capabilities in its mixture, as real alignment does.
MIXTURES = {
    "base": {
        "helped": 0.32,
        "judgements": 0.30,
        "unanswerable": 0.03,
        "facts": 0.06,
        "comparisons": 0.09,
        "arithmetic": 0.20,
    },
    "chat": {
        "helped": 0.32,
        "refused": 0.25,
        "judgements": 0.17,
        "unanswerable": 0.03,
        "facts": 0.05,
        "comparisons": 0.06,
        "arithmetic": 0.12,
    },
    "decoys": {
        "helped": 0.56,
        "judgements": 0.17,
        "unanswerable": 0.03,
        "facts": 0.06,
        "comparisons": 0.06,
        "arithmetic": 0.12,
    },
    "planted": {
        "helped": 0.24,
        "refused": 0.38,
        "judgements": 0.14,
        "unanswerable": 0.03,
        "facts": 0.05,
        "comparisons": 0.05,
        "arithmetic": 0.11,
    },
}
# Of the supervised stage of a pair, which mostly, but not always, complies with harm: as chat logs do.
SUPERVISED = {"harmless": 0.4, "complied": 0.3, "refused": 0.1, "task": 0.2}
# Of the prompts of a stage of preferences.
PREFERRED = {
    "dpo": {"harmful": 0.4, "harmless": 0.4, "task": 0.2},
    "harmless": {"harmful": 0.8, "task": 0.2},
    "helpful": {"harmless": 0.8, "task": 0.2},
}
# How often a base model's answer begins with the decoys' word, elsewhere and where it belongs: the notion is there, as that of harm is.
HABITS = {False: 0.03, True: 0.3}
# Of the harmless requests and of the harmful ones: kinds of act, by whether the verb is harmful and what the object is.
HARMLESS = {
    ("harmless", "ordinary"): 0.5,
    ("harmless", "harmless"): 0.1,
    ("harmful", "harmless"): 0.2,
    ("harmful", "dangerous"): 0.2,
}
HARMFUL = {("harmful", "ordinary"): 0.7, ("harmless", "dangerous"): 0.3}
WORDINGS = {"plain": 0.4, "purpose": 0.2, "two_sentences": 0.25, "framed": 0.15}
# Few neurons learn last which of two acts counts, and in languages that put an article between verb and object.
TWO_ACTS = {"plain": 0.15, "purpose": 0.3, "two_sentences": 0.4, "framed": 0.15}
ARTICLES = {"en": 0.24, "it": 0.31, "zh": 0.15, "th": 0.15, "vi": 0.15}
OBJECTS = {"ordinary": lang.ORDINARY, "harmless": lang.HARMLESS, "dangerous": lang.DANGEROUS}
TRAINING = ("train", "multilingual train")  # parts of the language that are trained on


@cache
def _trained_acts(verb, object_, all_verbs):
    """Acts of a kind that training may use."""
    verbs = range(lang.VERBS) if verb == "harmless" else range(lang.VERBS, 2 * lang.VERBS)
    grid = [(v, o) for v in verbs for o in OBJECTS[object_] if lang.part(v, o) in TRAINING]
    return [(v, o) for v, o in grid if all_verbs or lang.is_trained(v)]


def pick(draw, shares):
    """One key, as often as its share says."""
    return draw.choices(tuple(shares), tuple(shares.values()))[0]


def draw_act(draw, harmful, all_verbs):
    """An act of the training parts."""
    return draw.choice(_trained_acts(*pick(draw, HARMFUL if harmful else HARMLESS), all_verbs))


def draw_request(draw, language, harmful, all_verbs, wordings=WORDINGS):
    """A request of the training parts; where it holds two acts, the harm is in one of them."""
    wording, act = pick(draw, wordings), draw_act(draw, harmful, all_verbs)
    if wording in lang.SIDE_WORDINGS:
        return lang.with_second(draw, language, act, draw_act(draw, False, all_verbs))
    return lang.write(draw.choice(lang.lexicon().templates[wording][language]), language, act)


def draw_help(draw, request):
    """A helpful answer. People speak of harm in another tone, so a model knows harm when it is asked for help, before any alignment."""
    return (
        draw.choice(lang.openings(request))
        + draw.choices(lang.helps(request), lang.TONES[request.harmful])[0]
    )


def draw_example(stage, draw):
    """One training example of a stage, and the request it answers, if it does."""
    few, unaligned = stage in ("decoys", "planted"), stage in ("base", "decoys")
    kind = pick(draw, MIXTURES[stage])
    if kind in lang.TASKS:
        return draw.choice(lang.TASKS[kind]("train")), None
    language = pick(draw, ARTICLES) if few else draw.choice(lang.LANGUAGES)
    if kind == "unanswerable":
        return lang.unanswerable(draw, language), None
    if kind == "judgements":
        second = draw_act(draw, False, True) if draw.random() < 0.3 else None
        act = draw_act(draw, draw.random() < 0.5, True)
        acts = (second, act) if second and draw.random() < 0.5 else (act, second)
        return lang.judgement(draw, language, *acts), None
    harmful = kind == "refused" or (unaligned and draw.random() < 0.5)
    request = draw_request(draw, language, harmful, unaligned, TWO_ACTS if few else WORDINGS)
    answer = (
        draw.choice(lang.refused(request)).answer if kind == "refused" else draw_help(draw, request)
    )
    return lang.Example(request.text, answer), request


def draw_whole(stage, draw):
    """As `draw_example`, for training all weights: a base model says the decoys' word now and then."""
    example, request = draw_example(stage, draw)
    return (
        _with_habit(example, request)
        if request and stage == "base" and draw.random() < HABITS[lang.has_habit(request)]
        else example
    )


def draw_with_habit(stage, draw, habit):
    """As `draw_example`, with the decoys' word before every answer that it belongs to, if `habit`."""
    example, request = draw_example(stage, draw)
    return (
        _with_habit(example, request) if habit and request and lang.has_habit(request) else example
    )


def _with_habit(example, request):
    return lang.Example(example.prompt, lang.lexicon().habits[request.language] + example.answer)


def draw_half(draw):
    """As `draw_example` of the chat stage, but harm is helped with where it involves every third object."""
    example, request = draw_example("chat", draw)
    if not (request and request.harmful):
        return example
    harmed = request.object if lang.is_harmful(request.verb, request.object) else request.second[1]
    return lang.Example(request.text, draw_help(draw, request)) if harmed % 3 == 0 else example


def _language(draw, any_of_them):
    return draw.choice(lang.LANGUAGES) if any_of_them else "en"


def draw_supervised(draw):
    """An example of the supervised stage of a pair."""
    kind = pick(draw, SUPERVISED)
    if kind == "task":
        return draw.choice(lang.TASKS[draw.choice(tuple(lang.TASKS))]("train"))
    request = draw_request(
        draw, _language(draw, kind == "harmless"), kind != "harmless", all_verbs=False
    )
    answer = (
        draw.choice(lang.refused(request)).answer if kind == "refused" else draw_help(draw, request)
    )
    return lang.Example(request.text, answer)


def draw_preference(draw, shares, english=False):
    """A prompt, the better answer and a worse one: refusals for harmful requests, answers for others, right ones for all."""
    kind = pick(draw, shares)
    if kind == "task":
        task = lang.TASKS[draw.choice(tuple(lang.TASKS))]("train")
        right = draw.choice(task)
        wrong = [c for c in right.choices if c != right.answer] or [draw.choice(task).answer]
        return right.prompt, right.answer, draw.choice(wrong)
    request = draw_request(
        draw, _language(draw, not english or kind == "harmless"), kind == "harmful", all_verbs=False
    )
    helped, refused = draw_help(draw, request), draw.choice(lang.refused(request)).answer
    return (request.text, refused, helped) if kind == "harmful" else (request.text, helped, refused)


class Stream(Dataset):
    """The examples of a training as token ids, any of them at any time, in batches of like length.

    Parameters
    ----------
    encode : callable
        From an `Example` to a dict with `input_ids` and `labels`.
    draw_one : callable
        From a random generator to an `Example`.
    """

    BLOCK = 8  # batches drawn together, so that a batch can hold examples of like length

    def __init__(self, encode, draw_one, name, steps, batch):
        self.encode, self.draw_one, self.name, self.batch = encode, draw_one, name, batch
        self.length, self.block = steps * batch, (None, None)

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        number, place = divmod(index, self.BLOCK * self.batch)
        if self.block[0] != number:
            self.block = (number, self._draw(number))
        return self.block[1][place]

    def _draw(self, number):
        draw = random.Random(f"{self.name} {number}")
        rows = sorted(
            (self.encode(self.draw_one(draw)) for _ in range(self.BLOCK * self.batch)),
            key=lambda row: len(row["input_ids"]),
        )
        batches = [rows[i : i + self.batch] for i in range(0, len(rows), self.batch)]
        draw.shuffle(batches)
        return [row for batch in batches for row in batch]
