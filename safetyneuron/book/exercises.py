"""A guess written down before the run, and in words how far it was off: the exercises of the notebooks."""

from __future__ import annotations

import json
import re
from pathlib import Path

from safetyneuron.book.glue import glue_text
from safetyneuron.cache import new_file
from safetyneuron.errors import SafetyNeuronError

RECORD = "answers.json"  # beside the notebook
TOLERANCE = 0.02  # relative; half a unit of the last digit shown counts as right too


def read_numbers(text: str) -> list[str]:
    """Numbers of a text as they are written, without thousands' commas; what stands in brackets is an interval and left out."""
    plain = re.sub(r"\[[^\]]*\]|(?<=\d),(?=\d{3}(?!\d))", "", str(text)).replace("−", "-")
    plain = re.sub(r"(?<=\d),(?=\d)", ".", plain)  # a decimal comma
    return re.findall(r"(?<![\d.])-?\d+(?:\.\d+)?", plain)


def judge_guess(guess: str, answer: str) -> str:
    """In words, how a guess differs from an answer; `right` where it does not.

    book/_static/exercises.js says the same on the page; a test holds the two together.
    """
    said, true = read_numbers(guess), read_numbers(answer)
    if not true:
        known = [re.sub(r"\W+", " ", str(text).lower()).strip() for text in (guess, answer)]
        return "right" if known[0] == known[1] else "other words: show the value and compare"
    if len(said) != len(true):
        return f"the answer has {len(true)} number{'s' if len(true) > 1 else ''}, yours has {len(said)}"
    return next((text for text in map(_judge_number, said, true) if text != "right"), "right")


def _judge_number(said: str, true: str) -> str:
    """In words, how a number differs from the true one."""
    digits = len(true.partition(".")[2])
    guess, answer = float(said), float(true)
    near = max(TOLERANCE * abs(answer), 0.5 * 10**-digits) + 1e-12
    if abs(guess - answer) <= near:
        return "right"
    if abs(guess + answer) <= near:
        return "right size, wrong sign"
    if answer and min(abs(100 * guess - answer), abs(guess / 100 - answer)) <= near:
        return "a factor of 100 apart: a share for a percentage, perhaps"
    far = abs(guess - answer) > max(abs(answer), 5 * near)
    return f"{'much ' if far else ''}too {'high' if guess > answer else 'low'}"


def predict(exercise: str, guess: object) -> None:
    """Write down a guess beside the notebook before its solution runs; None writes nothing."""
    if guess is not None:
        _keep(exercise, {"guess": str(guess)})


def reveal(**answers: object) -> None:
    """Glue the answers of the run for the page; where a guess was written down, say how far it was off and keep that.

    answers: name of the exercise to what the run found.
    """
    glue_text(**answers)
    for exercise, answer in answers.items():
        kept = _read().get(exercise)
        if kept:
            said = judge_guess(kept["guess"], str(answer))
            _keep(exercise, kept | {"answer": str(answer), "said": said})
            print(f"You said {kept['guess']}; the run found {answer}: {said}.")


def _read() -> dict[str, dict[str, str]]:
    """The record of this folder: exercise to guess, answer, and what was said."""
    try:
        return json.loads(Path(RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError as error:
        raise SafetyNeuronError(f"{RECORD} is damaged: move it away, and guess again") from error


def _keep(exercise: str, row: dict[str, str]) -> None:
    """Put one row into the record, whole or not at all."""
    record = _read() | {exercise: row}
    with new_file(Path(RECORD)) as new:
        new.write_text(json.dumps(record, ensure_ascii=False, indent=1), encoding="utf-8")
