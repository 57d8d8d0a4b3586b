"""Rows of files: .txt, .csv, .jsonl, .json, .parquet."""

import csv
import io
import json

import pandas as pd

from safetyneuron.errors import SafetyNeuronError

COLUMNS = ("prompt", "goal", "Behavior", "request")


def read_text(path):
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SafetyNeuronError(f"file {path} cannot be read ({error}): save it as UTF-8") from None


def read_rows(path):
    """Rows of a .csv, .jsonl, .json or .parquet file."""
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    text = read_text(path)
    try:
        if path.suffix == ".json":
            return _list(path, json.loads(text))
        if path.suffix == ".csv":
            return list(csv.DictReader(io.StringIO(text), strict=True))
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
    except (json.JSONDecodeError, csv.Error) as error:
        raise SafetyNeuronError(
            f"file {path} cannot be read ({error}): repair that place"
        ) from None
    raise SafetyNeuronError(f"prompt file {path} must end in .txt, .csv, .jsonl, .json or .parquet")


def _list(path, rows):
    if not isinstance(rows, list):
        raise SafetyNeuronError(
            f"file {path} holds no list of rows: write a JSON list with one object a row"
        )
    return rows


def _parquet_rows(path):
    try:
        return pd.read_parquet(path).to_dict("records")
    except (OSError, ValueError) as error:
        raise SafetyNeuronError(
            f"file {path} cannot be read ({str(error).splitlines()[0]}): write it again"
        ) from None


def prompt_column(path, row):
    """The prompt of one row of a file."""
    for column in COLUMNS:
        if isinstance(row, dict) and isinstance(row.get(column), str):
            return row[column]
    raise SafetyNeuronError(
        f"prompt file {path} has no column named one of {', '.join(COLUMNS)}: rename the column that holds the prompts"
    )
