"""The documents keep their word: figures, examples, commands, and the tests that they name."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import bmtard

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
# Its examples are pairs of before and after, with a test of their own.
WITH_OWN_TEST = {"migrating.md": "test_migrating.py"}
TABLES = {
    "numbers": "README.md",
    "demo": "docs/quickstart.md",
    "wheel": "docs/install.md",
    "step-options": "docs/scaling.md",
    "weighted": "docs/evidence.md",
    **dict.fromkeys(("head", "ops", "step"), "docs/benchmarks.md"),
}


def tool(name):
    pytest.importorskip("bmtard.training.report")
    spec = importlib.util.spec_from_file_location(name, ROOT / f"tools/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tables():
    return tool("readme_tables")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_tables_agree_with_the_result_files(tables, path):
    text = path.read_text()
    assert tables.filled(text, str(path.relative_to(ROOT))) == text


def test_every_table_is_in_its_document(tables):
    assert set(TABLES) == set(tables.TABLES)
    for name, document in TABLES.items():
        assert f"<!-- begin {name} -->" in (ROOT / document).read_text()


@pytest.mark.parametrize(
    ("document", "figure"),
    [
        ("README.md", r"\*\*\d+\.\d times as fast"),
        ("README.md", r"\*\*\d+\.\d against \d+\.\d %"),
        ("docs/quickstart.md", r"\d+\.\d ± \d+\.\d"),
        ("docs/benchmarks.md", r"\| [\d.]+ us \|"),
        ("docs/benchmarks.md", r"\| [\d.]+ ms \|"),
        ("docs/install.md", r"\| \d\.\d+\.\d+ \| 2\.\d+\.\d+\S* \| \d+ \|"),
    ],
)
def test_a_changed_figure_is_noticed(tables, document, figure):
    text = (ROOT / document).read_text()
    found = re.search(figure, text)
    changed = text.replace(found[0], re.sub(r"\d", "9", found[0]), 1)
    assert changed != text
    assert tables.filled(changed, document) == text


def examples(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(
    "path", [path for path in DOCUMENTS if examples(path)], ids=lambda path: path.name
)
def test_examples_run(path, tmp_path, monkeypatch):
    """The examples of a document run one after the other, in one namespace."""
    if path.name in WITH_OWN_TEST:
        assert path.name in (ROOT / "tests" / WITH_OWN_TEST[path.name]).read_text()
        return
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {}
    if path.name == "README.md":  # what the three lines on the first screen find in a loop
        networks = {
            name: nn.Linear(4, 3) for name in ("student", "robust_teacher", "clean_teacher")
        }
        images = {"x": torch.rand(8, 4), "x_adv": torch.rand(8, 4)}
        names = {"torch": torch, "bmtard": bmtard, **networks, **images}
    for example in examples(path):
        exec(compile(example, path.name, "exec", dont_inherit=True), names)


def shell_lines(path: Path) -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def test_commands_exist():
    from bmtard.cli import COMMANDS

    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    seen = set()
    for path in DOCUMENTS:
        spans = re.findall(r"`([^`\n]+)`", path.read_text())
        for line in shell_lines(path) + spans:
            match = re.match(r"(make|bmtard) ([a-z-]+)", line.strip())
            if match:
                known = targets if match[1] == "make" else COMMANDS
                assert match[2] in known, f"{path.name}: {line}"
                seen.add(match[0])
    assert {"make demo", "make docs", "bmtard train", "bmtard evaluate"} <= seen


@pytest.mark.parametrize("name", ["quickstart.md", "trainer.md"])
def test_trainer_commands_parse(name, tmp_path, monkeypatch):
    """Every `bmtard train` and `evaluate` of these pages takes its options."""
    pytest.importorskip("tyro")
    import shlex

    import tyro

    from bmtard.training.config import EvaluateConfig
    from bmtard.training.settings import train_config

    count = 0
    for line in shell_lines(ROOT / "docs" / name):
        words = shlex.split(line, comments=True)
        if words[:2] == ["bmtard", "train"] and "--help" not in words:
            assert train_config(words[2:]).method
            count += 1
        elif words[:2] == ["bmtard", "evaluate"]:
            tyro.cli(EvaluateConfig, args=words[3:])
            count += 1
    assert count >= 4


def test_the_figure_of_equal_entropy_ends_in_balance():
    """The states drawn are those of the rule: from both temperatures 1 to equal entropies."""
    module = tool("equal_entropy")
    states = module.drawn(module.PAGE.read_text())
    assert states[0]["temperatures"] == [1.0, 1.0]
    before, after = (abs(h[0] - h[1]) for h in (states[0]["entropies"], states[-1]["entropies"]))
    assert before > 0.5
    assert after < 0.1
    for one, two in itertools.pairwise(states):
        moved = [abs(a - b) for a, b in zip(one["temperatures"], two["temperatures"], strict=True)]
        assert all(step < 1.01 * module.TEMPERATURE_LR for step in moved)
    assert not module.differs(states, states)
    assert module.differs(states, states[1:])


def test_no_gpu_is_claimed_without_a_result_of_one():
    text = (ROOT / "docs/benchmarks.md").read_text()
    results = [
        json.loads(path.read_text()) for path in (ROOT / "benchmarks/results").glob("*.json")
    ]
    on_gpu = [result for result in results if result.get("device") == "cuda"]
    assert ("has timed them yet" in text) == (not on_gpu)


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
    with pytest.raises(ValueError, match=r"README.md has a table 'colours', which nothing writes"):
        tables.filled("<!-- begin colours -->\n<!-- end colours -->\n")


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
