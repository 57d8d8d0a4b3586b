"""The public data sets, read from small files of the same shape that the tests write."""

import json
from dataclasses import replace

import pandas as pd
import pytest
from conftest import small_llama

from safetyneuron import NeuronSet, SafetyNeuronError, load_documents, load_prompts
from safetyneuron.data import sources
from safetyneuron.data.preferences import load_preferences
from safetyneuron.data.requests import load_requests
from safetyneuron.kept import defences
from safetyneuron.metrics import Suite, evaluate

TURN = "\n\nHuman: {}\n\nAssistant: {}"
ROWS = {
    "advbench.csv": [{"goal": f"goal {i}", "target": f"Sure, here is {i}"} for i in range(12)],
    "harmbench.csv": [
        {"Behavior": f"behaviour {i}", "FunctionalCategory": "standard", "Tags": ""}
        for i in range(12)
    ],
    "multijail.csv": [
        {
            "id": i,
            "en": f"english {i}",
            "it": f"italiano {i}",
            "zh": f"中文 {i}",
            "th": f"ไทย {i}",
            "vi": f"tiếng {i}",
        }
        for i in range(12)
    ],
    "circuit-breakers.json": [
        {"category": "a", "prompt": f"ask {i}", "llama3_output": f"no {i}", "output": f"yes {i}"}
        for i in range(12)
    ],
    "gsm8k.jsonl": [{"question": f"{i} and {i}?", "answer": f"#### {2 * i}"} for i in range(12)],
    "wikipedia-en.parquet": [
        {"id": str(i), "title": "t", "text": f"article {i} " + "x" * 2000} for i in range(12)
    ],
    "wikipedia-zh.jsonl": [{"text": f"条目 {i}"} for i in range(12)],
    "beavertails.jsonl": [
        {"prompt": f"p {i}", "response": f"r {i}", "category": {"a": True}, "is_safe": i % 2 == 0}
        for i in range(24)
    ],
    "hh-harmless.jsonl": [
        {
            "chosen": TURN.format(f"q {i}", f"good {i}"),
            "rejected": TURN.format(f"q {i}", f"bad {i}"),
        }
        for i in range(12)
    ],
    "hh-helpful.jsonl": [
        {
            "chosen": TURN.format(f"h {i}", f"a {i}")
            + (TURN.format("more", "more") if i == 0 else ""),
            "rejected": TURN.format(f"h {i}", f"b {i}"),
        }
        for i in range(12)
    ],
}


def write(path, rows):
    """Rows in the format that the ending names."""
    if path.suffix == ".csv":
        pd.DataFrame(rows).to_csv(path, index=False)
    elif path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    else:
        path.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )


@pytest.fixture
def data(tmp_path, monkeypatch):
    for name, rows in ROWS.items():
        write(tmp_path / name, rows)
    monkeypatch.setenv("SAFETYNEURON_DATA", str(tmp_path))
    return tmp_path


def test_every_set_is_read_with_its_columns_in_disjoint_halves(data):
    for name in sources.PROMPTS:
        train, test = load_prompts(name, split="train"), load_prompts(name, split="test")
        assert train and test and not set(train) & set(test), name
    for name in sources.DOCUMENTS:
        documents = load_documents(name) + load_documents(name, split="test")
        assert len(documents) >= 11 and all(
            set(document) == {"prompt", "completion"} for document in documents
        )
    for name in sources.PREFERENCES:
        assert all(set(pair) == {"prompt", "chosen", "rejected"} for pair in load_preferences(name))
    assert {source for source, _ in [*sources.PROMPTS.values(), *sources.DOCUMENTS.values()]} | {
        "hh-harmless"
    } == set(sources.SOURCES)


def test_what_the_columns_mean(data):
    asked = load_requests("paper/advbench")
    assert [request.prompt for request in asked] == load_prompts("paper/advbench") and all(
        request.target == request.prompt.replace("goal", "Sure, here is") for request in asked
    )
    assert sorted(
        load_prompts("paper/advbench") + load_prompts("paper/advbench", "train")
    ) == sorted(row["goal"] for row in ROWS["advbench.csv"])
    assert load_requests("paper/harmbench")[0].target == "Sure, here is"

    def number(prompts):
        return [prompt.split()[1] for prompt in prompts]

    assert number(load_prompts("paper/multijail", language="zh")) == number(
        load_prompts("paper/multijail")
    )  # the same rows in every language
    assert load_prompts("paper/multijail", language="zh")[0].startswith("中文") and load_prompts(
        "paper/wikipedia", "train", "zh"
    )[0].startswith("条目")
    assert len(load_prompts("paper/wikipedia")[0]) <= sources.TEXT
    first = load_documents("paper/refusals")[0]
    assert first["prompt"].replace("ask", "no") == first["completion"] and load_documents(
        "paper/compliances"
    )[0]["completion"] == first["completion"].replace("no", "yes")
    pair = load_preferences("paper/harmless")[0]
    assert pair == {
        "prompt": pair["prompt"],
        "chosen": pair["prompt"].replace("q", "good"),
        "rejected": pair["prompt"].replace("q", "bad"),
    }
    helpful = load_documents("paper/helpful") + load_documents("paper/helpful", split="test")
    assert sorted(document["prompt"] for document in helpful) == sorted(
        f"h {i}" for i in range(1, 12)
    )  # a conversation of two turns is left out


