"""Log odds of refusing, against a loop over the plain model; gradients against differences."""

import pytest
import torch

from safetyneuron import NeuronSet, SafetyNeuronError, deactivate, load_prompts
from safetyneuron.metrics.log_odds import choose_pairs, refusal_log_odds, weigh_pairs
from safetyneuron.organism import language as lang
from safetyneuron.organism.reading import read_request

pytestmark = pytest.mark.organism


def likelihood(model, tokenizer, prompt, answer):
    """Of one answer, by one pass without padding over the conversation as the template writes it."""
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    ids = tokenizer.apply_chat_template(turns, return_dict=False)
    asked = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(logits[i - 1, ids[i]]) for i in range(len(asked), len(ids)))


def test_log_odds_are_those_of_the_likeliest_wordings_one_by_one(chat):
    model, tokenizer = chat
    prompts = (
        load_prompts("organism/harmful")[:2] + load_prompts("organism/benign", language="th")[:1]
    )
    expected = []
    for prompt in prompts:
        request = read_request(prompt)
        habits = ("", lang.lexicon().habits[request.language])
        best = [
            max(likelihood(model, tokenizer, prompt, h + e.answer) for e in some for h in habits)
            for some in (lang.refused(request), lang.helped(request))
        ]
        expected.append(best[0] - best[1])
    with torch.no_grad():
        found = refusal_log_odds(model, tokenizer, prompts)
    assert torch.allclose(found, torch.tensor(expected), atol=1e-3)
    assert (found[:2] > 0).all() and found[2] < 0


def test_the_answers_are_fixed_on_the_whole_model_and_weighed_again_under_an_intervention(chat):
    model, tokenizer = chat
    prompts = load_prompts("organism/harmful")[:3]
    pairs = choose_pairs(model, tokenizer, prompts)
    masks = NeuronSet.empty(model).masks
    masks["down"][2:4] = True
    with deactivate(model, NeuronSet(masks)), torch.no_grad():
        weighed = torch.stack(weigh_pairs(model, tokenizer, pairs, batch_size=2))
        expected = [
            [
                likelihood(model, tokenizer, prompt, tokenizer.decode(answer[:-1]))
                for prompt, answer in zip(prompts, answers)
            ]
            for answers in ([p.refusal for p in pairs], [p.help for p in pairs])
        ]
    assert torch.allclose(weighed, torch.tensor(expected), atol=1e-3)


def test_gradients_are_those_of_small_differences(chat):
    model, tokenizer = chat
    pairs = choose_pairs(model, tokenizer, load_prompts("organism/harmful")[:4])
    weight = model.get_decoder().layers[3].mlp.down_proj.weight

    def odds(batch_size):
        refusal, helped = weigh_pairs(model, tokenizer, pairs, batch_size)
        return (refusal - helped).sum()

    (gradient,) = torch.autograd.grad(odds(3), weight)
    direction = gradient / gradient.norm()
    with torch.no_grad():
        original = weight.clone()
        ends = [
            weight.copy_(original + s * 1e-2 * direction) is not None and odds(8) for s in (1, -1)
        ]
        weight.copy_(original)
    assert float((ends[0] - ends[1]) / 2e-2) == pytest.approx(float(gradient.norm()), rel=0.02)


def test_other_prompts_are_refused(chat):
    with pytest.raises(SafetyNeuronError, match="no request"):
        refusal_log_odds(*chat, ["what is the weather like ?"])
