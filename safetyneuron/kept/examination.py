"""What every detector's neurons are asked in chapter 10, computed once and kept."""

from dataclasses import asdict, dataclass

from safetyneuron.cache import remember
from safetyneuron.data.documents import load_documents
from safetyneuron.data.prompts import load_prompts
from safetyneuron.kept.defences import tuned
from safetyneuron.metrics.capability import correct_answers
from safetyneuron.metrics.perplexity import perplexity
from safetyneuron.metrics.refusal import is_coherent_compliance, is_refusal
from safetyneuron.metrics.safety import answers
from safetyneuron.neurons.activations import channel_means, mean_ablated
from safetyneuron.neurons.deactivation import deactivate, transplant
from safetyneuron.neurons.identity import identity

ZERO, MEAN, BASE, TUNE = (
    "zero",
    "mean activation",
    "base model's parameters",
    "SN-Tune of the base model",
)


@dataclass(frozen=True)
class Exam:
    """What every intervention is asked: test prompts, benign prompts, tasks, and harmless answers for perplexity."""

    harmful: str
    benign: str
    tasks: tuple
    documents: str
    prompts: int = 60
    questions: int = 60
    language: str = "en"

    def load(self):
        """Harmful and benign prompts, and documents."""
        harmful, benign = (
            load_prompts(name, language=self.language)[: self.prompts]
            for name in (self.harmful, self.benign)
        )
        return (
            harmful,
            benign,
            load_documents(self.documents, split="test", language=self.language)[: self.prompts],
        )


def examine(model, tokenizer, exam):
    """One or zero per prompt and question, computed once and then read from the cache.

    Returns
    -------
    dict of str to list
        `asr` and `coherent` per harmful prompt, `over_refusal` per benign one, `accuracy` per question, `perplexity` as [value].
    """
    asked = exam.load()
    key = [identity(model, tokenizer, __name__), asdict(exam), asked]
    return remember("comparison", key, lambda: _examine(model, tokenizer, exam, asked))


def _examine(model, tokenizer, exam, asked):
    harmful, benign, documents = asked
    harm, help_ = answers(model, tokenizer, harmful), answers(model, tokenizer, benign)
    correct = correct_answers(model, tokenizer, exam.tasks, exam.questions)
    value = perplexity(model, tokenizer, documents)[0]
    return {
        "asr": [int(not is_refusal(text)) for text in harm],
        "coherent": [
            int(is_coherent_compliance(prompt, text)) for prompt, text in zip(harmful, harm)
        ],
        "over_refusal": [int(is_refusal(text)) for text in help_],
        "accuracy": [right for task in correct.values() for _, right in task],
        "perplexity": [value],
    }


def matrix(model, tokenizer, exam, detectors, budgets):
    """Every detector's set at every budget, set to zero: {(detector, budget): outcomes}; where too few neurons are left, nothing."""
    found = {}
    for name, detector in detectors.items():
        for budget in budgets:
            neurons = detector.select(budget)
            if neurons is not None:
                with deactivate(model, neurons):
                    found[name, budget] = examine(model, tokenizer, exam)
    return found


def other_interventions(
    model, base, tokenizer, exam, detectors, budget, prompts, documents, learning_rate
):
    """What else can be done to the sets of one budget: {(detector, intervention): outcomes}.

    prompts: for mean activations; documents and learning_rate: for training the base model.
    """
    means, found = channel_means(model, tokenizer, prompts), {}
    for name, detector in detectors.items():
        neurons = detector.select(budget)
        if neurons is None:
            continue
        with mean_ablated(model, neurons, means):
            found[name, MEAN] = examine(model, tokenizer, exam)
        with transplant(model, base, neurons):
            found[name, BASE] = examine(model, tokenizer, exam)
        delta = tuned(base, tokenizer, documents, neurons, learning_rate=learning_rate)
        with delta.merged(base):
            found[name, TUNE] = examine(base, tokenizer, exam)
    return found
