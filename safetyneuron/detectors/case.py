"""What detectors look at: a model, prompts and documents; and what several of them measure, measured once."""

from dataclasses import dataclass, field

import torch

from safetyneuron.errors import SafetyNeuronError
from safetyneuron.importance.profile import measure_importance
from safetyneuron.memory import Batches
from safetyneuron.metrics.log_odds import pairs_for
from safetyneuron.neurons.activations import channel_means, last_activations
from safetyneuron.neurons.encoding import encode_prompts, pad
from safetyneuron.progress import clock


@dataclass
class Case:
    """One model with the prompts that its safety neurons are looked for on.

    Attributes
    ----------
    harmful, benign : list of str
        Requests.
    general : list of str, optional
        Prompts for foundation neurons.
    refusals, helpful : list of dict, optional
        Documents with `prompt` and `completion`.
    base : transformers.PreTrainedModel, optional
        The model before alignment.
    languages : dict of str to (list of str, list of str)
        Harmful and benign requests in other languages.
    """

    model: object
    tokenizer: object
    harmful: list
    benign: list
    general: list | None = None
    refusals: list | None = None
    helpful: list | None = None
    base: object | None = None
    languages: dict | None = None
    saved: float = 0.0  # seconds that results measured before would have taken
    _kept: dict = field(default_factory=dict, repr=False)

    def check_has(self, needs, rule):
        """Refuse a rule that needs what is not there."""
        for name in needs:
            if not getattr(self, name):
                raise SafetyNeuronError(
                    f"detector {rule} needs {name}, and this case has none: give it some or leave the detector out"
                )

    def once(self, key, work):
        """The result of `work()`, which runs for the first rule that asks; its seconds count for every rule."""
        if key in self._kept:
            self.saved += self._kept[key][1]
        else:
            saved, started = self.saved, clock()
            result = work()
            self._kept[key] = result, clock() - started + self.saved - saved
        return self._kept[key][0]

    def timed(self, work):
        """Result of a rule and the seconds that it takes alone, whatever others have measured before."""
        saved, started = self.saved, clock()
        result = work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return result, clock() - started + self.saved - saved

    def importance(self, rule, name, language=None):
        """`ImportanceProfile` on the prompts of a name, or of another language."""
        prompts = self.languages[language][name == "benign"] if language else getattr(self, name)
        return self.once(
            ("importance", rule, name, language),
            lambda: measure_importance(self.model, self.tokenizer, prompts, rule, progress=False),
        )

    def pairs(self, name):
        """The two answers weighed after every prompt of a name (`log_odds.Pair`)."""
        return self.once(
            ("pairs", name), lambda: pairs_for(self.model, self.tokenizer, getattr(self, name))
        )

    def last(self, name):
        """Activations of every feed-forward channel at the last prompt token: (prompts, layers, channels)."""

        def read():
            flat = torch.from_numpy(
                last_activations(self.model, self.tokenizer, getattr(self, name))
            )
            return flat.unflatten(1, (self.model.config.get_text_config().num_hidden_layers, -1))

        return self.once(("last", name), read)

    def means(self):
        """Mean activation of every neuron over the tokens of the harmless requests."""
        return self.once(
            "means", lambda: channel_means(self.model, self.tokenizer, self.benign, batch_size=16)
        )

    @torch.no_grad()
    def plain_pass(self, batch_size=16):
        """One forward pass of the harmful requests, the unit in which the work of detectors is counted."""
        encoded = sorted(encode_prompts(self.model, self.tokenizer, self.harmful), key=len)
        for _ in Batches(batch_size)(
            encoded,
            lambda some: self.model.get_decoder()(
                **pad(some, self.tokenizer, self.model.device), use_cache=False
            ),
        ):
            pass
