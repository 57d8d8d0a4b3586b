"""Change scores of a pair of models, measured once and kept."""

from safetyneuron.detectors.change_scores import ChangeScores
from safetyneuron.detectors.change_scores import change_scores as measure
from safetyneuron.kept.files import keep_file
from safetyneuron.neurons.identity import identity, model_digest


def change_scores(model, aligned, tokenizer, prompts, max_new_tokens=None):
    """`safetyneuron.change_scores`, computed once and then read from the cache."""
    pair = identity(model, tokenizer, "safetyneuron.detectors.change_scores"), model_digest(aligned)
    return keep_file(
        "change_scores",
        [*pair, prompts, max_new_tokens],
        lambda: measure(model, aligned, tokenizer, prompts, max_new_tokens),
        ChangeScores,
    )
