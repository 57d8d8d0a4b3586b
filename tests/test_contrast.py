import pytest
import torch
from conftest import small_llama, small_model

from safetyneuron import NeuronSet, SafetyNeuronError, load_prompts
from safetyneuron.detectors.change_scores import ChangeScores, change_scores, completion_mask
from safetyneuron.kept import contrast
from safetyneuron.metrics import answers
from safetyneuron.neurons.activations import activations, channel_means, mean_ablated
from safetyneuron.neurons.patching import patched_generation

PROMPTS = (
    load_prompts("organism/harmful")[:6] + load_prompts("organism/adversarial")[:2]
)  # of different lengths


def pair(family="llama", **options):
    """Two models of one shape with different weights, wide enough in their weights to write varied text."""
    return tuple(
        small_model(family, groups=2, seed=seed, max_position_embeddings=128, **options)
        for seed in (0, 1)
    )


def everything(model, share=1.0, seed=0):
    mask = torch.rand(2, 28, generator=torch.Generator().manual_seed(seed)) < share
    return NeuronSet(NeuronSet.empty(model).masks | {"down": mask})


@pytest.mark.parametrize(
    "family, options",
    [("llama", {}), ("mistral", {"sliding_window": 5}), ("qwen2", {}), ("phi3", {})],
)
def test_patching_everything_reproduces_the_donors_feed_forward_outputs(family, options, tokenizer):
    recipient, donor = pair(family, **options)
    for layer in range(2):  # with the same down projection, equal activations are equal outputs
        recipient.model.layers[layer].mlp.down_proj.load_state_dict(
            donor.model.layers[layer].mlp.down_proj.state_dict()
        )
    ids, outputs = torch.tensor([tokenizer(PROMPTS[0])["input_ids"]]), {}
    for name, model in (("donor", donor), ("recipient", recipient)):
        for layer in range(2):
            model.model.layers[layer].mlp.register_forward_hook(
                lambda m, i, o, key=(name, layer): outputs.setdefault(key, []).append(o)
            )
    with torch.no_grad(), patched_generation(recipient, donor, everything(recipient)):
        recipient(input_ids=ids, use_cache=False)
    for layer in range(2):
        assert outputs["recipient", layer][0].equal(outputs["donor", layer][0])


def test_patching_nothing_is_the_recipient_bit_for_bit(tokenizer):
    recipient, donor = pair()
    ids = torch.tensor([tokenizer(PROMPTS[0])["input_ids"]])
    with torch.no_grad():
        expected = recipient(input_ids=ids).logits
        with patched_generation(recipient, donor, NeuronSet.empty(recipient)):
            assert recipient(input_ids=ids).logits.equal(expected)
    plain = answers(recipient, tokenizer, PROMPTS)
    with patched_generation(recipient, donor, NeuronSet.empty(recipient)):
        assert answers(recipient, tokenizer, PROMPTS) == plain


