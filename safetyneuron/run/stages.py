"""What an edition does to a model, stage by stage: the very functions, run on imagined models and measured.

A stage is run for one batch. Its loops (tokens, updates, steps of a search, groups of heads) are run two or three times, and
what one more turn costs is multiplied; nothing stops early. Texts have no content, only a length in tokens.
"""

import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from unittest import mock

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.optimization import Adafactor

from safetyneuron.alignment import ia3
from safetyneuron.attacks import GCG, AutoDAN, Request, rewriters
from safetyneuron.attacks.likelihood import TargetLoss
from safetyneuron.detectors.case import Case
from safetyneuron.detectors.change_scores import change_scores
from safetyneuron.detectors.direction import refusal_directions
from safetyneuron.detectors.table import DETECTORS
from safetyneuron.importance.exact import CHUNK_BYTES
from safetyneuron.importance.profile import measure_importance
from safetyneuron.importance.recorder import Recorder
from safetyneuron.metrics import cost as judges
from safetyneuron.metrics.capability import language_model
from safetyneuron.metrics.judge import says_yes
from safetyneuron.metrics.perplexity import perplexity
from safetyneuron.metrics.safety import answers
from safetyneuron.neurons.activations import channel_means, last_activations
from safetyneuron.neurons.architecture import Architecture
from safetyneuron.neurons.encoding import encode_prompts
from safetyneuron.neurons.patching import patched_generation
from safetyneuron.neurons.sets import NeuronSet
from safetyneuron.run.imagined import GPU, Cost, Meter, imagine, imagining
from safetyneuron.tuning.circuit_breaker import circuit_break
from safetyneuron.tuning.sn_tune import sn_tune
from safetyneuron.tuning.trainer import fine_tune

TUNED, PATCHED = 0.005, 0.05  # shares of neurons that are tuned, and of feed-forward ones patched


@dataclass
class Subject:
    """One model and the texts that go through it.

    tokens: of a prompt with its template; new: of what is written or trained on after it; settings: what else a stage needs.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    gpu: GPU
    tokens: int
    new: int = 0
    settings: dict = field(default_factory=dict)
    other: PreTrainedModel | None = None  # the donor, the aligned partner, the base model

    @property
    def options(self) -> dict:
        """The settings that are options of what a stage runs; how much is taken at once is not."""
        return {name: value for name, value in self.settings.items() if name != "at_once"}

    def prompts(self, count: int) -> list[str]:
        """So many different prompts of the length asked for."""
        words = [word for word in self.tokenizer.get_vocab() if word.isalpha()][:1000]
        frame = len(encode_prompts(self.model, self.tokenizer, [words[0]])[0]) - 1
        body = " ".join([words[0]] * max(0, self.tokens - frame - 1))
        return [f"{body} {words[i % len(words)]}" for i in range(count)]

    def documents(self, count: int) -> list[dict[str, str]]:
        """So many documents, whose completions have `new` tokens."""
        completion = " ".join(self.prompts(1)[0].split()[:1] * max(1, self.new))
        return [{"prompt": prompt, "completion": completion} for prompt in self.prompts(count)]

    def neurons(self, share: float = TUNED) -> NeuronSet:
        """A random set of neurons of the model's shape."""
        draw = torch.Generator().manual_seed(0)
        masks = NeuronSet.empty(self.model).masks.items()
        return NeuronSet({p: torch.rand(mask.shape, generator=draw) < share for p, mask in masks})

    @contextmanager
    def metered(self) -> Iterator[Meter]:
        """What runs in the block is measured, the model's weights held from the start."""
        with imagining(self.gpu) as meter, _unhashed(), _silent():
            for model in (self.model, *([self.other] if self.other else [])):
                meter.hold([*model.parameters(), *model.buffers()])
            yield meter

    def measured(self, run: Callable) -> Cost:
        """What `run()` costs."""
        with self.metered() as meter:
            run()
        return meter.cost

    def looped(self, run: Callable) -> "Loop":
        """`run(turns)`, from one turn and two."""
        one, two = (self.measured(lambda: run(count)) for count in (1, 2))
        return Loop(one, difference(two, one))

    def trained(self, run: Callable) -> "Loop":
        """A training of so many updates, from `run(2)`: the second one has the optimiser's state."""
        with self.metered() as meter:
            handle = register_optimizer_step_post_hook(lambda *_: meter.lap())
            try:
                run(2)
            finally:
                handle.remove()
        *before, first, second = meter.laps  # the schedule, too, is made with an optimiser
        return Loop(sum(before, first) + meter.cost, second)


