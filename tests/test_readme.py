"""README.md and docs: figures, the example, and the tests that the compatibility table names."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def tables():
    pytest.importorskip("bmtard.training.report")
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "tools/readme_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_agree_with_the_result_files(tables):
    readme = (ROOT / "README.md").read_text()
    assert tables.filled(readme) == readme


def test_tables_of_documents_agree_with_the_result_files(tables):
    for path in sorted((ROOT / "docs").glob("*.md")):
        assert tables.filled(path.read_text(), f"docs/{path.name}") == path.read_text()


def test_a_changed_figure_is_noticed(tables):
    readme = (ROOT / "README.md").read_text()
    for pattern in (r"\d+\.\d ± \d+\.\d", r"\| [\d.]+ us \|", r"\| [\d.]+ ms \|"):
        figure = re.search(pattern, readme)
        changed = readme.replace(figure[0], re.sub(r"\d", "9", figure[0]), 1)
        assert changed != readme
        assert tables.filled(changed) == readme


def test_example_runs():
    readme = (ROOT / "README.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    assert examples
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})


def test_no_gpu_is_claimed_without_a_result_of_one():
    readme = (ROOT / "README.md").read_text()
    results = [
        json.loads(path.read_text()) for path in (ROOT / "benchmarks/results").glob("*.json")
    ]
    on_gpu = [result for result in results if result.get("device") == "cuda"]
    assert ("has timed them yet" in readme) == (not on_gpu)


def test_results_of_reproduce_are_tables_of_any_document(tables, tmp_path, monkeypatch):
    result = json.loads((ROOT / "benchmarks/results/demo-digits.json").read_text())
    result |= {"main_attack": "fgsm", "accuracy": {"sat": [{"clean": 0.75, "fgsm": 0.25}]}}
    (tmp_path / "reproduce-mnist.json").write_text(json.dumps(result))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    markers = "<!-- begin reproduce-mnist -->\n<!-- end reproduce-mnist -->"
    text = tables.filled(f"before\n{markers}\nafter", "docs/evidence.md")
    assert "| sat | 75.0 | 25.0 | 50.0 |" in text
    assert "Weighted (FGSM)" in text
    assert "(../benchmarks/results/reproduce-mnist.json)" in text
    assert tables.filled(text, "docs/evidence.md") == text
    with pytest.raises(ValueError, match=r"docs/evidence.md must have a table between"):
        tables.filled("<!-- begin reproduce-mnist -->\n", "docs/evidence.md")


def functions_in(file):
    tree = ast.parse((ROOT / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_test_in_the_table_of_compatibility_exists():
    document = (ROOT / "docs/compatibility.md").read_text()
    rows = [line for line in document.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 15
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert named, row
        for file, name in named:
            assert name in functions_in(file), f"{file}::{name}"
    assert not re.findall(r"`test_\w+`", document)  # each with its file
