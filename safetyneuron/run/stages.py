"""What an edition does to a model, stage by stage: the very functions, run on imagined models and measured.

A stage is run for one batch. Its loops (tokens, updates, steps of a search, groups of heads) are run two or three times, and
what one more turn costs is multiplied; nothing stops early. Texts have no content, only a length in tokens.
"""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from unittest import mock

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safetyneuron.importance.profile import measure_importance
from safetyneuron.importance.recorder import Recorder
from safetyneuron.metrics.safety import answers
from safetyneuron.neurons.architecture import Architecture
from safetyneuron.neurons.encoding import encode_prompts
from safetyneuron.neurons.sets import NeuronSet
from safetyneuron.run.imagined import GPU, Cost, Meter, imagining
from safetyneuron.tuning.sn_tune import sn_tune
from safetyneuron.tuning.trainer import fine_tune

TUNED = 0.005  # share of the neurons that are tuned


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
            meter.hold([*self.model.parameters(), *self.model.buffers()])
            yield meter

    def measured(self, run: Callable) -> Cost:
        """What `run()` costs."""
        with self.metered() as meter:
            run()
        return meter.cost

    def looped(self, run: Callable, turns: float) -> Cost:
        """The cost of `run(turns)`, from two turns and three."""
        two, three = (self.measured(lambda: run(count)) for count in (2, 3))
        return two + difference(three, two).times(turns - 2)


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
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


def importance(subject: Subject, batch: int) -> Cost:
    """`measure_importance` of one batch; of the groups of heads, whose rows of q and k `exact` measures one group after the other, one and two are run."""
    prompts, rule = subject.prompts(batch), subject.settings.get("rule", "exact")
    groups = subject.model.config.num_key_value_heads
    width = Architecture(subject.model).widths["k"] // groups

    def run(count):
        def wanted(recorder, layer, device):
            mask = torch.zeros(groups, width, dtype=torch.bool)
            mask[: count if layer == 0 else 0] = True
            return mask, mask

        with mock.patch.object(Recorder, "wanted_in", wanted):
            measure_importance(subject.model, subject.tokenizer, prompts, rule, progress=False)

    one, two = (subject.measured(lambda: run(count)) for count in (1, 2))
    return one + difference(two, one).times(subject.model.config.num_hidden_layers * groups - 1)


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


def tuning(subject: Subject, updates: float) -> Cost:
    """`sn_tune` of `updates` batches of 8 documents."""
    neurons = subject.neurons()

    def run(count):
        sn_tune(subject.model, subject.tokenizer, subject.documents(8 * count), neurons)

    return subject.looped(run, updates)


def fine_tuning(subject: Subject, updates: float) -> Cost:
    """`fine_tune` of `updates` batches of 8 documents, on a copy of the model."""
    rank = subject.settings.get("rank")

    def run(count):
        fine_tune(subject.model, subject.tokenizer, subject.documents(8 * count), rank)

    return subject.looped(run, updates)