@dataclass(frozen=True)
class Loop:
    """What a loop costs: with one turn, and each further one."""

    first: Cost
    each: Cost

    def turns(self, count: float) -> Cost:
        """The cost of so many turns."""
        return self.first + self.each.times(count - 1)


def difference(more: Cost, less: Cost) -> Cost:
    """What the longer of two runs cost beyond the shorter, with its peak."""
    return replace(more + less.times(-1), peak=more.peak)


@contextmanager
def _unhashed():
    """Weights without content have no fingerprint."""
    modules = ("importance.profile", "tuning.sn_tune", "tuning.circuit_breaker")
    patches = [mock.patch(f"safetyneuron.{name}.fingerprint", lambda _: "") for name in modules]
    with patches[0], patches[1], patches[2]:
        yield


@contextmanager
def _silent():
    """Nothing of what a run has to say is true of a model without weights."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def importance(subject: Subject, batch: int) -> Cost:
    """`measure_importance` of one batch; of the groups of heads, whose rows of q and k `exact` measures one after the other, one is run, on as many prompts as it takes at once; of the layers of other rules two."""
    rule, config = subject.settings.get("rule", "exact"), subject.model.config
    if rule != "exact":
        one, two = (_scored(subject, batch, rule, layers) for layers in (1, 2))
        return one + difference(two, one).times(config.num_hidden_layers - 1)
    groups = config.num_key_value_heads
    width = Architecture(subject.model).widths["k"] // groups
    maps = 4 * config.num_attention_heads // groups * subject.tokens**2
    few = min(batch, max(1, CHUNK_BYTES // maps))

    def measure(prompts, count):
        def wanted(recorder, layer, device):
            mask = torch.zeros(groups, width, dtype=torch.bool)
            mask[: count if layer == 0 else 0] = True
            return mask, mask

        some = subject.model, subject.tokenizer, subject.prompts(prompts), rule
        with mock.patch.object(Recorder, "wanted_in", wanted):
            return subject.measured(lambda: measure_importance(*some, progress=False))

    whole, one, none = measure(batch, 0), measure(few, 1), measure(few, 0)
    every = difference(one, none).times(batch / few * config.num_hidden_layers * groups)
    return whole + replace(every, peak=whole.peak + one.peak - none.peak)


def _scored(subject, batch, rule, layers):
    """The cost of a rule whose attention scores are computed in the first layers only, and read from the last of these in all others."""
    score, found = Recorder._attention_scores, []

    def first_layers(recorder, layer, attention):
        if layer < layers:
            found.append(score(recorder, layer, attention))
        return found[-1]

    some = subject.model, subject.tokenizer, subject.prompts(batch), rule
    with mock.patch.object(Recorder, "_attention_scores", first_layers):
        return subject.measured(lambda: measure_importance(*some, progress=False))


def written(subject: Subject, run: Callable, new: int) -> Cost:
    """The cost of `run(new)`, which writes `new` tokens: it writes 4, and what a step costs more than the one before goes on growing."""
    with subject.metered() as meter:
        handle = subject.model.register_forward_pre_hook(lambda *_: meter.lap())
        run(4)
        handle.remove()
    before, reading, first, second = meter.laps
    steps, growth = new - 1, difference(second, first)
    peak = second.peak + (steps - 2) * max(0, second.peak - first.peak)
    writing = first.times(steps) + growth.times(steps * (steps - 1) / 2)
    return before + reading + replace(writing, peak=peak)


def answering(subject: Subject, batch: int) -> Cost:
    """`answers` to one batch."""
    model, tokenizer, prompts = subject.model, subject.tokenizer, subject.prompts(batch)
    return written(subject, lambda new: answers(model, tokenizer, prompts, new), subject.new)


def tuning(subject: Subject) -> Loop:
    """`sn_tune`, an update 8 documents."""
    neurons = subject.neurons()

    def run(count):
        sn_tune(subject.model, subject.tokenizer, subject.documents(8 * count), neurons)

    return subject.trained(run)


def fine_tuning(subject: Subject) -> Loop:
    """`fine_tune` on a copy of the model, an update 8 documents."""

    def run(count):
        documents = subject.documents(8 * count)
        fine_tune(subject.model, subject.tokenizer, documents, **subject.options)

    product = Adafactor._approx_sq_grad  # its factors are made anew, and real: it would be computed

    def imagined(*factors):
        return product(*(imagine(factor) for factor in factors))

    with mock.patch.object(Adafactor, "_approx_sq_grad", staticmethod(imagined)):
        return subject.trained(run)


def rerouting(subject: Subject) -> Loop:
    """`circuit_break`."""
    both = [subject.documents(subject.options["batch_size"])] * 2

    def run(count):
        circuit_break(subject.model, subject.tokenizer, *both, steps=count, **subject.options)

    return subject.trained(run)


def patched_answering(subject: Subject, batch: int) -> Cost:
    """`answers` of one batch while the feed-forward neurons that alignment moved most take the other model's values."""
    neurons = subject.neurons(PATCHED).only(["down"])
    with patched_generation(subject.model, subject.other, neurons):
        return answering(subject, batch)


