"""The pages of docs/: snippets run, options and defaults are the code's, threads name tests that exist."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import igulora

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def snippets(page: Path) -> list[tuple[int, str]]:
    """(first line, code) of every Python snippet of a page."""
    text = page.read_text(encoding="utf-8")
    return [(text[: m.start(1)].count("\n"), m.group(1)) for m in SNIPPET.finditer(text)]


def run(page: Path, namespace: dict[str, object]) -> None:
    """Execute a page's snippets one after the other in one namespace; line numbers in a traceback are those of the page."""
    for line, code in snippets(page):
        exec(compile("\n" * line + code, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", [p for p in PAGES if snippets(p)], ids=lambda p: p.stem)
def test_snippets_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(page, {"__name__": "__main__"})


class Model(nn.Module):
    """Stands for the reader's model in the README's snippets: called with keywords, returns something with a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> object:
        return type("Output", (), {"loss": (self.layer(x) - x).square().mean()})


def test_readme_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loader = [{"x": torch.randn(4, 6)} for _ in range(3)]
    run(ROOT / "README.md", {"torch": torch, "igulora": igulora, "model": Model(), "loader": loader})
    assert (tmp_path / "adapter-peft" / "adapter_config.json").is_file()


def test_a_broken_snippet_fails(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("text\n```python\nvalue = 1\n```\nmore\n```python\nvalue.missing\n```\n")
    with pytest.raises(AttributeError) as caught:
        run(page, {})
    assert caught.traceback[-1].lineno == 6


def options() -> dict[str, str]:
    """Option -> default as docs/options.md gives them."""
    rows = re.findall(
        r"^\| `(\w+)` \| `(.*?)` \|", (ROOT / "docs" / "options.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    return dict(rows)


def test_every_option_is_described_with_its_default() -> None:
    written = options()
    assert written.keys() == {f.name for f in dataclasses.fields(igulora.IGUConfig)}
    made = igulora.IGUConfig(total_steps=1000)
    filled = {"total_steps", "t_init", "t_final", "delta_t"}  # computed from the run's length
    for name, default in written.items():
        assert ast.literal_eval(default) == (None if name in filled else getattr(made, name)), name


def test_the_rules_for_the_schedule_are_as_written() -> None:
    made = igulora.IGUConfig(total_steps=1000)
    assert (made.t_init, made.t_final) == (100, 300)
    assert (made.prunes_until - made.t_init) // made.delta_t == 50
    assert igulora.IGUConfig(total_steps=200).t_init == 3 * made.window
    papers = igulora.IGUConfig(total_steps=1000, estimator="trapezoid")
    assert (papers.nodes, papers.ig_every, papers.ig_fraction) == (20, 1, 1.0)


def defined_tests() -> dict[str, set[str]]:
    """Test functions of every test file, by its path from the root."""
    found = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found[path.relative_to(ROOT).as_posix()] = {
            node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        }
    return found


def test_threads_name_tests_that_exist() -> None:
    text = (ROOT / "docs" / "threads.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", text)
    rows = [line for line in text.splitlines() if line.startswith("| [")]
    assert len(rows) >= 20
    assert all(re.search(r"`tests/[\w/]+\.py::test_\w+`", row) for row in rows), "every thread names a test"
    existing = defined_tests()
    for path, name in named:
        assert name in existing.get(path, set()), f"{path}::{name}"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda p: p.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target
