"""What the project promises not to do, looked up in its sources."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = [*(ROOT / "safetyneuron").rglob("*.py"), *(ROOT / "workflow").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]


def calls(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


def test_nothing_is_unpickled_evaluated_or_run_remotely():
    forbidden = {"eval", "exec", "pickle.load", "pickle.loads", "torch.load", "yaml.load", "yaml.unsafe_load", "joblib.load"}
    for path in SOURCES:
        for name, keywords in calls(path):
            assert name not in forbidden, f"{path}: {name}"
            assert "trust_remote_code" not in keywords, path


def test_only_the_trainers_of_organisms_save_models():
    saving = {path.name for path in SOURCES if path.parent.name != "tests" for name, _ in calls(path) if name.endswith("save_pretrained") and not name.startswith("tokenizer.")}
    assert saving == {"train.py", "alignment.py"}