def choosing(subject: Subject, batch: int) -> Cost:
    """lm-eval's likelihood of one batch of answers, of a few tokens each."""
    from lm_eval.api.instance import Instance

    pairs = [(prompt, " a a") for prompt in subject.prompts(batch)]
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    asks = language_model(subject.model, subject.tokenizer)
    return subject.measured(lambda: asks.loglikelihood(asked, disable_tqdm=True))


def solving(subject: Subject, batch: int) -> Cost:
    """lm-eval's written answers to one batch of questions."""
    from lm_eval.api.instance import Instance

    asks = language_model(subject.model, subject.tokenizer)

    def run(new):
        how = {"until": ["\n\n"], "max_gen_toks": new, "do_sample": False}
        pairs = [(prompt, how) for prompt in subject.prompts(batch)]
        asked = [Instance("generate_until", {}, pair, i) for i, pair in enumerate(pairs)]
        asks.generate_until(asked, disable_tqdm=True)

    return written(subject, run, subject.new)


def contrasting(subject: Subject, batch: int) -> Cost:
    """`change_scores` of one batch: its answers, and both models' reading of them."""
    whole = replace(subject, tokens=subject.tokens + subject.new - 2)
    case = subject.model, subject.other, subject.tokenizer, whole.prompts(batch)
    read = subject.measured(lambda: change_scores(*case, max_new_tokens=2))
    begun = subject.measured(lambda: answers(case[0], case[2], case[3], 2))
    return answering(subject, batch) + difference(read, begun)


def weighing(subject: Subject, batch: int) -> Cost:
    """`perplexity` of one batch of documents."""
    documents = subject.documents(batch)
    return subject.measured(lambda: perplexity(subject.model, subject.tokenizer, documents))


def judging(subject: Subject, batch: int) -> Cost:
    """A cost model, the subject's, on so many conversations, one by one."""
    texts = [" ".join(prompt.split()[: subject.new]) for prompt in subject.prompts(batch)]
    classifier = mock.patch.object(
        judges, "_classifier", lambda name: (subject.model, subject.tokenizer)
    )
    with classifier:
        return subject.measured(lambda: judges.CostModel("")(subject.prompts(batch), texts))


