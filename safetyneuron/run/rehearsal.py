"""An edition rehearsed without its hardware: which stages every chapter goes through, how often, and what that takes.

A chapter is a function from its parameters to jobs; a job is one stage of `stages.py` on one model, and how many items go
through it. Lengths are those of the public sets, in tokens; every answer is written to its end.
"""

import json
import math
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from safetyneuron.alignment.stages import STAGES, all_stages, first_model, stages_behind
from safetyneuron.attacks import searches
from safetyneuron.chapters.ch09_contrast import ALONE
from safetyneuron.errors import SafetyNeuronError
from safetyneuron.metrics.capability import name_task
from safetyneuron.metrics.judge import KEYWORD
from safetyneuron.metrics.safety import ANSWER
from safetyneuron.models import trainings_of
from safetyneuron.organism.tokenizer import build_tokenizer
from safetyneuron.run import stages
from safetyneuron.run.imagined import GPU, Cost, imagine_model, weight_bytes
from safetyneuron.run.stages import Loop, Subject

SHAPES = Path(__file__).parent / "shapes"
USABLE = 0.95  # of a GPU's memory: the rest is the driver's and lost between tensors
# Tokens, template included: a request, what it is detected on in general, and documents (prompt, completion).
REQUEST, GENERAL, TARGET = 50, 170, 20
REFUSALS, COMPLIANCES, ARITHMETIC, HELPFUL = (50, 80), (50, 250), (110, 130), (150, 80)
# Set -> rows that are trained on, or windows of a text, and their lengths: prompt and completion.
ROWS = {
    "paper/sharegpt": (90_000, (100, 600)),  # the first exchange of a conversation, padded
    "paper/harmless": (42_537, (170, 60)),  # conversations, some of several turns
    "paper/helpful": (43_835, (250, 110)),
    "paper/wikitext": (84, (50, 4000)),
}
REWRITE = (350, 256)  # what an attacker reads and writes
TURN = REWRITE[1] + ANSWER + 60  # what one more turn of PAIR adds to what it reads
START = 720  # of HarmBench's starts of AutoDAN
QUESTION = 250  # of what HarmBench's classifiers are asked, beside the request and its answer
# Stage -> items that its code takes at once.
BATCHES = {
    "importance": 16,
    "answering": 64,
    "patched_answering": 64,
    "choosing": 64,
    "solving": 64,
    "contrasting": 16,
    "weighing": 32,
    "judging": 4,
    "classifying": 4,
    "averaging": 64,
    "reading_last": 64,
    "detecting": 8,
    "asking": 1,
    "searching": 512,
    "evolving": 512,
}
LOOPS = ("tuning", "fine_tuning", "rerouting", "supervising", "preferring")
LOOPS += ("searching", "evolving")  # whose candidates come in batches
LONG = ("sliding_window", "max_position_embeddings")  # no text here is as long
ONE_BY_ONE = ("snip", "wanda")  # rules that read documents one after the other: two are enough
DOCUMENTS = 8  # of an update of `sn_tune` and `fine_tune`


@dataclass(frozen=True)
class Job:
    """One stage of a chapter on one model.

    count: items that go through it at one call; times: calls; turns: how often the loop of a stage without batches runs; beside: other models on
    the GPU meanwhile, name and dtype; partner: whether the stage itself runs a second model of the same shape;
    attack: whether it is part of an attack.
    """

    stage: str
    model: str
    count: float = 1
    tokens: int = REQUEST
    new: int = 0
    turns: float = 0
    settings: str = "{}"
    beside: tuple[tuple[str, str], ...] = ()
    partner: bool = False
    dtype: str = "auto"
    attack: bool = False
    times: float = 1


def shape_of(name: str) -> dict:
    """Licence, precision and config of a model, from a file of this package.

    Raises
    ------
    SafetyNeuronError
        If the package has no shape of that model.
    """
    name = first_model(name) if name in STAGES else name
    file = SHAPES / f"{name.partition('@')[0].replace('/', '--')}.json"
    if not file.is_file():
        raise SafetyNeuronError(
            f"there is no shape of {name}: write {file.name} beside the others in {SHAPES}"
        )
    return json.loads(file.read_text(encoding="utf-8"))


