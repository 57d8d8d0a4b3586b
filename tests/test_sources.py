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
from safetyneuron.data.sources import load_text
from safetyneuron.kept import defences
from safetyneuron.metrics import Suite, evaluate

TURN = "\n\nHuman: {}\n\nAssistant: {}"


def harmless(numbers):
    """Pairs of the harmless set, every third in a conversation of two turns."""
    begin = "\n\nHuman: begin\n\nAssistant: begun"
    return [
        {
            side: begin * (i % 3 == 0) + TURN.format(f"q {i}", f"{word} {i}")
            for side, word in (("chosen", "good"), ("rejected", "bad"))
        }
        for i in numbers
    ]


def helpful(numbers):
    """Pairs of the helpful set; what follows the first answer of the first is another turn."""
    more = TURN.format("more", "more")
    return [
        {
            "chosen": TURN.format(f"h {i}", f"a {i}") + more * (i == 0),
            "rejected": TURN.format(f"h {i}", f"b {i}") + more * (i == 0),
        }
        for i in numbers
    ]


def answered(numbers):
    """Answers of BeaverTails, every second judged safe."""
    return [
        {"prompt": f"p {i}", "response": f"r {i}", "category": {"a": True}, "is_safe": i % 2 == 0}
        for i in numbers
    ]


