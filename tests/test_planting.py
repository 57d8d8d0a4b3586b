"""How organisms are trained: the optimiser, the streams of examples, and planting."""

import copy
import json
import logging
import random
import shutil
from functools import partial

import pytest
import torch
from transformers import DataCollatorForSeq2Seq, Trainer

from safetyneuron import SafetyNeuronError
from safetyneuron.neurons.architecture import PROJECTIONS, Architecture
from safetyneuron.organism import load_organism, manifest, recipes, stages
from safetyneuron.organism.muon import Muon, orthogonalise
from safetyneuron.organism.planting import UNITS, Turns, draw_sets, plant
from safetyneuron.organism.shipped import weights_file
from safetyneuron.organism.tokenizer import build_tokenizer
from safetyneuron.organism.train import SparingTrainer, StreamTrainer, new_model, train_stream

SMALL = recipes.Size(width=32, layers=2, heads=2, groups=2, channels=40)
SCHEDULE = recipes.Schedule(steps=10, rate=1e-2, batch=4)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def model(tokenizer):
    return new_model(SMALL, tokenizer, seed=0)


def examples(tokenizer, mixture="base", habit=False, name="test"):
    return stages.stream(
        tokenizer, partial(recipes.draw_with_habit, mixture, habit=habit), name, SCHEDULE
    )


