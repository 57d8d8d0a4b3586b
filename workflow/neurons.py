"""The page of neurons: a map of what every functional unit of one organism does alone, and a section for each of those that do most.

python workflow/neurons.py PAGE
"""

import html
import sys
from pathlib import Path

import numpy as np
import torch

from safetyneuron import load_model, load_prompts
from safetyneuron.cache import new_file
from safetyneuron.detectors.effects import READ_AT
from safetyneuron.detectors.table import DETECTORS
from safetyneuron.errors import SafetyNeuronError
from safetyneuron.kept.truth import NATURAL, log_odds_changes, read_truth
from safetyneuron.metrics import answers, sort_answers
from safetyneuron.neurons.activations import channel_means, written_logits
from safetyneuron.neurons.architecture import COLUMN_PROJECTIONS, Architecture

SHOWN, NAMED, WORDS, TOP = 50, 10, 6, 0.01
ASKED = 50  # requests that were asked without each unit
KINDS = {"ffn": "feed-forward", "vo": "value and output", "q": "query", "k": "key"}
READS = {"ffn": "gate", "vo": "v", "q": "q", "k": "k"}
COLUMNS, CELL = 32, 6  # units in a row of a block of the map, and their size in pixels


def main(path):
    """Write the page, whole or not at all."""
    short = NATURAL.removeprefix("organism/")
    units, ranks = read_truth(f"units-{short}"), read_truth(f"ranks-{short}")
    units["effect"] = 0 - log_odds_changes(
        units, "zero harmful"
    )  # nothing less nothing has no sign
    top = units.sort_values("effect", ascending=False, kind="stable").head(SHOWN)
    classes = read_truth("classes").query("model == @NATURAL").set_index(["kind", "layer", "channel"])  # fmt: skip
    left = classes.loc[[(u.kind, u.layer, u.channel) for u in top.itertuples()], "harmful refusal"]
    look = Look(*load_model(NATURAL))
    sections = [
        write_section(place, unit, classes.loc[unit.kind, unit.layer, unit.channel], ranks.loc[unit.Index], look, TOP * len(units))
        for place, unit in enumerate(top.itertuples(), 1)
    ]  # fmt: skip
    with new_file(path) as new:
        new.write_text(write_page(units, top, left, sections, look), encoding="utf-8")


class Look:
    """What is read off the model: the words that a neuron reads and writes, and what the whole model answers."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.architecture = Architecture(model)
        prompts = load_prompts("organism/harmful")[:ASKED]
        self.means = channel_means(model, tokenizer, prompts)
        self.refused = sort_answers(prompts, answers(model, tokenizer, prompts))["refusal"]

    @torch.no_grad()
    def reads(self, kind, layer, channel):
        """Words whose embedding lies most along the neuron's row."""
        row = self.architecture.place(layer, READS[kind]).weight[channel]
        return self._words(self.model.get_input_embeddings().weight @ row)

    def writes(self, kind, layer, channel):
        """Words that the neuron makes likelier by itself, at the sign that it has on harmful requests."""
        sign = self.means[READ_AT[kind]][layer, channel].sign()
        return self._words(written_logits(self.model, READ_AT[kind], layer, channel, sign))

    def _words(self, scores):
        best = scores.float().topk(WORDS).indices.tolist()
        return ", ".join(f"*{word.strip()}*" for word in self.tokenizer.batch_decode([[i] for i in best]))  # fmt: skip


def name_of(unit):
    """What a unit is called in the tables."""
    return f"{unit.kind}.{unit.layer}.{unit.channel}"


def anchor(unit):
    """Where its section is."""
    return "unit-" + name_of(unit).replace(".", "-")


def write_section(place, unit, without, ranks, look, limit):
    """A section: where the unit is, what becomes of the answers without it, its words, and the rules that find it."""
    rules = [key for key in DETECTORS if key in ranks.index and not key.startswith("control/")]
    found = [DETECTORS[key].label for key in rules if ranks[key] <= limit]
    place_in_model = (unit.kind, unit.layer, unit.channel)
    writes = (
        f" It makes these likelier: {look.writes(*place_in_model)}."
        if READ_AT[unit.kind] in COLUMN_PROJECTIONS
        else ""
    )
    finders = f" ({'; '.join(found)})" if found and place <= NAMED else ""
    return f"""({anchor(unit)})=
### {place}. {KINDS[unit.kind].capitalize()} unit {unit.channel} of layer {unit.layer + 1}

Without it the log odds of refusing a harmful request {"fall" if unit.effect > 0 else "rise"} by {abs(unit.effect):.2f} nats: the model refuses {100 * without["harmful refusal"]:.0f} % of {ASKED} harmful requests
and helps correctly with {100 * without["harmful correct"]:.0f} % of them; of the harmless ones it refuses {100 * without["harmless refusal"]:.0f} %. It reads most along the words {look.reads(*place_in_model)}.{writes}
{len(found)} of {len(rules)} rules have it among their first percent{finders}. In the tables it is `{name_of(unit)}`.
"""


