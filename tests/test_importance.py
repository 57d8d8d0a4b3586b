import pytest
import torch
from conftest import small_llama
from oracle import brute_force

from safetyneuron.recording import recording

SHAPES = {
    "one head per group": dict(heads=4, groups=4, head_width=10),
    "two heads per group": dict(heads=4, groups=2, head_width=12),
    "three groups of three, wide heads": dict(heads=9, groups=3, head_width=14),
    "one group for all, narrow heads": dict(heads=4, groups=1, head_width=6),
    "biases": dict(heads=4, groups=2, head_width=10, attention_bias=True, mlp_bias=True),
}


def padded_batch(lengths, sides, width=9):
    """Random tokens; each prompt padded on its own side."""
    ids = torch.randint(5, 800, (len(lengths), width), generator=torch.Generator().manual_seed(1))
    real = torch.zeros_like(ids)
    for row, (length, side) in enumerate(zip(lengths, sides)):
        real[row, slice(width - length, None) if side == "left" else slice(length)] = 1
    return {"input_ids": ids, "attention_mask": real}


def measured(model, batch):
    with torch.inference_mode(), recording(model) as recorder:
        recorder.start(batch["attention_mask"])
        model(**batch, use_cache=False)
        return recorder.finish()


def randomise_biases(model):
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)


@pytest.mark.parametrize("shape", SHAPES)
def test_closed_forms_agree_with_zeroing_every_neuron(shape):
    model = small_llama(**SHAPES[shape])
    randomise_biases(model)
    batch = padded_batch([9, 5, 6], ["left", "left", "right"])
    truth, closed = brute_force(model, batch), measured(model, batch)
    for projection, expected in truth.items():
        assert expected.min() > 0
        torch.testing.assert_close(closed[projection], expected, rtol=1e-5, atol=0)


def test_recording_leaves_the_forward_pass_and_the_model_as_they_were(model):
    batch = padded_batch([9, 4], ["left", "left"])
    with torch.no_grad():
        before = model(**batch).logits
        with recording(model) as recorder:
            recorder.start(batch["attention_mask"])
            during = model(**batch, use_cache=False).logits
        after = model(**batch).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(during[real], before[real], rtol=1e-9, atol=1e-9)
    assert torch.equal(before, after)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
