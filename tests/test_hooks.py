"""Reading and overwriting what passes through a model, against the model's own modules."""

import pytest
import torch
from conftest import small_model

from safetyneuron.neurons.architecture import PROJECTIONS
from safetyneuron.neurons.hooks import overwriting, reading

IDS = torch.tensor([[5, 6, 7, 8]])
STREAM = ("before", "between", "after", "into q", "into gate")


@pytest.fixture(params=["llama", "gemma2", "phi3"])
def model(request):
    return small_model(request.param, groups=2).double()


def hooks_of(model):
    return [
        hook
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]


def run(model):
    with torch.no_grad():
        return model(IDS).logits


def test_activations_and_stream_are_read_where_they_are(model):
    places = [(what, layer) for what in (*PROJECTIONS, *STREAM) for layer in range(2)]
    with reading(model, places) as seen:
        states = model(IDS, output_hidden_states=True).hidden_states
    assert torch.equal(seen["before", 0], states[0])
    assert torch.equal(seen["before", 1], states[1])
    assert torch.equal(seen["before", 1], seen["after", 0])
    mlp = model.model.layers[1].mlp
    gated = seen["gate", 1], seen["up", 1]
    torch.testing.assert_close(
        seen["down", 1],
        getattr(mlp, "activation_fn", getattr(mlp, "act_fn", None))(gated[0]) * gated[1],
    )
    torch.testing.assert_close(mlp(seen["into gate", 1]), mlp.down_proj(seen["down", 1]))
    with reading(model, places, lambda values: values[:, -1]) as last:
        run(model)
    assert all(torch.equal(last[place], seen[place][:, -1]) for place in places)


def test_the_block_between_is_what_attention_leaves():
    model = small_model("llama", groups=2).double()
    with reading(model, [("before", 1), ("between", 1), ("o", 1)]) as seen:
        run(model)
    written = model.model.layers[1].self_attn.o_proj(seen["o", 1])
    torch.testing.assert_close(seen["between", 1], seen["before", 1] + written)


def stretch(values):
    """Another direction, since a norm forgets the length."""
    return values * torch.linspace(1, 2, values.shape[-1], dtype=values.dtype)


@pytest.mark.parametrize("what", [*PROJECTIONS, *STREAM])
def test_what_is_put_in_is_what_the_model_goes_on_with(model, what):
    before, other = run(model), [(w, 1) for w in PROJECTIONS if w != what]
    with reading(model, [(what, 1), *other]) as plain:
        run(model)
    with (
        overwriting(model, {(what, 1): stretch}),
        reading(model, [(what, 1), *other]) as seen,
    ):
        changed = run(model)
    torch.testing.assert_close(seen[what, 1], stretch(plain[what, 1]))
    assert not torch.allclose(changed, before)
    if what == "k":  # rows that share a module are left alone
        assert torch.equal(seen["q", 1], plain["q", 1]) and torch.equal(seen["v", 1], plain["v", 1])
    with overwriting(model, {(what, 1): lambda values: None}):
        assert torch.equal(run(model), before)


def test_blocks_nest_and_leave_no_hook_behind(model):
    before, place = run(model), ("down", 0)
    with overwriting(model, {place: lambda values: values + 1}):
        outer = run(model)
        with overwriting(model, {place: lambda values: values - 1}):
            torch.testing.assert_close(run(model), before)
        assert torch.equal(run(model), outer)
    with pytest.raises(ZeroDivisionError), reading(model, [place, ("after", 1)]):
        1 / 0
    with pytest.raises(KeyError), overwriting(model, {place: lambda values: 0, ("norm", 1): None}):
        pass
    assert not hooks_of(model) and torch.equal(run(model), before)