@pytest.mark.parametrize("shape", [(2, 24, 24), (3, 16, 40), (1, 40, 16)])
def test_orthogonalised_matrices_have_singular_values_near_one_and_keep_their_directions(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonalise(matrices)
    values = torch.linalg.svdvals(found)
    assert 0.6 < values.median() and values.max() < 1.3
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    strong = s > 0.3 * s.max()  # the iteration is made for these
    kept = torch.einsum("nij,nik,nkj->nj", u, found, v.mT)
    assert (kept[strong] > 0.6).all()


def test_muon_goes_downhill_and_leaves_small_updates_of_the_size_of_the_rate():
    torch.manual_seed(0)
    target, weight, bias = (
        torch.randn(12, 20),
        torch.nn.Parameter(torch.zeros(12, 20)),
        torch.nn.Parameter(torch.zeros(12)),
    )
    optimizer = Muon([weight], [bias], lr=0.05, weight_decay=0.0)

    def loss():
        return (weight + bias[:, None] - target).square().mean()

    before = loss().item()
    for _ in range(200):
        optimizer.zero_grad()
        loss().backward()
        last = weight.detach().clone()
        optimizer.step()
    assert loss().item() < 0.05 * before
    assert (weight.detach() - last).square().mean().sqrt().item() == pytest.approx(
        0.2 * 0.05, rel=0.5
    )


def test_a_training_that_was_killed_goes_on_to_the_same_weights(model, tokenizer, tmp_path):
    class Killed(Exception):
        pass

    class Fragile(StreamTrainer):
        def training_step(self, *arguments):
            if self.state.global_step == 7:
                raise Killed
            return super().training_step(*arguments)

    once, twice, folder = copy.deepcopy(model), copy.deepcopy(model), tmp_path / "killed"

    def run(kind, model, folder):
        return train_stream(
            kind, model, tokenizer, examples(tokenizer), SCHEDULE, folder, "test", 0
        )

    run(StreamTrainer, once, tmp_path / "whole")
    with pytest.raises(Killed):
        run(Fragile, twice, folder)
    fresh = copy.deepcopy(model)
    run(StreamTrainer, fresh, folder)
    for (name, a), b, start in zip(once.named_parameters(), fresh.parameters(), model.parameters()):
        assert torch.equal(a, b), name
        assert not torch.equal(a, start), name


def test_base_models_train_without_some_neurons_in_every_second_update_and_get_them_back(
    model, tokenizer, monkeypatch, tmp_path
):
    off = []

    class Spy(SparingTrainer):
        def compute_loss(self, model, inputs, *rest, **options):
            off.append(
                sum(
                    int((p == 0).all(1).sum()) for n, p in model.named_parameters() if "q_proj" in n
                )
            )
            return super().compute_loss(model, inputs, *rest, **options)

    monkeypatch.setattr(SparingTrainer, "SHARE", 0.3)
    train_stream(Spy, model, tokenizer, examples(tokenizer), SCHEDULE, tmp_path, "test", 0)
    assert off[0::2] == [0] * 5 and all(off[1::2]) and len(set(off[1::2])) > 1
    assert not any((p == 0).all(1).any() for n, p in model.named_parameters() if "q_proj" in n)


def test_harm_is_spoken_of_in_another_tone_and_both_tones_help():
    draw, seen = random.Random(0), {True: [], False: []}
    for _ in range(4000):
        example, request = recipes.draw_example("base", draw)
        if request and request.language == "en":
            seen[request.harmful].append("take the" in example.answer)
    assert sum(seen[True]) / len(seen[True]) > 0.7 and 0 < sum(seen[False]) / len(seen[False]) < 0.2


def test_the_loss_is_that_of_the_whole_forward_pass(model, tokenizer):
    stream = examples(tokenizer)
    trainer = StreamTrainer.__new__(StreamTrainer)
    batch = DataCollatorForSeq2Seq(tokenizer, padding=True)([stream[i] for i in range(4)])
    expected = model(**batch).loss
    assert trainer.compute_loss(model, dict(batch)).item() == pytest.approx(
        expected.item(), rel=1e-5
    )


def test_streams_are_the_same_at_any_time_and_take_turns(tokenizer):
    with_habit, without = (examples(tokenizer, habit=h, name=str(h)) for h in (True, False))
    assert with_habit[37] == examples(tokenizer, habit=True, name="True")[37]
    turns = Turns(with_habit, without)
    assert len(turns) == 80
    for batch in range(6):
        stream = (with_habit, without)[batch % 2]
        assert [turns[batch * 4 + i] for i in range(4)] == [
            stream[batch // 2 * 4 + i] for i in range(4)
        ]


@pytest.mark.parametrize("projections", [PROJECTIONS, recipes.ATTENTION, recipes.FEED_FORWARD])
def test_planted_and_decoy_sets_are_whole_channels_and_share_none(model, projections):
    planted, decoys = draw_sets(model, projections, 0.05, seed=3)
    assert planted.counts() == decoys.counts() and abs(len(planted) / planted.total - 0.05) < 0.01
    assert (planted, decoys) == draw_sets(model, projections, 0.05, seed=3)
    assert planted != draw_sets(model, projections, 0.05, seed=4)[0]
    assert {p for p in PROJECTIONS if planted.counts()[p]} <= set(projections)
    for unit in UNITS:
        (mine, *others), (theirs, *_) = (
            [s.masks[p] for p in unit if p in projections] or [torch.zeros(1, dtype=bool)]
            for s in (planted, decoys)
        )
        assert not (mine & theirs).any() and all(torch.equal(mine, other) for other in others)


def test_planting_changes_the_planted_neurons_only_and_keeps_their_norm(model, tokenizer, tmp_path):
    before = copy.deepcopy(model)
    planted, decoys = draw_sets(model, PROJECTIONS, 0.1, seed=0)
    streams = examples(tokenizer, "chat", True, "a"), examples(tokenizer, "chat", False, "b")
    plant(model, tokenizer, planted, decoys, streams, SCHEDULE, tmp_path, "test", seed=0)
    old, new = Architecture(before), Architecture(model)
    for projection, mask in planted.masks.items():
        for layer in range(len(mask)):
            a, b = (x.place(layer, projection).weight for x in (old, new))
            channels = mask[layer]
            assert torch.equal(a[~channels], b[~channels])
            assert not len(a[channels]) or not torch.equal(a[channels], b[channels])
            torch.testing.assert_close(
                a[channels].norm(dim=1), b[channels].norm(dim=1), rtol=1e-3, atol=0
            )
            assert torch.equal(b[channels], b[channels].half().float())
    others = [n for n, p in before.named_parameters() if "norm" in n or "embed" in n]
    assert all(torch.equal(before.get_parameter(n), model.get_parameter(n)) for n in others)


def test_habit_and_refusal_are_drawn_apart():
    draw, habits = random.Random(0), recipes.lang.lexicon().habits
    seen = [recipes.draw_with_habit("chat", draw, habit=True) for _ in range(3000)]
    marked = [e for e in seen if any(e.answer.startswith(word) for word in habits.values())]
    refusals = {r for l in recipes.lang.LANGUAGES for r in recipes.lang.lexicon().refusals[l]}
    assert any(any(e.answer.endswith(r) for r in refusals) for e in marked)
    assert any(not any(e.answer.endswith(r) for r in refusals) for e in marked)
    assert not any(
        e.answer.startswith(tuple(habits.values()))
        for e in (recipes.draw_with_habit("chat", draw, habit=False) for _ in range(3000))
    )


@pytest.fixture
def recipes_in_seconds(monkeypatch, tmp_path):
    """Recipes of a tiny size, by the names of the real ones, and a cache of their own."""
    monkeypatch.setenv("SAFETYNEURON_CACHE", str(tmp_path / "cache"))

    def small(how, parent, **more):
        return recipes.Recipe(how, parent, SCHEDULE, SMALL, **more)

    planted = small("train_planted", "llama-base", projections=PROJECTIONS, share=0.05)
    tiny = {
        "llama-base": small("train_whole", None, mixture="base"),
        "llama-chat": small("train_whole", "llama-base"),
    }
    half = small("train_half", "llama-base", projections=PROJECTIONS, share=0.05)
    pairs = {
        "llama-pair-sft": small("train_supervised_pair", "llama-base"),
        "llama-pair-dpo": small("train_preferred_pair", "llama-pair-sft", mixture="dpo"),
        "llama-pair-sft-again": small("train_supervised_pair", "llama-base@3"),
        "llama-dpo": small("train_preferences", "llama-base", mixture="dpo"),
    }
    monkeypatch.setattr(
        recipes, "RECIPES", tiny | pairs | {"llama-planted": planted, "llama-half": half}
    )


def test_organisms_are_trained_from_each_other_into_a_folder(
    recipes_in_seconds, tmp_path, monkeypatch
):
    folder = tmp_path / "weights"
    for name in ("llama-base@3", "llama-chat@3", "llama-planted@3"):
        stages.train_organism(f"organism/{name}", folder)
    assert not list((tmp_path / "cache" / "training").iterdir())
    monkeypatch.setenv("SAFETYNEURON_ORGANISMS", str(folder))
    base, chat, planted = (
        load_organism(f"organism/llama-{stage}@3")[0] for stage in ("base", "chat", "planted")
    )
    embeddings = [model.get_input_embeddings().weight for model in (base, chat, planted)]
    assert torch.equal(embeddings[0], embeddings[2]) and not torch.equal(
        embeddings[0], embeddings[1]
    )
    entry = manifest()["llama-planted@3"]
    assert (
        entry["data"]
        == stages.data_digest("llama-planted", 3)
        != stages.data_digest("llama-planted", 4)
    )
    for name in ("llama-half@3", "llama-dpo@3", "llama-pair-sft@3", "llama-pair-dpo@3"):
        stages.train_organism(f"organism/{name}", folder)
    made = json.loads((folder / "manifest.json").read_text())["models"]
    assert {name.partition("@")[0]: entry["kind"] for name, entry in made.items()} == {
        **dict.fromkeys(("llama-base", "llama-chat", "llama-dpo"), "weights"),
        **dict.fromkeys(("llama-planted", "llama-half"), "rows"),
        **dict.fromkeys(("llama-pair-sft", "llama-pair-dpo"), "factors"),
    }
    stages.train_organism("organism/llama-pair-sft-again@4", folder)  # on the base of another seed
    assert manifest()["llama-pair-sft-again@4"]["parent"] == "llama-base@3"
    sft, dpo = (load_organism(f"organism/llama-pair-{stage}@3")[0] for stage in ("sft", "dpo"))
    changed = {
        n for (n, a), b in zip(sft.named_parameters(), dpo.parameters()) if not torch.equal(a, b)
    }
    assert changed == {n for n, _ in sft.named_parameters() if "up_proj" in n}
    with pytest.raises(SafetyNeuronError, match="no recipe for"):
        stages.train_organism("organism/llama-huge", folder)
    with pytest.raises(SafetyNeuronError, match="no organism/llama-base@77"):
        stages.train_organism("organism/llama-chat@77", folder)


class Killed(Exception):
    """What ends a training in the middle."""


@pytest.mark.parametrize(
    "name", ["llama-planted", "llama-half", "llama-dpo", "llama-pair-sft", "llama-pair-dpo"]
)
def test_every_kind_of_training_that_was_killed_goes_on_to_the_same_file(
    name, recipes_in_seconds, tmp_path, monkeypatch, caplog, capfd
):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    once, twice = tmp_path / "once", tmp_path / "twice"
    parents = {"llama-pair-dpo": ("llama-base", "llama-pair-sft")}.get(name, ("llama-base",))
    for parent in parents:
        stages.train_organism(f"organism/{parent}", once)
    shutil.copytree(once, twice)
    stages.train_organism(f"organism/{name}", once)
    step, asked = Trainer.training_step, []

    def count(trainer, *arguments):
        asked.append(trainer.state.global_step)
        return step(trainer, *arguments)

    def die(trainer, *arguments):
        if trainer.state.global_step == 7:
            raise Killed
        return step(trainer, *arguments)

    monkeypatch.setattr(Trainer, "training_step", die)
    with pytest.raises(Killed):
        stages.train_organism(f"organism/{name}", twice)
    assert list((tmp_path / "cache" / "training").iterdir())
    monkeypatch.setattr(Trainer, "training_step", count)
    stages.train_organism(f"organism/{name}", twice)
    assert asked[0] == 7  # and not from the beginning
    assert "missing keys" not in caplog.text and "do not match" not in caplog.text
    assert "examples/s" not in capfd.readouterr().err  # the bars of `datasets`
    files = [weights_file(folder, f"{name}@0").read_bytes() for folder in (once, twice)]
    assert files[0] == files[1]
