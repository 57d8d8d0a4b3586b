"""The `safetyneuron` command: rerun a notebook with other parameters, measure importance, train and export organisms, check an edition."""

import argparse
import ast
import json
import logging
import sys
import time
from pathlib import Path

import yaml

from safetyneuron.cache import cache_folder, new_file
from safetyneuron.errors import SafetyNeuronError

TRAIN = (
    "Train an organism. It does not take the place of the shipped one, but is used where SAFETYNEURON_ORGANISMS names the"
    " folder that it is written to; -o safetyneuron/organism/weights replaces the shipped one."
)


def main(arguments=None):
    """Entry point; returns the exit code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        options.action(options)
    except SafetyNeuronError as error:
        if options.debug:
            raise
        print(f"safetyneuron: {error}", file=sys.stderr)
        return 2
    return 0


def _parser():
    parser = argparse.ArgumentParser(prog="safetyneuron", description=__doc__)
    parser.add_argument("--debug", action="store_true", help="show where an error was raised")
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="execute a notebook with parameters")
    run.add_argument("notebook", type=Path)
    run.add_argument("-p", "--parameter", action="append", default=[], metavar="NAME=VALUE", help="one parameter; repeat for more")
    run.add_argument("-f", "--parameter-file", type=Path, metavar="YAML", help="parameters as a YAML mapping")
    run.add_argument("-o", "--output", type=Path, help="where to write the executed notebook (default: _build/runs/NAME)")
    run.set_defaults(action=lambda o: run_notebook(o.notebook, _given(o), o.output))
    params = commands.add_parser("params", help="list the parameters of a notebook")
    params.add_argument("notebook", type=Path)
    params.set_defaults(action=lambda o: _show(o.notebook))
    importance = commands.add_parser("importance", help="measure importance, also with several processes: accelerate launch -m safetyneuron.cli importance …")
    importance.add_argument("model")
    importance.add_argument("prompts", help="name of a set, or a file")
    importance.add_argument("-n", "--count", type=int, default=200, help="prompts (default: 200)")
    importance.add_argument("--rule", default="exact")
    importance.add_argument("--dtype", default="auto")
    importance.add_argument("-o", "--output", type=Path, required=True, help="profile to write (.safetensors)")
    importance.set_defaults(action=_importance)
    train = commands.add_parser("train", help="train an organism again, which takes up to half an hour", description=TRAIN)
    train.add_argument("name", help="for example organism/llama-chat, or with a seed organism/llama-chat@3")
    train.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="of weights (default: organism, in the cache)")
    train.set_defaults(action=_train)
    export = commands.add_parser("export", help="write an organism as a plain Hugging Face folder")
    export.add_argument("name", help="for example organism/llama-planted")
    export.add_argument("folder", type=Path, help="a new or empty one")
    export.set_defaults(action=_export)
    check = commands.add_parser("check", help="look up what an edition needs before a GPU hour is spent")
    check.add_argument("edition", type=Path, help="a file of workflow/editions")
    check.set_defaults(action=_check)
    return parser


def _importance(options):
    from safetyneuron.parallel import write_profile

    write_profile(options.model, options.prompts, options.count, options.output, options.rule, options.dtype)


def _train(options):
    from safetyneuron.organism import train_organism

    folder = (options.output or cache_folder() / "organism").absolute()
    train_organism(options.name, folder)
    print(f"{options.name} is in {folder}: set SAFETYNEURON_ORGANISMS={folder} to use it")


def _export(options):
    from safetyneuron.organism import export_organism

    export_organism(options.name, options.folder)
    print(f"{options.name} is in {options.folder}")


def _check(options):
    from safetyneuron.preflight import check

    check(_read_mapping(options.edition))


def _given(options):
    """Parameters from the file, then from the command line; values are read as YAML."""
    given = _read_mapping(options.parameter_file) if options.parameter_file else {}
    for text in options.parameter:
        name, equals, value = text.partition("=")
        if not equals:
            raise SafetyNeuronError(f"parameter {text!r} is not NAME=VALUE: write for example -p fraction=0.01")
        try:
            given[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise SafetyNeuronError(f"parameter {text!r} cannot be read ({' '.join(str(error).split())}): write a YAML value, lists as [a, b]") from None
    return given


def _read_mapping(path):
    try:
        mapping = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SafetyNeuronError(f"parameter file {path} cannot be read ({' '.join(str(error).split())}): write a YAML mapping") from None
    if not isinstance(mapping, dict):
        raise SafetyNeuronError(f"parameter file {path} holds no mapping: write lines NAME: VALUE")
    return mapping


def notebook_parameters(notebook):
    """The parameters of a notebook: name to {inferred_type_name, default, help}, as papermill reads them."""
    from papermill import inspect_notebook  # here, because importing it takes a second

    if not notebook.is_file():
        raise SafetyNeuronError(f"there is no notebook {notebook}: give the path of an .ipynb file")
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    except (UnicodeDecodeError, ValueError, KeyError, TypeError):
        raise SafetyNeuronError(f"{notebook} is not a notebook: give the path of an .ipynb file") from None
    if not any("parameters" in cell.get("metadata", {}).get("tags", []) for cell in cells):
        raise SafetyNeuronError(f"{notebook} has no cell tagged 'parameters': tag the cell that sets them")
    return inspect_notebook(str(notebook))


def _show(notebook):
    for name, parameter in notebook_parameters(notebook).items():
        print(f"{name} = {parameter['default']}    # {parameter['help']}")


def check_parameters(notebook, given):
    """The parameters, refused if the notebook does not have them or their type is not their default's."""
    checked, known = {}, notebook_parameters(notebook)
    for name, value in given.items():
        if name not in known:
            raise SafetyNeuronError(f"{notebook} has no parameter {name!r}: it has {', '.join(known)}")
        default = ast.literal_eval(known[name]["default"])
        value = _cast(value, default)
        if not _fits(value, default):
            raise SafetyNeuronError(
                f"parameter {name} of {notebook} is {value!r}: give a {type(default).__name__}, like its default {default!r}"
            )
        if "fraction" in name and not all(0 < share <= 1 for share in _numbers(value)):
            raise SafetyNeuronError(f"parameter {name} of {notebook} is {value}: it must be in (0, 1], for example 0.01")
        lowest = 0 if name in ("seed", "skip") or 0 in _numbers(default) else sys.float_info.min
        if not all(lowest <= number < float("inf") for number in _numbers(value)) and min(_numbers(default), default=0) >= 0:
            raise SafetyNeuronError(f"parameter {name} of {notebook} is {value}: give {'0 or more' if lowest == 0 else 'more than 0'}, like its default {default!r}")
        checked[name] = value
    return checked