def slow_reference(recipient, donor, neurons, ids, count):
    """Greedy patched decoding by its definition: no cache, the donor runs anew on the whole text for every token."""
    mask = neurons.masks["down"]
    for _ in range(count):
        with activations(donor) as read:
            donor(input_ids=ids, use_cache=False)

        def replace(module, inputs, layer):
            return (torch.where(mask[layer], read[layer], inputs[0]),)

        handles = [
            recipient.model.layers[l].mlp.down_proj.register_forward_pre_hook(
                lambda m, i, l=l: replace(m, i, l)
            )
            for l in range(2)
        ]
        ids = torch.cat(
            [ids, recipient(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1
        )
        for handle in handles:
            handle.remove()
    return ids


@pytest.mark.parametrize("family, options", [("llama", {}), ("mistral", {"sliding_window": 5})])
def test_generation_with_two_caches_is_generation_without_any(family, options, tokenizer):
    recipient, donor = pair(family, **options)
    neurons, ids = everything(recipient, 0.5), torch.tensor([tokenizer(PROMPTS[0])["input_ids"]])
    with torch.no_grad():
        expected = slow_reference(recipient, donor, neurons, ids, 8)
        with patched_generation(recipient, donor, neurons):
            found = recipient.generate(
                ids, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None
            )
        assert found.equal(expected)
        assert not recipient.generate(
            ids, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None
        ).equal(expected)


def test_a_batch_of_one_equals_a_batch_of_eight(tokenizer):
    recipient, donor = pair()
    with patched_generation(recipient, donor, everything(recipient, 0.5)):
        assert answers(recipient, tokenizer, PROMPTS, batch_size=1) == answers(
            recipient, tokenizer, PROMPTS, batch_size=8
        )


def test_no_hook_is_left_behind_even_after_an_error(tokenizer):
    recipient, donor = pair()
    with pytest.raises(RuntimeError), patched_generation(recipient, donor, everything(recipient)):
        raise RuntimeError
    change_scores(recipient, donor, tokenizer, PROMPTS[:1], max_new_tokens=2)
    with mean_ablated(recipient, everything(recipient), {"down": torch.zeros(2, 28)}):
        pass
    assert not any(
        m._forward_pre_hooks or m._forward_hooks
        for model in (recipient, donor)
        for m in model.modules()
    )


def test_positions_choose_the_first_pass_or_the_ones_after_it(tokenizer):
    recipient, donor = pair()
    neurons, ids = everything(recipient), torch.tensor([tokenizer(PROMPTS[0])["input_ids"]])

    def run():
        return recipient.generate(
            ids, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None
        )[0, ids.shape[1] :].tolist()

    found = {}
    for positions in ("all", "prompt", "completion"):
        with patched_generation(recipient, donor, neurons, positions):
            found[positions] = run()
    assert found["all"][0] == found["prompt"][0] and found["completion"][0] == run()[0]
    assert len({tuple(text) for text in found.values()}) == 3


def test_change_scores_are_their_definition(tokenizer):
    model, aligned = pair()
    found = change_scores(model, aligned, tokenizer, PROMPTS, max_new_tokens=5, batch_size=3)
    squares, count = torch.zeros(2, 28, dtype=torch.float64), 0
    for prompt in PROMPTS:
        ids = torch.tensor(
            [
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": prompt}],
                    add_generation_prompt=True,
                    return_dict=False,
                )
            ]
        )
        tokens = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
        with torch.no_grad(), activations(model) as first, activations(aligned) as second:
            model(input_ids=tokens), aligned(input_ids=tokens)
        for layer in range(2):
            squares[layer] += (first[layer] - second[layer])[0, ids.shape[1] :].square().sum(0)
        count += tokens.shape[1] - ids.shape[1]
    torch.testing.assert_close(found.values, (squares / count).sqrt(), rtol=1e-5, atol=1e-6)
    assert (found.values[-1] > 0).all()  # the last layer is not left out


def test_a_completion_ends_with_its_end():
    model = small_llama()  # token 4 ends

    class Words:
        eos_token_id = 4

    tokens = torch.tensor([[9, 4, 7, 8, 4, 0], [9, 9, 7, 7, 7, 7]])
    assert completion_mask(tokens, 2, model, Words).tolist() == [
        [False, False, True, True, True, False],
        [False, False, True, True, True, True],
    ]


def test_selection_takes_the_highest_scores_of_all_layers():
    draw = torch.Generator().manual_seed(0)
    empty = NeuronSet.empty(small_llama())
    scores = ChangeScores(empty, torch.rand(2, 28, generator=draw).double())
    chosen = scores.select(0.25)
    assert len(chosen) == chosen.counts()["down"] == 14
    assert scores.values[chosen.masks["down"]].min() > scores.values[~chosen.masks["down"]].max()
    assert len(scores.select(0)) == 0 and len(scores.select(1)) == 56
    assert scores.top(14) == chosen
    last = scores.last_layers(30).masks["down"]
    assert last[1].all() and last[0].sum() == 2
    few = [scores.last_layers(9, seed).masks["down"] for seed in (0, 0, 1)]
    assert all(mask[1].sum() == 9 and not mask[0].any() for mask in few)
    assert few[0].equal(few[1]) and not few[0].equal(few[2])


def test_constant_patches_replace_activations(tokenizer):
    model, donor = pair()
    mean = channel_means(donor, tokenizer, PROMPTS)["down"]
    assert mean.shape == (2, 28)
    ids = torch.tensor([tokenizer(PROMPTS[0])["input_ids"]])
    with (
        torch.no_grad(),
        mean_ablated(model, everything(model, 0.5), {"down": mean}),
        activations(model) as read,
    ):
        model(input_ids=ids)
    mask = everything(model, 0.5).masks["down"]
    for layer in range(2):
        assert (read[layer][0][:, mask[layer]] == mean[layer][mask[layer]].to(read[layer])).all()


def test_bad_input_is_refused(tokenizer):
    recipient, donor = pair()
    other = NeuronSet(
        NeuronSet.empty(recipient).masks | {"up": torch.ones(2, 28, dtype=torch.bool)}
    )
    with (
        pytest.raises(SafetyNeuronError, match="only channels of 'down'"),
        patched_generation(recipient, donor, other),
    ):
        pass
    with (
        pytest.raises(SafetyNeuronError, match="different shapes"),
        patched_generation(recipient, small_llama(intermediate_size=20), everything(recipient)),
    ):
        pass
    with (
        pytest.raises(SafetyNeuronError, match="the same object"),
        patched_generation(recipient, recipient, everything(recipient)),
    ):
        pass
    with (
        pytest.raises(SafetyNeuronError, match="use one of all"),
        patched_generation(recipient, donor, everything(recipient), "last"),
    ):
        pass
    with pytest.raises(SafetyNeuronError, match="no prompts"):
        change_scores(recipient, donor, tokenizer, [])
    with pytest.raises(SafetyNeuronError, match="fraction is 2"):
        ChangeScores(NeuronSet.empty(recipient), torch.rand(2, 28)).select(2)


def test_change_scores_are_kept_and_read_from_a_file(tmp_path, monkeypatch, base, chat):
    monkeypatch.setenv("SAFETYNEURON_CACHE", str(tmp_path))
    case = base[0], chat[0], chat[1], load_prompts("organism/harmful")[:4]
    made = contrast.change_scores(*case)
    assert made.values.equal(change_scores(*case).values)
    monkeypatch.setattr(contrast, "measure", None)  # nothing is computed again
    read = contrast.change_scores(*case)
    assert read.values.equal(made.values)
    assert read.select(0.1).masks["down"].equal(made.select(0.1).masks["down"])
    assert read.select(0.1).shapes == made.select(0.1).shapes
    with pytest.raises(TypeError):
        contrast.change_scores(*case, max_new_tokens=3)  # another question