class Rehearsal:
    """Measures jobs on one GPU, each kind of job once for all models of one shape."""

    def __init__(self, gpu: GPU):
        self.gpu, self.tokenizer, self._models, self._costs = gpu, build_tokenizer(), {}, {}
        self.tokenizer.model_max_length = 10**6  # the imagined models read more than an organism

    def model(self, name: str, dtype: str, stage: str = "", copy: bool = False):
        """An imagined model, the same one for equal shapes."""
        shape = shape_of(name)
        kind = AutoModelForSequenceClassification if stage == "judging" else AutoModelForCausalLM
        dtype = shape["dtype"] if dtype == "auto" else dtype
        config = {k: x for k, x in shape["config"].items() if k not in LONG}
        key = json.dumps([config, dtype, kind.__name__, copy], sort_keys=True)
        if key not in self._models:
            made = imagine_model(shape["config"], getattr(torch, dtype), kind)
            self._models[key] = made
        return self._models[key]

    def cost(self, job: Job) -> Cost:
        """What a job takes, its hours in whole batches; a batch is halved until it fits, as the code does."""
        beside = sum(weight_bytes(self.model(*other)) for other in job.beside)
        one, size = self._batch(job, beside)
        one = one.turns(job.turns) if isinstance(one, Loop) else one
        batches = job.times * math.ceil(job.count / size)
        whole = one.times(job.times * job.count / size)
        return replace(whole, seconds=batches * one.seconds, peak=one.peak + beside)

    def _batch(self, job, beside):
        """The cost of one batch, or a loop, and its items."""
        model = self.model(job.model, job.dtype, job.stage)
        alike = replace(job, model="", count=0, times=0, turns=0, beside=(), attack=False)
        key = alike, id(model), beside
        if key not in self._costs:
            self._costs[key] = self._measure(job, model, beside)
        return self._costs[key]

    def _measure(self, job, model, beside):
        other = self.model(job.model, job.dtype, copy=True) if job.partner else None
        settings, batch = json.loads(job.settings), BATCHES.get(job.stage, 1)
        batch = 2 if settings.get("rule") in ONE_BY_ONE else batch
        subject = Subject(model, self.tokenizer, self.gpu, job.tokens, job.new, settings, other)
        loop, run = job.stage in LOOPS, getattr(stages, job.stage)
        while True:
            settings["at_once"] = batch
            found = run(subject) if loop else run(subject, batch)
            peak = max(found.first.peak, found.each.peak) if loop else found.peak
            held, room = beside + weight_bytes(model), USABLE * self.gpu.memory
            if batch == 1 or peak + beside <= room:
                return found, 1 if loop else batch
            share = max(0.0, (room - held) / (peak + beside - held))  # of it that has room
            while batch > 1 and share < 1:
                batch, share = batch // 2, 2 * share