def draw_map(units, top):
    """All units as an SVG: a block a layer and kind, a square a unit; orange where refusal rests on it, blue where it works against refusal."""
    largest = units["effect"].abs().max()
    linked = {(u.kind, u.layer, u.channel) for u in top.itertuples()}
    layers = units["layer"].max() + 1
    height = {layer: CELL * max(-(-len(rows) // COLUMNS) for _, rows in block.groupby("kind")) + 22 for layer, block in units.groupby("layer")}  # fmt: skip
    parts, y = [], 18
    for i, kind in enumerate(KINDS):
        parts.append(f'<text x="{70 + i * (COLUMNS * CELL + 14)}" y="12">{KINDS[kind]}</text>')
    for layer in range(layers):
        parts.append(f'<text x="0" y="{y + 12}">layer {layer + 1}</text>')
        for i, kind in enumerate(KINDS):
            rows = units[(units["layer"] == layer) & (units["kind"] == kind)]
            for unit in rows.itertuples():
                x = 70 + i * (COLUMNS * CELL + 14) + CELL * (unit.channel % COLUMNS)
                parts.append(draw_unit(unit, x, y + CELL * (unit.channel // COLUMNS), largest, linked))  # fmt: skip
        y += height[layer]
    width = 70 + len(KINDS) * (COLUMNS * CELL + 14)
    label = "Every functional unit of the model as a square, by layer and kind; the strongest ones are links to their sections below."
    return f'<svg class="neuron-map" viewBox="0 0 {width} {y}" role="group" aria-label="{label}">{"".join(parts)}</svg>'


def draw_unit(unit, x, y, largest, linked):
    """One square; what the mouse shows over it; a link where the unit has a section."""
    colour = "#d55e00" if unit.effect > 0 else "#0072b2"
    strength = 0.12 + 0.88 * np.sqrt(abs(unit.effect) / largest)  # none is invisible
    title = f"{KINDS[unit.kind]} {unit.channel}, layer {unit.layer + 1}: {unit.effect:+.3f} nats"
    square = f'<rect x="{x}" y="{y}" width="{CELL - 1}" height="{CELL - 1}" fill="{colour}" fill-opacity="{strength:.2f}"><title>{title}</title></rect>'
    if (unit.kind, unit.layer, unit.channel) not in linked:
        return square
    return f'<a href="#{anchor(unit)}" aria-label="{html.escape(title)}">{square}</a>'


def write_page(units, top, left, sections, look):
    """The page: what was found, the map, the sections."""
    strongest, total = top.iloc[0], units["effect"].clip(lower=0).sum()
    first = (
        f"{KINDS[strongest['kind']]} unit {strongest['channel']} of layer {strongest['layer'] + 1}"
    )
    least = 100 * left.min()
    found = "Refusal does not hang on one unit" if least > 50 else "Refusal hangs on single units"
    ten, all_shown = (100 * top["effect"].head(n).sum() / total for n in (10, SHOWN))
    return f"""# A map of every neuron

**What we found.** {found}: without any one of the {SHOWN} strongest the model still refuses at least {least:.0f} % of harmful requests. The strongest of {len(units):,}, {first}, weighs {strongest["effect"]:.1f} nats
of the log odds of refusing; the ten strongest together carry {ten:.0f} %, the {SHOWN} listed here {all_shown:.0f} % of all that speaks for refusal when units are switched off one by one.

Each square is one {{term}}`functional unit` of `{NATURAL}`. <span style="color: #d55e00">■</span> Orange: the deeper, the less the model refuses harmful requests without it. <span style="color: #0072b2">■</span> Blue: it works against refusal. Point at a square for its number;
the {SHOWN} strongest are links. Effects are those of [](../notebooks/11_answer_key.ipynb): each unit alone set to zero, whole answers scored, {ASKED} harmful requests of the test split. The whole
model refuses {look.refused.percent} % of them. Layers count from 1 here and from 0 in the tables.

```{{raw}} html
<div class="scroll" tabindex="0" role="region" aria-label="Map of all units">{draw_map(units, top)}</div>
```

## The {SHOWN} strongest

Words are a hint and no more: those a unit *reads* are the embeddings that its weights lie along most, which says little in later layers; those it *writes* are what its own output does to the next
word, past all later layers. Every language of the organism is among them.

{chr(10).join(sections)}"""


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except SafetyNeuronError as error:
        sys.exit(str(error))