def test_what_models_are_tuned_on_was_judged_safe(data):
    documents = load_documents("paper/answers") + load_documents("paper/answers", split="test")
    assert {int(document["completion"].split()[1]) for document in documents} == set(
        range(0, 24, 2)
    )
    prompts = load_prompts("paper/beavertails") + load_prompts("paper/beavertails", "train")
    assert len(prompts) == 24  # questions may be asked, whatever was answered
    pd.DataFrame(ROWS["beavertails.jsonl"]).to_csv(data / "beavertails.csv", index=False)
    (data / "beavertails.jsonl").unlink()
    assert load_documents("paper/answers") == documents[: len(load_documents("paper/answers"))]
    write(data / "beavertails.csv", [{"prompt": "p", "response": "r"}])
    with pytest.raises(SafetyNeuronError, match="row 1: 'is_safe' is neither true nor false"):
        load_documents("paper/answers")


def test_no_row_of_a_public_set_is_kept(tmp_path, monkeypatch, tokenizer):
    """A set on the hub, for which a folder stands, is read, asked and tuned on; then every file of the cache is looked through."""
    monkeypatch.delenv("SAFETYNEURON_DATA", raising=False)
    monkeypatch.setenv("SAFETYNEURON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "library")
    (tmp_path / "hub").mkdir()
    rows = [
        {"prompt": f"zanzibar {i}", "response": f"quixotic {i}", "is_safe": True} for i in range(20)
    ]
    write(tmp_path / "hub" / "train.jsonl", rows)
    for name in ("beavertails", "beavertails, safe"):
        source = sources.SOURCES[name]
        here = replace(source, repository=str(tmp_path / "hub"), revision=None, split="train")
        monkeypatch.setitem(sources.SOURCES, name, here)
    documents, model = load_documents("paper/answers"), small_llama(max_position_embeddings=128)
    assert {document["completion"].split()[0] for document in documents} == {"quixotic"}
    evaluate(model, tokenizer, Suite(("paper/beavertails",), prompts=3))
    neurons = NeuronSet({p: ~mask for p, mask in NeuronSet.empty(model).masks.items()})
    defences.sn_tune(model, tokenizer, documents[:2], neurons, learning_rate=1e-3)
    kept = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert {path.parent.parent.name for path in kept} >= {"cache", "tuning"}
    assert not any(
        word in path.read_bytes() for path in kept for word in (b"zanzibar", b"quixotic")
    )


def test_a_prompt_is_in_the_same_half_wherever_it_stands(tmp_path, monkeypatch):
    rows = [
        {
            "chosen": TURN.format(f"h {i}", f"a {i}"),
            "rejected": TURN.format(f"h {i}", "" if i % 3 == 0 else f"b {i}"),
        }
        for i in range(40)
    ]
    write(tmp_path / "hh-helpful.jsonl", rows + rows[::-1])
    monkeypatch.setenv("SAFETYNEURON_DATA", str(tmp_path))
    trained = {pair["prompt"] for pair in load_preferences("paper/helpful")} | {
        document["prompt"] for document in load_documents("paper/helpful")
    }
    assert trained and not trained & set(load_prompts("paper/benign"))


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("advbench.csv", b"a,b\n1,2\n", "row 1: no text under 'goal' or 'prompt'"),
        ("advbench.csv", "goal\nperché\n".encode("latin-1"), "save it as UTF-8"),
        ("advbench.csv", b"goal\n", "holds no usable row"),
        ("advbench.json", b'{"goal": "a"}', "holds no list of rows"),
        ("advbench.parquet", b"PAR1", "cannot be read"),
        ("advbench.jsonl", b"{", "cannot be read"),
        ("advbench.jsonl", b"[1]\n", "row 1: no text"),
        ("advbench.jsonl", b'{"goal": 3}\n', "row 1: no text"),
    ],
)
def test_a_wrong_local_file_is_refused_in_one_line(tmp_path, monkeypatch, name, content, words):
    (tmp_path / name).write_bytes(content)
    monkeypatch.setenv("SAFETYNEURON_DATA", str(tmp_path))
    with pytest.raises(SafetyNeuronError, match=words) as caught:
        load_prompts("paper/advbench")
    assert "\n" not in str(caught.value)


def test_what_cannot_be_reached_names_the_page_and_the_file(monkeypatch, tmp_path):
    monkeypatch.setenv("SAFETYNEURON_CACHE", str(tmp_path))
    monkeypatch.delenv("SAFETYNEURON_DATA", raising=False)
    with pytest.raises(SafetyNeuronError, match="circuit-breakers.json"):
        load_prompts("paper/harmful")
    with pytest.raises(
        SafetyNeuronError,
        match=r"walledai/AdvBench cannot be read .*https://huggingface.co/datasets/walledai/AdvBench.*advbench.jsonl",
    ):
        load_prompts("paper/advbench")
    assert not list(tmp_path.rglob("*.json"))  # nothing half-written is taken for the set next time


@pytest.mark.parametrize(
    "name, language, words",
    [
        ("paper/advbench", "zh", "has no language 'zh'"),
        ("paper/nothing", "en", "no prompt set or file"),
    ],
)
def test_unknown_names_and_languages_are_refused(data, name, language, words):
    with pytest.raises(SafetyNeuronError, match=words):
        load_prompts(name, language=language)


def test_pinned_revisions_are_commits():
    for source in sources.SOURCES.values():
        assert source.revision is None or len(source.revision) == 40 and int(source.revision, 16)


def test_a_prefix_of_a_public_set_is_a_sample_and_the_same_in_every_language(monkeypatch, tmp_path):
    monkeypatch.setenv("SAFETYNEURON_DATA", str(tmp_path))
    rows = [{x: f"{x} {i}" for x in ("en", "it", "zh", "th", "vi")} for i in range(60)]
    pd.DataFrame(rows).to_csv(tmp_path / "multijail.csv", index=False)
    numbers = {
        x: [int(text.split()[1]) for text in load_prompts("paper/multijail", language=x)]
        for x in ("en", "zh")
    }
    assert numbers["en"] == numbers["zh"] != sorted(numbers["en"])