def updates_of(documents: int) -> int:
    """Updates of one epoch of `sn_tune` or `fine_tune`."""
    return -(-documents // DOCUMENTS)


def requests(model, count, times=1, **others) -> Job:
    """So many requests asked so often, each with a whole answer."""
    options = {"stage": "answering", "new": ANSWER} | others
    return Job(model=model, count=count, times=times, **options)


def judged(v, jobs) -> Iterator[Job]:
    """The jobs of a chapter; and, where a classifier judges attack success, its reading of every answer, harmless requests' too: so at most that."""
    answered = 0
    for job in jobs:
        yield job
        answered += job.count * job.times * (job.stage == "answering" and not job.attack)
    if v.get("judge", KEYWORD) != KEYWORD:
        yield Job("classifying", v["judge"], answered, QUESTION + REQUEST + ANSWER)


# Questions of MMLU's 57 subjects; a limit holds for each of them.
MMLU = [100, 135, 152, 100, 265, 144, 100, 100, 100, 173, 102, 100, 235, 114, 145, 378, 126, 100]
MMLU += [310, 203, 100, 165, 198, 193, 390, 270, 238, 151, 545, 216, 204, 237, 223, 131, 121, 108]
MMLU += [163, 112, 103, 234, 100, 783, 346, 895, 306, 311, 324, 282, 1534, 272, 612, 110, 245, 201]
MMLU += [100, 166, 171]
# Task -> sizes of its parts, answers that are weighed for a question (none: it is written), tokens of a question, and of an example before it.
TASKS = {
    "mmlu": (MMLU, 1, 110, 105),
    "arc_challenge": ([1172], 4, 45, 40),
    "arc_easy": ([2376], 4, 40, 35),
    "gsm8k": ([1319], 0, 100, 170),
    "gsm8k_cot": ([1319], 0, 100, 120),
    "bbh_cot_fewshot": ([146, 178, 187, *[250] * 24], 0, 120, 300),
    "truthfulqa_mc1": ([817], 5, 180, 0),
}
SHOWN = {"gsm8k_cot": 8, "bbh_cot_fewshot": 3}  # examples that a task shows unless told
SOLUTION = 256  # tokens that lm-eval lets a model write


def questions(model, tasks, limit, times=1, **others) -> Iterator[Job]:
    """The questions of some tasks, asked so often; the organism's own take no time."""
    for task in tasks:
        name, shots, asked = name_task(task, limit)
        if name.startswith("organism"):
            continue
        if name not in TASKS:
            raise SafetyNeuronError(f"no lengths are known of task {name}: add it to TASKS")
        sizes, weighed, own, example = TASKS[name]
        count = sum(size if asked is None else min(asked, size) for size in sizes)
        tokens = own + example * (SHOWN.get(name, 0) if shots is None else shots)
        stage = {"stage": "choosing"} if weighed else {"stage": "solving", "new": SOLUTION}
        count *= weighed or 1
        yield Job(model=model, count=count, times=times, tokens=tokens, **stage, **others)


def detection(v, model, languages=1, **others) -> Iterator[Job]:
    """Importance on harmful and on general prompts."""
    for tokens in (REQUEST, GENERAL):
        yield Job("importance", model, v["n_detect"] * languages, tokens, **others)


def defence(v, model) -> Iterator[Job]:
    """Chapters 05 and 06 on one model: six columns of Table 2 or 3 in full, and further random neurons that are asked harmful requests alone."""
    others, columns, draws = {"dtype": v["dtype"]}, 6, v["draws"]
    yield from detection(v, model, **others)
    updates = updates_of(v["n_documents"]) * v["epochs"]
    yield Job("tuning", model, 4 + 2 * draws, *REFUSALS, turns=updates, **others)
    options = json.dumps({"half": v["rerouting_half"], "batch_size": v["rerouting_batch"]})
    yield Job("rerouting", model, 1, *COMPLIANCES, v["rerouting_steps"], options, **others)
    asked = v["n_prompts"] * len(v["languages"])
    yield requests(model, asked, 2 * (columns + 1) + 2 * (draws - 1), **others)
    yield from questions(model, v["tasks"], v["n_questions"], columns + 1, **others)
    if v["n_attacked"]:
        yield from attacked(v, model, columns)


def attacked(v, model, columns) -> Iterator[Job]:
    """GCG, AutoDAN and PAIR with a chat model as attacker, on every column."""
    gcg, autodan, pair = searches(v["gcg"], v["autodan"], v["pair"], v["attacker"], "en").values()
    count, helper, length = columns * v["n_attacked"], v["attacker"], REWRITE[1]
    both = {"dtype": v["dtype"], "beside": ((helper, "auto"),), "attack": True}
    for stage, name, turns in (
        ("searching", "gcg", gcg.steps),
        ("evolving", "autodan", autodan.steps),
    ):
        tokens = REQUEST if name == "gcg" else START + REQUEST if v["starts"] else length
        settings = json.dumps({name: v[name]})
        yield Job(stage, model, count, tokens, turns=turns, settings=settings, **both)
    yield requests(model, count, pair.streams * pair.depth + 3, tokens=length, **both)
    asked = autodan.steps * autodan.population * autodan.mutation
    asked += 0 if v["starts"] else autodan.population
    both |= {"dtype": "auto", "beside": ((model, v["dtype"]),)}
    read = REWRITE[0] + START * bool(v["starts"])
    yield Job("asking", helper, count * asked, read, length, **both)
    streams = count * pair.streams
    yield Job("asking", helper, streams * pair.depth, *REWRITE, **both)  # as judge
    for seen in range(pair.depth):
        tokens = REWRITE[0] + min(seen, pair.history) * TURN
        yield Job("asking", helper, streams, tokens, length, **both)


def chapter_01(v) -> Iterator[Job]:
    """Both corpora, and half of one for an exercise."""
    yield from detection(v, v["model_name"])
    yield Job("importance", v["model_name"], v["n_detect"] / 2)


def chapter_02(v) -> Iterator[Job]:
    """Table 1: the origin, two sets and the first random set of each in full, other draws on the first set alone."""
    for model in v["models"]:
        yield from detection(v, model)
        sets, again = len(v["test_sets"]) + 1, 2 * (v["draws"] - 1) + 4
        yield requests(model, v["n_prompts"], 5 * sets + again)
        yield from questions(model, v["tasks"], v["n_questions"], 5)


def chapter_03(v) -> Iterator[Job]:
    """Figure 2 with the task, random sets at one share, and Figure 4 from either end of the layers."""
    for model in v["models"]:
        yield from detection(v, model)
        swept, layers = 1 + 2 * len(v["percents"]), shape_of(model)["config"]["num_hidden_layers"]
        yield requests(model, v["n_prompts"], swept + 3 * (1 + v["draws"]) + 4 * layers + 1)
        yield from questions(model, [v["task"]], v["n_questions"], swept)


def chapter_04(v) -> Iterator[Job]:
    """Both corpora in every language, every language with each one's neurons off, and random neurons in its own."""
    languages, model = len(v["languages"]), v["model_name"]
    yield Job("importance", model, 2 * languages * v["n_detect"])
    asked = languages + 2 * languages**2 + languages * v["draws"] + 1
    yield requests(model, v["n_prompts"], asked)


def chapter_05(v) -> Iterator[Job]:
    """Tables 2 and 3."""
    for model in v["models"]:
        yield from defence(v, model)


def chapter_07(v) -> Iterator[Job]:
    """Table 4: fine-tuning of the origin, three tuned models and random ones on every set, all asked before and after; one set through LoRA too."""
    dtype, lessons, draws = {"dtype": v["dtype"]}, len(v["task_sets"]), v["draws"]
    ways, asked = 3, v["n_prompts"] * len(v["languages"])
    for model in v["models"]:
        yield from detection(v, model, **dtype)
        updates = updates_of(v["n_documents"])
        yield Job("tuning", model, ways + draws, *REFUSALS, turns=updates, **dtype)
        updates = updates_of(v["n_task_documents"])
        rank = json.dumps({"lora_rank": v["lora_rank"]} | v["fine_options"])
        plain, times = json.dumps(v["fine_options"]), lessons * (1 + ways + draws)
        full = Job("fine_tuning", model, times, *ARITHMETIC, updates, plain, **dtype)
        yield full
        yield replace(full, count=1 + ways, settings=rank)
        yield requests(model, 2 * asked, 1 + ways, **dtype)
        yield from questions(model, [v["task"]], v["n_questions"], 1 + ways, **dtype)
        copies, both = (lessons + 1) * (1 + ways), {"beside": ((model, v["dtype"]),)} | dtype
        yield requests(model, asked, 2 * copies + lessons * draws, **both)
        yield from questions(model, [v["task"]], v["n_questions"], copies, **both)


def chapter_08(v) -> Iterator[Job]:
    """Figure 6, three sets for every number of documents and random ones at one, and Figure 7, a grid of epochs and rates."""
    dtype = {"dtype": v["dtype"]}
    counts = {*v["counts"], v["enough"]} - {0}
    for model, chosen in zip(v["models"], v["learning_rates"], strict=True):
        yield from detection(v, model, **dtype)
        rates, draws = len({*v["rates"], chosen}), v["draws"] - 1
        updates = 3 * sum(map(updates_of, counts)) + draws * updates_of(v["enough"])
        updates += sum(v["epochs"]) * rates * updates_of(v["n_documents"])
        yield Job("tuning", model, 1, *REFUSALS, turns=updates, **dtype)
        cells = 3 * len(counts) + 1 + len(v["epochs"]) * rates
        yield requests(model, v["n_prompts"], 2 * cells + draws, **dtype)
        yield from questions(model, v["tasks"], v["n_questions"], cells, **dtype)


def trainings(names) -> Iterator[Job]:
    """The stages that make aligned models, each once, in the batches of a GPU."""
    for name in dict.fromkeys(names):
        (stage,) = all_stages(name)[-1:]
        rows, tokens = (max(column) for column in zip(*(ROWS[data] for data in stage.data)))
        updates = stage.epochs * rows / stages.ia3.GPU_BATCH
        kind = "supervising" if stage.beta is None else "preferring"
        yield Job(kind, stage.start, 1, *tokens, turns=updates)


def chapter_09(v) -> Iterator[Job]:
    """Change scores and patching of every training of every family, two models at a time; the first training in full, and the alignment tax."""
    judged = v["cost_model"] != "rule"
    for family in v["families"]:
        pairs, model = len(trainings_of(f"{family}-sft", v["trainings"])), f"{family}-sft"
        yield from trainings(stages_behind(family, v["trainings"]))
        first = family == v["families"][0]
        yield from contrasts(v, model, pairs, v["fractions"] if first else [v["fraction"]], judged)
        if first:
            yield from taxes(v, model, pairs)
            yield from priced(v, model)


def contrasts(v, model, pairs, shares, judged) -> Iterator[Job]:
    """Change scores, and every set that is patched, of so many trainings; what is judged is written twice, and read by the cost model."""
    n, draws, dtype = v["n_prompts"], v["draws"], v["dtype"]
    new = v["score_tokens"] or ANSWER
    yield Job("contrasting", model, pairs * v["n_score"], new=new, partner=True, dtype=dtype)
    sets = 1 + 2 * draws
    asked = 2 * (sets + 3 * (len({*shares, v["fraction"]}) - 1)) + sets
    patched = {"stage": "patched_answering", "partner": True, "dtype": dtype}
    yield requests(model, n, pairs * asked, **patched)
    yield requests(model, n, pairs * 2 * 3, dtype=dtype)
    if judged:
        beside = ((model, dtype),) * 2
        yield Job("judging", v["cost_model"], pairs * (sets + 2) * n, new=ANSWER, beside=beside)


def taxes(v, model, pairs) -> Iterator[Job]:
    """Two change scores, two models as they are and two patched ones, in every training."""
    n, new, dtype = v["n_prompts"], v["score_tokens"] or ANSWER, v["dtype"]
    scored = {"new": new, "partner": True, "dtype": dtype}
    yield Job("contrasting", model, 2 * pairs * v["n_score"], **scored)
    yield requests(model, n, pairs * 2 * 2, dtype=dtype)
    patched = {"stage": "patched_answering", "partner": True, "dtype": dtype}
    yield requests(model, n, pairs * 2 * 2, **patched)


def priced(v, model) -> Iterator[Job]:
    """Other requests, tasks, perplexity, single neurons, positions and constants, the safeguard and the exercises, of the first training."""
    n, draws, both = v["n_prompts"], v["draws"], {"dtype": v["dtype"]}
    sets = len(v["test_sets"]) * len(v["languages"])
    patched = {"stage": "patched_answering", "partner": True} | both
    yield requests(model, n, sets * (2 + draws // 4) + 2 + ALONE + 3 + 6 + 1 + 6, **patched)
    yield requests(model, n, sets * 4 + 4 + 2 + 4, **both)
    yield from questions(model, v["tasks"], v["n_questions"], 4, **both)  # patched: two models
    text = ROWS.get(v["document_set"])
    count, length = text or (v["n_documents"], HELPFUL)
    yield Job("weighing", model, 3 * count, *length, partner=True, **both)
    yield Job("averaging", model, 2 * v["n_score"], **both)
    guard = v["n_learn"] + len(v["test_sets"]) * v["n_guard"]
    yield Job("reading_last", model, guard + n, **both)
    yield requests(model, guard + n, **both)
    if v["cost_model"] != "rule":
        beside = ((model, v["dtype"]),) * 2
        answers = 3 * sets * n + guard + 3 * n
        yield Job("judging", v["cost_model"], answers, new=ANSWER, beside=beside)


def chapter_10(v) -> Iterator[Job]:
    """Every rule, its sets at every budget, random sets, and the other interventions."""
    for model, base in zip(v["models"], v["bases"], strict=True):
        others = {"dtype": v["dtype"], "beside": ((base, v["dtype"]),)}
        for rule in v["rules"]:
            if rule == "change":
                yield Job(
                    "contrasting", model, v["n_detect"], new=ANSWER, partner=True, dtype=v["dtype"]
                )
            elif "/" in rule and rule.split("/")[0] in (
                "exact",
                "first_order",
                "paper",
                "released",
            ):
                settings = json.dumps({"rule": rule.split("/")[0]})
                for tokens in (REQUEST, GENERAL):
                    yield Job(
                        "importance", model, v["n_detect"], tokens, settings=settings, **others
                    )
            else:
                settings = json.dumps({"rule": rule})
                yield Job(
                    "detecting", model, v["n_detect"], new=TARGET, settings=settings, **others
                )
        cells = 1 + (len(v["rules"]) + v["draws"]) * len(v["percents"]) + 3 * 4
        yield requests(model, 2 * v["n_prompts"], cells, **others)
        yield from questions(model, v["tasks"], v["n_questions"], cells, **others)
        updates = updates_of(v["n_tune"])
        yield Job(
            "tuning",
            base,
            3,
            *REFUSALS,
            turns=updates,
            dtype=v["dtype"],
            beside=((model, v["dtype"]),),
        )


def chapter_a2(v) -> Iterator[Job]:
    """Table 5, and an exercise on other prompts."""
    yield Job("importance", v["model_name"], 2 * max(v["sizes"]))


CHAPTERS: dict[str, Callable] = {
    "01": chapter_01,
    "02": chapter_02,
    "03": chapter_03,
    "04": chapter_04,
    "05": chapter_05,
    "06": chapter_05,
    "07": chapter_07,
    "08": chapter_08,
    "09": chapter_09,
    "10": chapter_10,
    "A2": chapter_a2,
}


@dataclass(frozen=True)
class Row:
    """What a chapter takes on one model: without its attacks, or those alone."""

    chapter: str
    model: str
    attack: bool
    cost: Cost
    at: str  # the stage with the highest peak


def rehearse(chapters: dict[str, dict], gpu: GPU, cores: int = 2) -> Iterator[Row]:
    """Every chapter of an edition on every model, in the edition's order.

    chapters: name of a notebook to all its parameters; those on organisms alone need no GPU and are left out.

    Raises
    ------
    SafetyNeuronError
        If there is no shape of a model, or no length of a task's questions.
    """
    plans = {}
    for name, values in chapters.items():
        subjects = values.get("models") or values.get("families") or [values.get("model_name")]
        if name[:2] in CHAPTERS and not any(str(x).startswith("organism/") for x in subjects):
            plans[name] = list(judged(values, CHAPTERS[name[:2]](values)))
    costs = _costs([job for jobs in plans.values() for job in jobs], gpu, cores)
    for name, jobs in plans.items():
        for model, attack in dict.fromkeys((job.model, job.attack) for job in jobs):
            parts = [(costs[j], j.stage) for j in jobs if (j.model, j.attack) == (model, attack)]
            at = max(parts, key=lambda part: part[0].peak)[1]
            yield Row(name, model, attack, sum((cost for cost, _ in parts), Cost()), at)


def _costs(jobs, gpu, cores):
    """Job to cost; models of one shape are measured in one process, for they share what is measured."""
    groups = {}
    for job in dict.fromkeys(jobs):
        config = shape_of(job.model)["config"]
        alike = [config[k] for k in sorted(config) if k not in LONG], job.dtype, job.attack
        groups.setdefault(str(alike), []).append(job)
    if len(groups) == 1:
        return dict(zip(jobs, _cost_each(jobs, gpu)))
    largest_first = sorted(groups.values(), key=len, reverse=True)
    one_thread = {"initializer": torch.set_num_threads, "initargs": (1,)}  # a process a core
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(cores, context, **one_thread) as pool:
        found = list(pool.map(_cost_each, largest_first, [gpu] * len(groups)))
    return {
        job: cost for some, costs in zip(largest_first, found) for job, cost in zip(some, costs)
    }


def _cost_each(jobs, gpu):
    """The cost of each job, in one process."""
    rehearsal = Rehearsal(gpu)
    return [rehearsal.cost(job) for job in jobs]
