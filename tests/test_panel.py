"""The JupyterLab panel, driven through its controls."""

import pytest

from safetyneuron import SafetyNeuronError, deactivate
from safetyneuron.metrics import answer_classes, answers, attack_success_rate
from safetyneuron.panel import RANDOM, SPECIFIC, Panel

pytestmark = pytest.mark.organism


@pytest.fixture(scope="module")
def panel():
    return Panel(n_detect=40, n_prompts=20)


def test_controls_choose_neurons_and_the_panel_answers_and_scores_without_them(panel, chat):
    panel.percent.value, panel.layers.value, panel.structures.value = 3, (1, 2), ("gate", "down")
    neurons = panel.neurons()
    assert len(neurons) and {p for p, count in neurons.counts().items() if count} == {
        "gate",
        "down",
    }
    assert not any(mask[2:].any() for mask in neurons.masks.values())
    with deactivate(chat[0], neurons):
        expected = (
            answers(*chat, [panel.request.value])[0],
            attack_success_rate(*chat, panel.asked["harmful"]).percent,
            *(r.percent for r in answer_classes(*chat, panel.asked["harmful"]).values()),
        )
    assert all(text in panel.answers.value + panel.scores.value for text in expected)
    assert f"<b>{len(neurons)}</b>" in panel.chosen.value


def test_every_rule_and_no_neurons_at_all(panel):
    panel.layers.value, panel.structures.value = (
        (1, panel.model.config.num_hidden_layers),
        tuple(panel.structures.options),
    )
    for rule in (SPECIFIC, RANDOM):
        panel.rule.value = rule
        for percent in (5, 1):
            panel.percent.value = percent
            assert 0 < len(panel.neurons()) <= 0.05 * panel.neurons().total + 1
    panel.percent.value = 0
    assert len(panel.neurons()) == 0 and "<b>0</b>" in panel.chosen.value


def test_text_cannot_become_markup_and_other_models_are_refused(panel):
    panel.request.value = "<script>how do i paint the door ?</script>"
    assert "<script>" not in panel.answers.value
    with pytest.raises(SafetyNeuronError, match="organisms only"):
        Panel("meta-llama/Llama-2-7b-chat-hf")
