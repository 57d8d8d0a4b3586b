"""The `safetyneuron` command: rerun a notebook with other parameters, measure importance, train and export organisms, hold a detector against planted neurons, check an edition."""

import argparse
import logging
import sys
from pathlib import Path

import yaml

from safetyneuron.cache import cache_folder
from safetyneuron.errors import SafetyNeuronError
from safetyneuron.run.editions import read_edition, read_mapping
from safetyneuron.run.execute import notebook_parameters, run_notebook

TRAIN = (
    "Train an organism, and measure which of its bars it misses. It does not take the place of the shipped one, but is"
    " used where SAFETYNEURON_ORGANISMS names the folder that it is written to; -o safetyneuron/organism/weights replaces"
    " the shipped one."
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
    for add in (_add_run, _add_params, _add_importance, _add_train, _add_export, _add_league, _add_truth, _add_check):  # fmt: skip
        add(commands)
    return parser


def _add_run(commands):
    run = commands.add_parser("run", help="execute a notebook with parameters")
    run.add_argument("notebook", type=Path)
    run.add_argument(
        "-p",
        "--parameter",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="one parameter; repeat for more",
    )
    run.add_argument(
        "-f", "--parameter-file", type=Path, metavar="YAML", help="parameters as a YAML mapping"
    )
    run.add_argument(
        "-o",
        "--output",
        type=Path,
        help="where to write the executed notebook (default: _build/runs/NAME)",
    )
    run.set_defaults(action=lambda o: run_notebook(o.notebook, _given(o), o.output))


def _add_params(commands):
    params = commands.add_parser("params", help="list the parameters of a notebook")
    params.add_argument("notebook", type=Path)
    params.set_defaults(action=lambda o: _show(o.notebook))


def _add_importance(commands):
    importance = commands.add_parser(
        "importance",
        help="measure importance, also with several processes: accelerate launch -m safetyneuron.cli importance …",
    )
    importance.add_argument("model")
    importance.add_argument("prompts", help="name of a set, or a file")
    importance.add_argument("-n", "--count", type=int, default=200, help="prompts (default: 200)")
    importance.add_argument("--rule", default="exact")
    importance.add_argument("--dtype", default="auto")
    importance.add_argument(
        "-o", "--output", type=Path, required=True, help="profile to write (.safetensors)"
    )
    importance.set_defaults(action=_importance)


def _add_train(commands):
    train = commands.add_parser(
        "train",
        help="train an organism again, which takes up to half an hour, or an aligned pair of the paper",
        description=TRAIN,
    )
    train.add_argument(
        "name",
        help="organism/llama-chat, with a seed organism/llama-chat@3, or aligned/llama2-7b-dpo",
    )
    train.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FOLDER",
        help="of an organism's weights (default: organism, in the cache)",
    )
    train.set_defaults(action=_train)


def _add_export(commands):
    export = commands.add_parser("export", help="write an organism as a plain Hugging Face folder")
    export.add_argument("name", help="for example organism/llama-planted")
    export.add_argument("folder", type=Path, help="a new or empty one")
    export.set_defaults(action=_export)


def _add_league(commands):
    league = commands.add_parser(
        "league",
        help="hold a detector of your own, a Python file with find(model, tokenizer, harmful, benign), against planted neurons",
    )
    league.add_argument("file", type=Path, help="run in this process: code of your own")
    league.add_argument(
        "-m",
        "--model",
        action="append",
        metavar="NAME",
        help="an organism with planted neurons; repeat for more (default: the three kinds, seed 0)",
    )
    league.add_argument(
        "-n", "--count", type=int, default=100, help="requests of each kind (default: 100)"
    )
    league.set_defaults(action=_league)


def _add_truth(commands):
    truth = commands.add_parser(
        "truth",
        help="compute the answer key: what every unit does, and what every detector finds (up to an hour on two cores; a run that was killed goes on)",
    )
    truth.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("_build/truth"),
        metavar="FOLDER",
        help="where to write the tables (default: _build/truth); safetyneuron/truth replaces the shipped ones",
    )
    truth.add_argument("--cores", type=int, default=2, help="processes at once (default: 2)")
    truth.add_argument(
        "--check",
        action="store_true",
        help="only compute a part again and hold it against the shipped tables",
    )
    truth.set_defaults(action=_truth)


def _add_check(commands):
    check = commands.add_parser(
        "check", help="look up what an edition needs before a GPU hour is spent"
    )
    check.add_argument("edition", type=Path, help="a file of workflow/editions")
    check.set_defaults(action=_check)


def _importance(options):
    from safetyneuron.run.parallel import write_profile

    write_profile(
        options.model, options.prompts, options.count, options.output, options.rule, options.dtype
    )


def _train(options):
    if options.name.startswith("aligned/"):
        from safetyneuron.alignment.stages import train_aligned

        return print(f"{options.name} is in {train_aligned(options.name)}")
    from safetyneuron.metrics.shortfalls import note_measures
    from safetyneuron.organism import train_organism

    folder = (options.output or cache_folder() / "organism").absolute()
    train_organism(options.name, folder)
    for line in note_measures(options.name, folder):
        print(f"{options.name} misses a bar: {line}")
    print(f"{options.name} is in {folder}: set SAFETYNEURON_ORGANISMS={folder} to use it")


def _export(options):
    from safetyneuron.organism import export_organism

    export_organism(options.name, options.folder)
    print(f"{options.name} is in {options.folder}")


def _league(options):
    from safetyneuron.detectors.league import PLANTED, league_table, load_finder, play

    finder = load_finder(options.file)
    print(league_table({x: play(finder, x, options.count) for x in options.model or PLANTED}))


def _truth(options):
    from safetyneuron.run.truth import check_truth, make_truth

    if options.check:
        return print(f"largest differences: {check_truth()}")
    make_truth(options.output, options.cores)
    print(f"the answer key is in {options.output}")


def _check(options):
    from safetyneuron.run.preflight import check

    check(read_edition(options.edition))


def _given(options):
    """Parameters from the file, then from the command line; values are read as YAML."""
    given = read_mapping(options.parameter_file) if options.parameter_file else {}
    for text in options.parameter:
        name, equals, value = text.partition("=")
        if not equals:
            raise SafetyNeuronError(
                f"parameter {text!r} is not NAME=VALUE: write for example -p fraction=0.01"
            )
        try:
            given[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise SafetyNeuronError(
                f"parameter {text!r} cannot be read ({' '.join(str(error).split())}): write a YAML value, lists as [a, b]"
            ) from None
    return given


def _show(notebook):
    for name, parameter in notebook_parameters(notebook).items():
        print(f"{name} = {parameter['default']}    # {parameter['help']}")


if __name__ == "__main__":
    sys.exit(main())
