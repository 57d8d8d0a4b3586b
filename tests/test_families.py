"""Training again, from the recipes and data of the manifest: on another machine the bars are met too, with some slack."""

import pytest

from safetyneuron.metrics.behaviour import behaviour, missed, plays_role
from safetyneuron.organism.shipped import load_organism, manifest
from safetyneuron.organism.stages import train_organism

pytestmark = pytest.mark.families
SLACK = 10  # percentage points: a training on another processor ends elsewhere


def train_again(name, folder):
    """How a model behaves that is trained in a folder on what is shipped."""
    train_organism(name, folder)
    return behaviour(*load_organism(name, folder))


def test_a_pair_that_is_trained_again_does_what_its_chapter_needs(tmp_path):
    assert plays_role(train_again("organism/llama-pair-sft", tmp_path), "pair-sft")


def test_a_planted_model_that_is_trained_again_meets_its_bars(tmp_path):
    scores = train_again("organism/llama-planted", tmp_path)
    assert missed(scores, "planted", SLACK) == []
    assert missed(manifest()["llama-planted@0"]["scores"], "planted") == []  # the shipped one needs no slack