ROWS = {
    "advbench.csv": [{"goal": f"goal {i}", "target": f"Sure, here is {i}"} for i in range(12)],
    "harmbench.csv": [
        {"Behavior": f"behaviour {i}", "FunctionalCategory": "standard", "Tags": ""}
        for i in range(12)
    ],
    "autodan.json": [{"prompt": f"start {i}"} for i in range(5)],
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
    "hh-harmless-train.jsonl": harmless(range(12)),
    "hh-harmless-test.jsonl": harmless(range(11, 24)),  # one of them is also trained on
    "hh-helpful-train.jsonl": helpful(range(12)),
    "hh-helpful-test.jsonl": helpful(range(12, 24)),
    "beavertails-train.jsonl": answered(range(24)),
    "beavertails-test.jsonl": answered(range(24, 36)),
    "redteam.jsonl": [
        {"transcript": TURN.format(f"attack {i}", "no") + TURN.format("again", "no")}
        for i in range(12)
    ],
    "jailbreak-llms.csv": [{"question": f"forbidden {i}"} for i in range(12)],
    "sharegpt.json": [
        {
            "id": str(i),
            "conversations": [
                {"from": "human" if i else "system", "value": f"say {i}"},
                {"from": "gpt", "value": f"said {i}"},
                {"from": "human", "value": "go on"},
            ],
        }
        for i in range(12)
    ],
    "wikitext.jsonl": [{"text": text} for text in ("", " = Farm = ", "a farm has doors .", "")],
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


def test_every_set_is_read_with_its_columns_in_disjoint_parts(data):
    for name, (source, _) in sources.PROMPTS.items():
        splits = sources.splits_of(sources.SOURCES[source])
        both = [load_prompts(name, split=s) for s in {*splits, "test"}]
        assert all(both) and len(set().union(*both)) == sum(map(len, both)), name
    for name in sources.DOCUMENTS:
        assert all(set(d) == {"prompt", "completion"} for d in load_documents(name)), name
    for name in sources.PREFERENCES:
        assert all(set(pair) == {"prompt", "chosen", "rejected"} for pair in load_preferences(name))
    groups = sources.PROMPTS, sources.DOCUMENTS, sources.PREFERENCES, sources.TEXTS
    read = {source for group in groups for source, _ in group.values()}
    assert read == set(sources.SOURCES)


def test_sets_with_parts_of_their_own_are_taken_whole(data):
    """Trained on: every pair, conversations too; asked: what is in the test part alone."""
    pairs = load_preferences("paper/harmless")
    assert len(pairs) == 12 and sum(isinstance(pair["prompt"], list) for pair in pairs) == 4
    turns = pairs[0]["prompt"]
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user"]
    assert turns[-1]["content"] == "q 0" and pairs[0]["chosen"] == "good 0"
    asked = load_prompts("paper/hh-harmless")
    assert {int(q.split()[1]) for q in asked} == {i for i in range(12, 24) if i % 3}
    assert len(load_documents("paper/arithmetic")) == 12
    assert len(load_documents("paper/sharegpt")) == 11  # one begins with a system's turn
    assert load_documents("paper/sharegpt")[0]["completion"].startswith("said")
    assert sorted(load_prompts("paper/redteam") + load_prompts("paper/redteam", "train")) == sorted(
        f"attack {i}" for i in range(12)
    )
    assert len(load_prompts("paper/jailbreak-llms")) == 12
    with pytest.raises(SafetyNeuronError, match="has no train part: it has test"):
        load_prompts("paper/jailbreak-llms", "train")
    with pytest.raises(SafetyNeuronError, match="has no test part: it has train"):
        load_documents("paper/sharegpt", "test")
    assert load_text("paper/wikitext") == "\n\n = Farm = \n\na farm has doors .\n\n"


def test_a_set_asked_whole_holds_both_halves_but_nothing_of_the_detection_corpus(data):
    for name in ("advbench", "harmbench", "multijail"):
        for language in sources.SOURCES[name].languages:
            whole = load_prompts(f"paper/{name}-whole", language=language)
            halves = [load_prompts(f"paper/{name}", split, language) for split in ("train", "test")]
            assert len(whole) == 12 and sorted(whole) == sorted(sum(halves, []))
    targets = [request.target for request in load_requests("paper/advbench-whole")]
    assert sorted(targets) == sorted(row["target"] for row in ROWS["advbench.csv"])
    with pytest.raises(SafetyNeuronError, match="has no train part"):
        load_prompts("paper/advbench-whole", "train")
    assert len(load_documents("paper/compliances-whole")) == 12
    with pytest.raises(SafetyNeuronError, match="has no test part"):
        load_documents("paper/compliances-whole", "test")
    (seen,) = {row["en"] for row in ROWS["multijail.csv"][:1]}
    write(data / "circuit-breakers.json", [ROWS["circuit-breakers.json"][0] | {"prompt": seen}])
    asked = load_prompts("paper/multijail-whole", language="zh")
    assert len(asked) == 11 and ROWS["multijail.csv"][0]["zh"] not in asked


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
    pair = load_preferences("paper/harmless")[1]
    assert pair == {
        "prompt": pair["prompt"],
        "chosen": pair["prompt"].replace("q", "good"),
        "rejected": pair["prompt"].replace("q", "bad"),
    }
    single = load_documents("paper/helpful") + load_documents("paper/helpful", split="test")
    assert sorted(document["prompt"] for document in single) == sorted(
        f"h {i}" for i in range(1, 24)
    )  # a conversation of two turns is left out


def test_what_models_are_tuned_on_was_judged_safe(data):
    documents = load_documents("paper/answers") + load_documents("paper/answers", split="test")
    assert {int(document["completion"].split()[1]) for document in documents} == set(
        range(0, 36, 2)
    )
    prompts = load_prompts("paper/beavertails") + load_prompts("paper/beavertails", "train")
    assert len(prompts) == 36  # questions may be asked, whatever was answered
    rows = pd.DataFrame(ROWS["beavertails-train.jsonl"])
    rows.to_csv(data / "beavertails-train.csv", index=False)
    (data / "beavertails-train.jsonl").unlink()
    assert load_documents("paper/answers") == documents[: len(load_documents("paper/answers"))]
    write(data / "beavertails-train.csv", [{"prompt": "p", "response": "r"}])
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
        here = replace(source, repository=str(tmp_path / "hub"), revision=None, splits=())
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


def test_nothing_that_was_trained_on_is_asked_wherever_it_stands(tmp_path, monkeypatch):
    rows = helpful(range(40))
    for i, row in enumerate(rows[1:40:3]):
        row["rejected"] = TURN.format(f"h {1 + 3 * i}", "")  # half a pair is still a prompt
    write(tmp_path / "hh-helpful-train.jsonl", rows + rows[::-1])
    write(tmp_path / "hh-helpful-test.jsonl", rows[:20] + helpful(range(40, 60)))
    monkeypatch.setenv("SAFETYNEURON_DATA", str(tmp_path))
    asked = load_prompts("paper/benign")
    assert {int(prompt.split()[1]) for prompt in asked} == set(range(40, 60))


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
