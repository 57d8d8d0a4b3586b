"""Chapter 07, Table 4: what fine-tuning leaves of safety."""

from safetyneuron.book.glue import glue_list, glue_rates
from safetyneuron.book.tables import language_rows, mean_rate, rate, side_by_side
from safetyneuron.book.verdicts import change_sentence, mean_rates
from safetyneuron.kept import defences


def downstream_table(results, paper_model, task, languages):
    """Paper's Table 4 beside the measurement. results: name of the run to `defences.downstream`."""
    rows = [("Accuracy", f"{task} (paper: GSM8K)", "GSM8K", rate("accuracy", task))]
    rows += [
        ("Attack success before fine-tuning", l, None, rate("asr before", l)) for l in languages
    ]
    return side_by_side(4, results, paper_model, rows + language_rows(languages, "Harmful"))


def glue_downstream(results, languages, task):
    """Glue what fine-tuning did to the model as it was and to the tuned ones. results: run to name to draws of `Column`."""
    parts = []
    for run, found in results.items():
        rates = {name: mean_rates(draws) for name, draws in found.items()}
        origin, sn, rsn = (rates[name] for name in (defences.ORIGIN, defences.SN, defences.RSN))

        def compare(after, before, label):
            return change_sentence(
                after, before, "asr", languages, label, "lower", "higher", "not different"
            )

        parts.append(f"{run}: {change_sentence(origin, rates[defences.BEFORE], 'asr', languages, 'attack success of the untuned model')}; "
                     f"{change_sentence(origin, rates[defences.BEFORE], 'accuracy', [task], 'its accuracy')}.")  # fmt: skip
        after = [
            compare(rates[name], origin, f"{name} against Origin:")
            for name in defences.DOWNSTREAM_NAMES.values()
        ]
        parts.append(
            f"{run}, attack success after fine-tuning. {'; '.join(after)}; {compare(rsn, sn, 'RSN-Tune against SN-Tune:')}."
        )
    glue_list("verdict_downstream", parts)
    found = next(iter(results.values()))
    for label, name in {
        "before": defences.BEFORE,
        "origin": defences.ORIGIN,
        "sn": defences.SN,
        "rsn": defences.RSN,
    }.items():
        glue_rates(**{f"harm_{label}": mean_rate(found[name], "asr", languages)})
