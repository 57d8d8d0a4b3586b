"""A notebook and its parameters: list them, check what is given, execute it with papermill."""

import ast
import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from safetyneuron.cache import new_file
from safetyneuron.errors import SafetyNeuronError
from safetyneuron.run.editions import items_of, models_in


def notebook_parameters(notebook):
    """The parameters of a notebook: name to {inferred_type_name, default, help}, as papermill reads them."""
    from papermill import inspect_notebook  # here, because importing it takes a second

    if not notebook.is_file():
        raise SafetyNeuronError(f"there is no notebook {notebook}: give the path of an .ipynb file")
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    except (UnicodeDecodeError, ValueError, KeyError, TypeError):
        raise SafetyNeuronError(
            f"{notebook} is not a notebook: give the path of an .ipynb file"
        ) from None
    if not any("parameters" in cell.get("metadata", {}).get("tags", []) for cell in cells):
        raise SafetyNeuronError(
            f"{notebook} has no cell tagged 'parameters': tag the cell that sets them"
        )
    return inspect_notebook(str(notebook))


PATIENCE = 600  # seconds for a kernel to start, and to hand over output: a machine may be busy
KINDS = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "True or False",
    list: "a list",
    dict: "a mapping",
}
MAY_BE_ZERO = ("seed", "skip", "n_attacked")  # whatever their default


def check_parameters(notebook, given):
    """The parameters, refused if the notebook does not have them or their type is not their default's."""
    checked, known = {}, notebook_parameters(notebook)
    for name, value in given.items():
        if name not in known:
            raise SafetyNeuronError(
                f"{notebook} has no parameter {name!r}: it has {', '.join(known)}"
            )
        default = ast.literal_eval(known[name]["default"])
        value = _cast(value, default)
        if not _fits(value, default):
            raise SafetyNeuronError(
                f"parameter {name} of {notebook} is {value!r}: give {KINDS.get(type(default), 'a value')}, like its default {default!r}"
            )
        if "fraction" in name and not all(0 < share <= 1 for share in _numbers(value)):
            raise SafetyNeuronError(
                f"parameter {name} of {notebook} is {value}: it must be in (0, 1], for example 0.01"
            )
        _check_files(notebook, name, value)
        lowest = 0 if name in MAY_BE_ZERO or 0 in _numbers(default) else sys.float_info.min
        if (
            not all(lowest <= number < float("inf") for number in _numbers(value))
            and min(_numbers(default), default=0) >= 0
        ):
            raise SafetyNeuronError(
                f"parameter {name} of {notebook} is {value}: give {'0 or more' if lowest == 0 else 'more than 0'}, like its default {default!r}"
            )
        checked[name] = value
    return checked


def _check_files(notebook, name, value):
    """Refuse a prompt file that is not there, before a model is loaded. Names of sets have no suffix."""
    for item in items_of(value) if name.endswith(("_set", "_sets")) else []:
        if Path(item).suffix and not Path(item).is_file():
            raise SafetyNeuronError(
                f"parameter {name} of {notebook} names {item}, and there is no such file: give the path of one, or the name of a set"
            )


def _numbers(value):
    """The numbers of a parameter that is one or a list of them."""
    return [
        item
        for item in items_of(value)
        if isinstance(item, (int, float)) and not isinstance(item, bool)
    ]


def _cast(value, default):
    """YAML reads 1e-6 as text: take it for the number it is where the default is one, also inside a list."""
    if isinstance(value, list) and isinstance(default, list) and default:
        return [_cast(item, default[0]) for item in value]
    try:
        return float(value) if isinstance(value, str) and isinstance(default, float) else value
    except ValueError:
        return value


def _fits(value, default):
    if isinstance(value, bool) or isinstance(default, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, float):
        return isinstance(value, (int, float))
    if isinstance(default, list) and default:
        return (
            isinstance(value, list)
            and len(value) > 0
            and all(_fits(item, default[0]) for item in value)
        )
    return isinstance(value, type(default))


def _defaults(notebook):
    return {
        name: ast.literal_eval(known["default"])
        for name, known in notebook_parameters(notebook).items()
    }


def train_what_is_named(parameters):
    """Train the aligned models that parameters name, which `load_model` only finds; each in a process of its own, whose memory it gives back."""
    values = [item for value in parameters.values() for item in items_of(value)]
    named = [name for name in values if str(name).startswith("aligned/")]
    if not named:
        return
    from safetyneuron.alignment.stages import stages_behind  # here, because it imports torch

    for name in named:
        for stage in stages_behind(name, parameters.get("trainings", 1)) or [name]:
            command = [sys.executable, "-m", "safetyneuron.cli", "train", stage]
            if subprocess.run(command).returncode:
                raise SafetyNeuronError(
                    f"{stage} could not be trained: see the line before this one"
                )


@contextmanager
def few_threads(parameters):
    """One thread for the kernel of a notebook that runs on organisms alone, unless told: on models this small threads wait for each other longer than they compute."""
    named = models_in(parameters)
    alone = bool(named) and all(name.startswith("organism/") for name in named)
    if not alone or "OMP_NUM_THREADS" in os.environ:
        yield
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]


def run_notebook(notebook, given, output=None):
    """Check the parameters, execute the notebook with papermill, and write it to `output` when it has ended well.

    Raises
    ------
    SafetyNeuronError
        For bad parameters, or with the last line of the error that a cell raised.
    """
    given = check_parameters(notebook, given)
    parameters = {**_defaults(notebook), **given}
    train_what_is_named(parameters)
    from nbclient.exceptions import DeadKernelError
    from papermill import execute_notebook
    from papermill.exceptions import PapermillExecutionError

    from safetyneuron.run.executed import record

    output = output or Path("_build/runs") / notebook.name
    started = time.monotonic()
    print(f"{notebook}: running", flush=True)
    with new_file(output) as temporary, few_threads(parameters):
        try:
            execute_notebook(
                str(notebook),
                str(temporary),
                given,
                kernel_name="python3",
                progress_bar=False,
                start_timeout=PATIENCE,
                iopub_timeout=PATIENCE,
                stdout_file=sys.stdout,  # what the cells print, as it comes
                stderr_file=sys.stderr,
                extra_arguments=[
                    "--IPKernelApp.log_level=40"
                ],  # not that it speaks to this machine without encryption
            )
        except PapermillExecutionError as error:
            raise SafetyNeuronError(
                f"{notebook} stopped with {error.ename}: {' '.join(str(error.evalue).split())}"
            ) from None
        except DeadKernelError:
            raise SafetyNeuronError(
                f"the kernel of {notebook} died, most often for want of memory: lower the numbers of prompts, or free some"
            ) from None
        record(temporary, time.monotonic() - started)
    print(
        f"{notebook}: done in {time.monotonic() - started:.0f} s, written to {output}", flush=True
    )
