"""Importance measured by several processes, each on its share of the prompts: `accelerate launch -m safetyneuron.cli importance …`."""

from functools import reduce
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object

from safetyneuron.data.prompts import load_prompts
from safetyneuron.errors import SafetyNeuronError
from safetyneuron.importance.profile import ImportanceProfile, measure_importance
from safetyneuron.models import load_model


def measure_shards(model, tokenizer, prompts, **options):
    """`measure_importance` with the prompts dealt out to the processes and the shards merged; every process returns the whole.

    The minimum over prompts is the minimum over shards (Zhao et al. 2025, Eq 3), so nothing but rounding depends on their number.

    Raises
    ------
    SafetyNeuronError
        As `measure_importance`, or if there are fewer prompts than processes.
    """
    state = PartialState()
    mine = prompts[state.process_index :: state.num_processes]
    if len(prompts) < state.num_processes:
        raise SafetyNeuronError(
            f"{len(prompts)} prompts cannot be dealt out to {state.num_processes} processes: start fewer"
        )
    shard = measure_importance(model, tokenizer, mine, progress=state.is_main_process, **options)
    return reduce(ImportanceProfile.merge, gather_object([shard]))


def write_profile(model_name, prompt_set, count, output, rule="exact", dtype=None):
    """Measure a model on the training split of a set and write the profile, from the first process."""
    state = PartialState()
    if count < 1:
        raise SafetyNeuronError(f"{count} prompts cannot be measured: give --count 1 or more")
    if not Path(output).parent.is_dir():
        raise SafetyNeuronError(
            f"{output} cannot be written: there is no folder {Path(output).parent}"
        )
    with state.local_main_process_first():  # so that one process downloads or trains the model
        model, tokenizer = load_model(model_name, device=str(state.device), dtype=dtype)
    profile = measure_shards(
        model, tokenizer, load_prompts(prompt_set, split="train")[:count], rule=rule
    )
    if state.is_main_process:
        profile.save(output)
        print(f"{profile.count} prompts, written to {output}")
