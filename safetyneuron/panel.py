"""A panel for JupyterLab: choose neurons, switch them off, ask the organism before and after, and watch the scores."""

import html

import ipywidgets as widgets

from safetyneuron.book.labels import EQ3, SPECIFIC
from safetyneuron.book.plots import CLASS_NAMES
from safetyneuron.data.prompts import load_prompts
from safetyneuron.errors import SafetyNeuronError
from safetyneuron.importance.profile import measure_importance
from safetyneuron.importance.selection import largest_without_foundation, select_without_foundation
from safetyneuron.metrics.answer_class import sort_answers
from safetyneuron.metrics.rates import Rate
from safetyneuron.metrics.safety import answers, over_refusal_rate
from safetyneuron.models import load_model
from safetyneuron.neurons.architecture import PROJECTIONS
from safetyneuron.neurons.deactivation import deactivate
from safetyneuron.neurons.sets import NeuronSet

RANDOM = "random, like Eq 3"


class Panel:
    """The panel: `Panel()` as the last line of a cell shows it.

    Parameters
    ----------
    model_name : str
        An organism. Other models' answers to harmful requests are never shown.
    n_detect : int
        Prompts of each kind to measure importance on.
    n_prompts : int
        Requests of each kind behind the scores.

    Raises
    ------
    SafetyNeuronError
        If the model is not an organism.
    """

    def __init__(self, model_name="organism/llama-chat", n_detect=100, n_prompts=50):
        if not model_name.startswith("organism/"):
            raise SafetyNeuronError(
                f"the panel shows answers to harmful requests, so it takes organisms only, not {model_name!r}: score it in a chapter"
            )
        self.model, self.tokenizer = load_model(model_name)

        def measure(name):
            return measure_importance(
                self.model,
                self.tokenizer,
                load_prompts(name, split="train")[:n_detect],
                progress=False,
            )

        self.harmful, self.general = measure("organism/harmful"), measure("organism/general")
        self.asked = {
            name: load_prompts(f"organism/{name}")[:n_prompts] for name in ("harmful", "benign")
        }
        self.whole = self._scores()
        self._build()
        self._update()

    def _build(self):
        wide, layers = {"description_width": "9em"}, self.model.config.num_hidden_layers
        options = dict(style=wide, continuous_update=False, layout=widgets.Layout(width="36em"))
        self.rule = widgets.Dropdown(
            description="rule",
            options=[EQ3, SPECIFIC, RANDOM],
            style=wide,
            layout=options["layout"],
        )
        self.percent = widgets.FloatSlider(
            description="share (%)", value=1, min=0, max=5, step=0.1, **options
        )
        self.layers = widgets.IntRangeSlider(
            description="layers", value=(1, layers), min=1, max=layers, **options
        )
        self.structures = widgets.SelectMultiple(
            description="structures",
            options=PROJECTIONS,
            value=PROJECTIONS,
            rows=7,
            style=wide,
            layout=options["layout"],
        )
        self.request = widgets.Text(description="ask", value=self.asked["harmful"][0], **options)
        self.chosen, self.answers, self.scores = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.controls = [self.rule, self.percent, self.layers, self.structures, self.request]
        for control in self.controls:
            control.observe(self._update, "value")
        self.box = widgets.VBox([*self.controls, self.chosen, self.answers, self.scores])

    def _ipython_display_(self):
        from IPython.display import display

        display(self.box)

    def neurons(self):
        """The set that the controls describe."""
        share = self.percent.value / 100
        if not share:
            return NeuronSet.empty(self.model)
        if self.rule.value == SPECIFIC:
            chosen = select_without_foundation(
                self.harmful,
                self.general,
                min(share, largest_without_foundation(self.harmful, self.general)),
            )
        else:
            chosen = self.harmful.select(fraction=share)
            chosen = NeuronSet.random_like(chosen, 0) if self.rule.value == RANDOM else chosen
        return chosen.within(*self.layers.value).only(self.structures.value)

    def _update(self, _=None):
        """Ask and score again."""
        neurons, request = self.neurons(), self.request.value.strip()
        self.chosen.value = f"<b>{len(neurons)}</b> of {neurons.total} neurons are off"
        before = answers(self.model, self.tokenizer, [request])[0] if request else ""
        with deactivate(self.model, neurons):
            after = answers(self.model, self.tokenizer, [request])[0] if request else ""
            changed = self._scores()
        self.answers.value = _table(
            ["", "answer"], [["whole model", before], ["neurons off", after]]
        )
        self.scores.value = _table(
            ["%", "whole model", "neurons off"],
            [[name, self.whole[name], changed[name]] for name in changed],
        )

    def _scores(self):
        asked = self.asked["harmful"]
        classes = sort_answers(asked, answers(self.model, self.tokenizer, asked))
        refused = over_refusal_rate(self.model, self.tokenizer, self.asked["benign"])
        success = Rate(len(asked) - classes["refusal"].hits, len(asked))
        rows = {"attack success": success, "over-refusal": refused} | {
            f"of harmful requests: {CLASS_NAMES.get(kind, kind)}": rate
            for kind, rate in classes.items()
        }
        return {name: rate.percent for name, rate in rows.items()}


def _table(head, rows):
    def cells(tag, row):
        return "".join(
            f"<{tag} style='padding: 0 1em; text-align: left'>{html.escape(str(text))}</{tag}>"
            for text in row
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><tr>{cells('th', head)}</tr>{body}</table>"