def classifying(subject: Subject, batch: int) -> Cost:
    """`says_yes` of a classifier, the subject, on so many answers, one by one."""
    asked = subject.prompts(batch)
    return subject.measured(
        lambda: [says_yes(subject.model, subject.tokenizer, question) for question in asked]
    )


def averaging(subject: Subject, batch: int) -> Cost:
    """`channel_means` of one batch."""
    prompts = subject.prompts(batch)
    return subject.measured(lambda: channel_means(subject.model, subject.tokenizer, prompts))


def reading_last(subject: Subject, batch: int) -> Cost:
    """`last_activations` of one batch."""
    prompts = subject.prompts(batch)
    return subject.measured(lambda: last_activations(subject.model, subject.tokenizer, prompts))


def detecting(subject: Subject, batch: int) -> Cost:
    """A rule of the table of detectors, named `rule`, on so many prompts and documents of each kind."""
    rule = subject.settings["rule"]
    case = Case(
        subject.model,
        subject.tokenizer,
        *[subject.prompts(batch)] * 3,
        *[subject.documents(batch)] * 2,
        subject.other,
    )
    if rule == "direction":  # what it does with the weights afterwards takes no time
        sides = subject.model, subject.tokenizer, case.harmful, case.benign
        return subject.measured(lambda: refusal_directions(*sides))
    return subject.measured(lambda: DETECTORS[rule].find(case))


def _at_once(subject):
    """So many candidates of a search are weighed at once as `at_once` says."""
    defaults = (), subject.settings["at_once"]
    return mock.patch.object(TargetLoss.__init__, "__defaults__", defaults)


def searching(subject: Subject) -> Loop:
    """GCG for one request."""
    request = Request(subject.prompts(1)[0], " ".join(subject.prompts(1)[0].split()[:1] * 10))
    budget = subject.settings["gcg"]

    def run(count):
        GCG(**budget | {"steps": count}).search(subject.model, subject.tokenizer, [request])

    with _at_once(subject):
        return subject.looped(run)


class _Keeping:
    """A rewriter that leaves prompts as they are: what rewriting takes is counted by `asking`."""

    def keeps(self, request, prompt):
        return bool(prompt.strip())

    def rewrite(self, request, prompt, draw, *feedback):
        return prompt


def evolving(subject: Subject) -> Loop:
    """AutoDAN for one request, without its rewriter."""
    request = Request(subject.prompts(1)[0], " ".join(subject.prompts(1)[0].split()[:1] * 10))
    budget = subject.settings["autodan"] | {"rewriter": _Keeping()}

    def run(count):
        AutoDAN(**budget | {"steps": count}).search(subject.model, subject.tokenizer, [request])

    with _at_once(subject):
        return subject.looped(run)


def asking(subject: Subject, batch: int) -> Cost:
    """One answer of an attacker, the subject; `batch` is 1, for attackers are asked one by one."""
    (text,) = subject.prompts(batch)

    def run(new):
        loaded = mock.patch.object(
            rewriters, "_loaded", lambda name: (subject.model, subject.tokenizer)
        )
        with loaded, mock.patch.object(rewriters, "REWRITER_TOKENS", new):
            rewriters.ask("", [text], seed=0)

    return written(subject, run, subject.new)


def supervising(subject: Subject) -> Loop:
    """`supervise`, in the batches that a GPU gets."""

    def run(count):
        ia3.supervise(
            subject.model, subject.tokenizer, subject.documents(ia3.GPU_BATCH * count),
            epochs=1, batch_size=ia3.GPU_BATCH,
        )  # fmt: skip

    return subject.trained(run)


def preferring(subject: Subject) -> Loop:
    """`prefer`, in the batches that a GPU gets."""

    def run(count):
        pairs = [
            {"prompt": d["prompt"], "chosen": d["completion"], "rejected": d["completion"]}
            for d in subject.documents(ia3.GPU_BATCH * count)
        ]
        ia3.prefer(subject.model, subject.tokenizer, pairs, epochs=1, batch_size=ia3.GPU_BATCH)

    return subject.trained(run)
