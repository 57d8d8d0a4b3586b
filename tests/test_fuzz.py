"""Readers of files that come from elsewhere, fed with nonsense: they return something or say one line, and nothing else happens."""

import json
import struct

import pytest
import yaml
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safetyneuron import NeuronDelta, NeuronSet, SafetyNeuronError, load_documents, load_prompts
from safetyneuron.importance.profile import ImportanceProfile
from safetyneuron.run.editions import read_mapping
from safetyneuron.run.execute import check_parameters, notebook_parameters

QUICK = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=12),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
NAMES = st.sampled_from(
    [
        "q",
        "k",
        "v",
        "o",
        "gate",
        "up",
        "down",
        "q.0.change",
        "q.0.channels",
        "minimum.q",
        "../q",
        "",
        "__metadata__",
    ]
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "F32", "I32", "BOOL", "X"]),
        "shape": st.lists(st.integers(-1, 5) | st.just(10**12), max_size=3),
        "data_offsets": st.lists(st.integers(0, 40), min_size=2, max_size=2),
    }
)
WORDS = st.sampled_from(["shapes", "model", "facts", "sizes", "count", "rule", "tokenizer"])
FACTS = st.dictionaries(WORDS, VALUES, max_size=7) | VALUES
METADATA = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["neuron file", "neuron delta", "importance profile", "x"]),
        "version": st.sampled_from(["1", "1", "2"]),
        "facts": st.builds(json.dumps, FACTS) | st.text(max_size=10),
    }
)


@st.composite
def almost_safetensors(draw):
    """A header of the right form with wrong contents, and some bytes after it."""
    header = draw(st.dictionaries(NAMES, ENTRY, max_size=5)) | {"__metadata__": draw(METADATA)}
    text = json.dumps(header).encode()
    length = draw(st.sampled_from([len(text), len(text) + 1, 0, 2**63]))
    return struct.pack("<Q", length) + text + draw(st.binary(max_size=40))


def quiet(read, *arguments):
    """The result, or the one line that says why there is none."""
    try:
        return read(*arguments)
    except SafetyNeuronError as error:
        assert len(str(error)) > 20
        return None


@pytest.mark.parametrize(
    "kind", [NeuronSet, NeuronDelta, ImportanceProfile], ids=lambda kind: kind.__name__
)
@QUICK
@given(content=almost_safetensors() | st.binary(max_size=60))
def test_tensor_files(tmp_path, kind, content):
    (tmp_path / "f.safetensors").write_bytes(content)
    quiet(kind.load, tmp_path / "f.safetensors")


@pytest.mark.parametrize("ending", [".txt", ".csv", ".jsonl", ".json", ".parquet"])
@QUICK
@given(
    content=st.binary(max_size=80)
    | st.text(max_size=80).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.lists(VALUES, max_size=3).map(lambda rows: "\n".join(map(json.dumps, rows)).encode())
)
def test_prompt_and_document_files(tmp_path, ending, content):
    path = tmp_path / f"f{ending}"
    path.write_bytes(content)
    prompts = quiet(load_prompts, str(path))
    assert (
        prompts is None
        or prompts
        and all(isinstance(prompt, str) and prompt.strip() for prompt in prompts)
    )
    documents = quiet(load_documents, str(path))
    assert documents is None or all(
        set(document) == {"prompt", "completion"} for document in documents
    )


@QUICK
@given(
    content=st.binary(max_size=60)
    | VALUES.map(lambda value: yaml.safe_dump(value).encode())
    | st.dictionaries(
        st.sampled_from(sorted(notebook_parameters(ROOT / "notebooks" / "02_verification.ipynb"))),
        VALUES,
        max_size=3,
    ).map(lambda value: yaml.safe_dump(value).encode())
)
def test_parameter_files(tmp_path, content):
    path = tmp_path / "f.yaml"
    path.write_bytes(content)
    given_ = quiet(read_mapping, path)
    if given_ is not None:
        quiet(check_parameters, ROOT / "notebooks" / "02_verification.ipynb", given_)