def _numbers(value):
    """The numbers of a parameter that is one or a list of them."""
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, (int, float)) and not isinstance(item, bool)]


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
        return isinstance(value, list) and len(value) > 0 and all(_fits(item, default[0]) for item in value)
    return isinstance(value, type(default))


def run_notebook(notebook, given, output=None):
    """Check the parameters, execute the notebook with papermill, and write it to `output` when it has ended well.

    Raises
    ------
    SafetyNeuronError
        For bad parameters, or with the last line of the error that a cell raised.
    """
    given = check_parameters(notebook, given)
    from nbclient.exceptions import DeadKernelError
    from papermill import execute_notebook
    from papermill.exceptions import PapermillExecutionError

    from safetyneuron.runs import record

    output = output or Path("_build/runs") / notebook.name
    started = time.monotonic()
    print(f"{notebook}: running", flush=True)
    with new_file(output) as temporary:
        try:
            execute_notebook(
                str(notebook),
                str(temporary),
                given,
                kernel_name="python3",
                progress_bar=False,
                stdout_file=sys.stdout,  # what the cells print, as it comes
                stderr_file=sys.stderr,
                extra_arguments=["--IPKernelApp.log_level=40"],  # not that it speaks to this machine without encryption
            )
        except PapermillExecutionError as error:
            raise SafetyNeuronError(f"{notebook} stopped with {error.ename}: {' '.join(str(error.evalue).split())}") from None
        except DeadKernelError:
            raise SafetyNeuronError(f"the kernel of {notebook} died, most often for want of memory: lower the numbers of prompts, or free some") from None
        record(temporary, time.monotonic() - started)
    print(f"{notebook}: done in {time.monotonic() - started:.0f} s, written to {output}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
