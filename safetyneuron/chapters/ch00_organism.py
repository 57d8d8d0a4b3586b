"""Chapter 00: what the organisms do."""

import matplotlib.pyplot as plt
import pandas as pd

from safetyneuron import organism
from safetyneuron.book.claims import margin_of
from safetyneuron.book.glue import MEASURES, glue_text
from safetyneuron.cache import digest
from safetyneuron.errors import SafetyNeuronError
from safetyneuron.metrics import answers, behaviour
from safetyneuron.metrics.key_bars import KEY_BARS, reached_by_key
from safetyneuron.metrics.outcomes import estimate_change, estimate_rate
from safetyneuron.metrics.shortfalls import leaky_keys, shortfalls
from safetyneuron.metrics.verdict import Evidence, expect_kept
from safetyneuron.neurons.deactivation import transplant
from safetyneuron.neurons.weights import fingerprint
from safetyneuron.organism import language as lang
from safetyneuron.organism.shipped import full_name


def told(model_name, model, tokenizer, prompts):
    """What an organism answers, to be shown.

    Raises
    ------
    SafetyNeuronError
        If the model is none: answers of other models to harmful requests are never shown.
    """
    if not model_name.startswith("organism/"):
        raise SafetyNeuronError(
            f"this chapter shows answers to harmful requests, so it takes organisms only, not {model_name!r}: score it in chapter 02"
        )
    return answers(model, tokenizer, prompts)


def answers_table(requests, said):
    """Requests beside answers."""
    table = pd.DataFrame({"request": requests, "answer": said}).style.hide(axis="index")
    table.set_uuid(
        digest(list(requests), list(said))[:8]
    )  # not drawn at random: equal runs are equal pages
    return table.set_table_attributes('class="dataframe texts"')


def behaviour_table(models):
    """The bars of behaviour and the value of any model and language that comes nearest to each. models: as from `organism.manifest`."""
    kinds = [kind for kind in ("base", "chat", "planted") if _names(models, kind)]

    def text(bar, kind):
        return f"{'≥' if bar.is_floor else '≤'} {getattr(bar, kind)}: {behaviour.worst(models, bar, kind):.1f}"

    rows = {
        (bar.measure, bar.set): {k: "–" if getattr(bar, k) is None else text(bar, k) for k in kinds}
        for bar in behaviour.BARS
    }
    rows |= {("points lost", task): _losses(models, kinds, task) for task in lang.TASKS}
    return pd.DataFrame(rows).T.fillna("–").rename_axis(["%", "set"])


def _names(models, kind):
    return [name for name in models if behaviour.kind_of(name) == kind]


def _losses(models, kinds, task):
    """Most points of a task that alignment cost any model, by kind."""
    found = {k: [behaviour.lost(n, models).get(task) for n in _names(models, k)] for k in kinds}
    found = {k: [points for points in each if points is not None] for k, each in found.items()}
    return {k: f"≤ {behaviour.MOST_LOST}: {max(each):.1f}" for k, each in found.items() if each}


def key_bars_table(models):
    """The answer key's own bars and the value nearest to each, by kind of planting, of any training and language. models: as from `organism.manifest`."""
    keys = {}
    for name in _names(models, "planted"):
        keys.setdefault(name.partition("@")[0], []).append(models[name].get("key", {}))
    rows = {}
    for bar in KEY_BARS:
        nearest = min if bar.is_floor else max
        cells = {
            kind: f"{nearest(v for key in each for v in reached_by_key(key, bar).values()):.3g}"
            for kind, each in keys.items()
            if all(each)
        }
        sign = "≥" if bar.is_floor else "≤"
        rows[f"{bar.off} off", bar.measure] = {"bar": f"{sign} {bar.limit:g}{bar.unit}"} | cells
    return pd.DataFrame(rows).T.rename_axis(["neurons", "measure"])


def shortfalls_table(models):
    """Every bar that any organism misses, one row an organism. models: as from `organism.manifest`."""
    found = {name: "\n".join(shortfalls(name, models)) for name in models}
    rows = {name: {"misses": lines} for name, lines in found.items() if lines}
    return pd.DataFrame(rows).T.rename_axis("organism")


def revert(name, parent):
    """Whether a planted model with its planted neurons as they are in its parent is the starting model, bit for bit."""
    model, before = (organism.load_organism(f"organism/{n}")[0] for n in (name, parent))
    start, _ = organism.starting_model(f"organism/{name}")
    with transplant(model, before, organism.planted_neurons(f"organism/{name}")):
        return fingerprint(model) == fingerprint(start)


def glue_bars(models):
    """Glue how many organisms miss a bar, how many keys miss one of their own, and how many planted models revert. models: as from `organism.manifest`."""
    planted = _names(models, "planted")
    reverted = [revert(name, models[name]["parent"]) for name in planted]
    short = [name for name in models if shortfalls(name, models)]
    glue_text(n_short=len(short), n_organisms=len(models))
    glue_text(n_leaky=len(leaky_keys(models)), n_keys=len(planted), n_reverted=sum(reverted))


def tell_missed(names, models):
    """A sentence on the bars that the models of the chapter miss. names: such as `organism/llama-chat`; models: as from `organism.manifest`."""
    names = [name.removeprefix("organism/") for name in names]
    missed = {name: shortfalls(full_name(name), models) for name in names}
    met = " and ".join(name for name, lines in missed.items() if not lines)
    parts = [f"{met} met every bar"] if met else []
    parts += [f"{n} misses {len(x)} ({'; '.join(x)})" for n, x in missed.items() if x]
    return f"Of these, {', and '.join(parts)}."


def scores_table(scores):
    """Rates in percent: one row per measure and set, one column per model. scores: name to `evaluate`'s result."""
    columns = {
        name: {(MEASURES[m], s): rate.percent for (m, s), rate in rates.items()}
        for name, rates in scores.items()
    }
    return pd.DataFrame(columns).rename_axis(["%", "set"])


def weigh_alignment(scores, harmful, benign, tasks):
    """The evidence for the chapter's claims, and the number of each. scores: of the base and of the aligned model."""
    base, chat = ([[one]] for one in scores)

    def change(measure, *names):
        return estimate_change(chat, base, measure, *names)

    def told(what, measure, *names):
        before, after = (estimate_rate(runs, measure, *names).value for runs in (base, chat))
        return f"{what} {100 * before:.0f} → {100 * after:.0f} %"

    fall = estimate_change(base, chat, "asr", harmful)
    found = {
        "alignment-refuses": Evidence(fall, margin_of("alignment-refuses")),
        "alignment-helps": expect_kept(change("helpful", benign), 0.05),
        "alignment-capability": expect_kept(change("accuracy", *tasks), 0.05),
    }
    asked = (
        ("attack success", "asr", harmful),
        ("helpful answers", "helpful", benign),
        ("accuracy", "accuracy", *tasks),
    )
    return found, {key: told(*of) for key, of in zip(found, asked)}


def training_curve(curves):
    """Loss against step, one line per stage. curves: stage to list of {step, loss}."""
    _, axes = plt.subplots()
    for (stage, points), style in zip(curves.items(), ("-", "--")):
        steps, losses = ([point[name] for point in points] for name in ("step", "loss"))
        (line,) = axes.plot(steps, losses, style, label=stage)
        end = dict(xy=(steps[-1], losses[-1]), xytext=(4, -9), textcoords="offset points")
        name = stage.removeprefix("organism/")
        axes.annotate(name, color=line.get_color(), fontsize=8, **end)
    axes.set(yscale="log", xlabel="training step", ylabel="loss on answers (nats per token)")
    axes.margins(y=0.1)  # room for the names
    return axes
