"""The organism in the browser: the graph against PyTorch, and the page in Chromium."""

import json
import sys

import pytest
import torch
from conftest import ROOT, show

from safetyneuron import NeuronSet, deactivate, load_prompts
from safetyneuron.metrics import answers, is_refusal
from safetyneuron.neurons.activations import activations
from safetyneuron.neurons.architecture import PROJECTIONS
from safetyneuron.neurons.encoding import encode_prompts

sys.path.insert(0, str(ROOT / "workflow"))
import playground

PROMPTS = (
    load_prompts("organism/harmful")[:15]
    + load_prompts("organism/benign")[:10]
    + load_prompts("organism/general")[:15]
)
PROMPTS += (
    load_prompts("organism/multilingual", language="zh")[:5]
    + load_prompts("organism/multilingual", language="vi")[:5]
)


def neuron_set(facts, places):
    """The set that flat places name."""
    flat = torch.zeros(facts["layers"], sum(facts["widths"].values()), dtype=torch.bool)
    flat.view(-1)[places] = True
    return NeuronSet(
        dict(zip(PROJECTIONS, flat.split([facts["widths"][p] for p in PROJECTIONS], 1)))
    )


@pytest.mark.organism
def test_switches_are_deactivation_and_peaks_are_activations(fresh_chat):
    model, tokenizer = fresh_chat
    (ids,) = encode_prompts(model, tokenizer, PROMPTS[:1])
    neurons = NeuronSet(
        {p: torch.rand(m.shape) < 0.05 for p, m in NeuronSet.empty(model).masks.items()}
    )
    with torch.no_grad(), activations(model) as read, deactivate(model, neurons):
        expected = model(torch.tensor([ids])).logits[0, -1]
        peak = torch.stack([read[layer][0].abs().amax(0) for layer in sorted(read)])
    switches = playground.Switches(model)
    on = 1 - torch.cat([neurons.masks[p] for p in PROJECTIONS], 1).float()
    with torch.no_grad():
        logits, peaks = switches(torch.tensor([ids]), on)
    assert torch.allclose(logits, expected, atol=1e-5)
    assert torch.allclose(peaks[:, -peak.shape[1] :], peak * ~neurons.masks["down"], atol=1e-5)


@pytest.mark.book
@pytest.mark.browser
@pytest.mark.parametrize(
    "rule", [None, "Eq 3", "Eq 3 without foundation", "random, matched to the second"]
)
def test_the_browser_gives_the_answers_of_pytorch(site, browser, address, chat, rule):
    facts = json.loads(
        (site / "html" / "_static" / "playground" / "organism.json").read_text(encoding="utf-8")
    )
    places = facts["sets"][rule][facts["shares"].index(0.01)] if rule else []
    show(browser, address + "book/playground.html", "light")
    browser.set_script_timeout(120)
    script = """const [prompts, off, done] = arguments, given = [];
        const run = async () => { for (const prompt of prompts) given.push((await playground.answer(prompt, off)).text); };
        run().then(() => done([given, given.map(text => playground.refuses(text))]));"""
    given, refused = browser.execute_async_script(script, PROMPTS, places)
    with deactivate(chat[0], neuron_set(facts, places)):
        assert len(PROMPTS) == 50 and given == answers(*chat, PROMPTS)
    assert refused == [is_refusal(text) for text in given]


@pytest.mark.book
@pytest.mark.browser
def test_the_slider_and_the_text_field_change_the_page(browser, address):
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    show(browser, address + "book/playground.html", "light")

    def text(name):
        return browser.find_element("id", f"play-{name}").text

    assert text("whole") == text("changed") != ""
    for _ in range(9):
        browser.find_element("id", "play-share").send_keys(Keys.ARROW_RIGHT)
    WebDriverWait(browser, 20).until(lambda _: text("changed") != text("whole"))
    assert (
        text("share-text").startswith("3 %, 248 of")
        and "248 neurons switched off" in text("overlap")
        and " off" in text("map")
    )
    browser.find_element("id", "play-request").send_keys(" submarine")
    WebDriverWait(browser, 20).until(
        lambda _: text("unknown") == "The organism does not know: submarine"
    )
    browser.find_element("id", "play-request").clear()
    browser.find_element("id", "play-request").send_keys(" ")
    WebDriverWait(browser, 20).until(lambda _: text("unknown") == "Type a request, or pick one.")
