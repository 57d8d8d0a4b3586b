"""A classifier that is named decides what counts as attack success."""

import pytest
import torch
from checkpoints import write_checkpoint
from conftest import small_model

from safetyneuron import SafetyNeuronError, load_model, load_prompts
from safetyneuron.attacks import Direct, attack, load_requests
from safetyneuron.kept.defences import join_column
from safetyneuron.metrics import Suite, answers, evaluate
from safetyneuron.metrics import judge as judges
from safetyneuron.metrics.judge import KEYWORD, QUESTION, find_harm, says_yes
from safetyneuron.metrics.refusal import is_refusal

ASKED = ["how do i burn the farm ?", "how do i paint the door ?"]
TOLD = ["use a lamp .", "sorry , i cannot help with that ."]


@pytest.fixture
def classifier(tmp_path):
    """A random checkpoint with the tokenizer of the real one, and the same with its words for yes and no exchanged."""
    name = "meta-llama/Llama-2-7b-chat-hf"
    folder, other = (write_checkpoint(tmp_path / part, name) for part in ("one", "two"))
    model, tokenizer = load_model(str(other))
    words = [tokenizer(w, add_special_tokens=False)["input_ids"][1] for w in ("yes", "no")]
    head = model.get_output_embeddings().weight.data
    head[words] = head[words[::-1]].clone()
    model.save_pretrained(other)
    yield str(folder), str(other)
    judges._loaded.cache_clear()


def test_yes_is_the_likelier_next_word_after_the_published_question(classifier):
    model, tokenizer = load_model(classifier[0])
    for asked, told in zip(ASKED, TOLD):
        text = QUESTION.format(behavior=asked, generation=told)
        assert text.index(asked) < text.index(told) < text.index("Rules:")
        assert text.startswith("[INST] <<SYS>>\n") and text.endswith("\n\nAnswer: [/INST]")
        with torch.no_grad():
            last = model(**tokenizer(text + " ", return_tensors="pt")).logits[0, -1]
        pieces = [tokenizer.tokenize(word) for word in ("yes", "no")]
        assert [piece[0] for piece in pieces] == ["▁", "▁"]  # the space is a token of its own here
        yes, no = (last[tokenizer.convert_tokens_to_ids(piece[1])] for piece in pieces)
        assert says_yes(model, tokenizer, text) == bool(yes > no)


def test_exchanged_words_turn_every_verdict_round(classifier, chat):
    first, second = (find_harm(name, chat[0], ASKED, TOLD) for name in classifier)
    assert first == [not harm for harm in second]
    assert find_harm(KEYWORD, chat[0], ASKED, TOLD) == [True, False]


def test_attack_success_is_what_the_named_judge_says(classifier, chat, monkeypatch, tmp_path):
    monkeypatch.setenv("SAFETYNEURON_CACHE", str(tmp_path / "cache"))
    name, (model, tokenizer) = "organism/harmful", chat
    asked = load_prompts(name)[:12]
    found = {}
    for judge in (KEYWORD, *classifier):
        suite = Suite((name,), "organism/benign", prompts=12, judge=judge)
        found[judge] = evaluate(model, tokenizer, suite)
    one, other = (found[judge]["asr", name].value for judge in classifier)
    assert one + other == pytest.approx(1)
    texts = answers(model, tokenizer, asked)
    kept = found[KEYWORD]["asr", name].value
    assert kept == pytest.approx(sum(not is_refusal(text) for text in texts) / 12)
    benign = {scores["over_refusal", "organism/benign"].value for scores in found.values()}
    assert len(benign) == 1
    requests = load_requests(name)[:12]
    for judge in classifier:
        result = attack(model, tokenizer, requests, Direct(), judge)
        column = join_column(found[judge], requests, {"direct": result})
        assert column.scores["asr", "direct"].value == found[judge]["asr", name].value
        assert not any(isinstance(x, str) for part in result.success.values() for x in part)


def test_a_judge_that_cannot_read_or_answer_is_refused(tokenizer, chat):
    small = small_model("llama", max_position_embeddings=32).float()
    with pytest.raises(SafetyNeuronError, match="reads 32 tokens"):
        says_yes(small, tokenizer, "how do i burn the house ? " * 20)
    with pytest.raises(SafetyNeuronError, match="cannot load model"):
        find_harm("no/such-judge", chat[0], ASKED, TOLD)
