"""What an installation of igulora holds: the mapping of kernels/, the borders of the packages, a light import."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import igulora
import igulora.kernels

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("transformers", "peft", "matplotlib", "rich", "accelerate", "datasets", "pyarrow", "gguf", "triton", "pandas")


def _in_a_fresh_interpreter(code: str, cwd: Path) -> object:
    """The JSON value that `code` prints, run elsewhere: neither pytest nor the repository root helps it."""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_kernels_are_a_part_of_igulora_and_never_top_level(tmp_path: Path) -> None:
    code = (
        "import importlib.util, json, igulora.kernels as k;"
        "spec = importlib.util.find_spec('kernels');"
        "print(json.dumps([k.__name__, k.__file__, spec and spec.origin]))"
    )
    name, file, top_level = _in_a_fresh_interpreter(code, tmp_path)
    assert name == "igulora.kernels"
    assert Path(file).name == "__init__.py"
    assert top_level is None or not Path(top_level).is_relative_to(ROOT)


def test_pytest_keeps_the_repository_root_off_the_path() -> None:
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or not Path(spec.origin).is_relative_to(ROOT)
    assert str(ROOT) not in sys.path


def test_the_version_is_the_installed_one() -> None:
    assert igulora.__version__ == importlib.metadata.version("igulora")


def test_importing_igulora_is_light(tmp_path: Path) -> None:
    code = "import json, sys, igulora; print(json.dumps(sorted({n.split('.')[0] for n in sys.modules})))"
    loaded = _in_a_fresh_interpreter(code, tmp_path)
    assert not set(loaded) & (set(HEAVY) - _what_torch_brings(tmp_path))


def _what_torch_brings(cwd: Path) -> set[str]:
    code = "import json, sys, torch; print(json.dumps(sorted({n.split('.')[0] for n in sys.modules})))"
    return set(_in_a_fresh_interpreter(code, cwd))


def _imports(folder: Path) -> dict[str, set[str]]:
    found = {}
    for file in sorted(folder.rglob("*.py")):
        names = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module or "")
        found[str(file.relative_to(ROOT))] = names
    return found


def _importers(folder: str, package: str) -> list[str]:
    imported = _imports(ROOT / folder)
    assert imported, f"no Python file under {folder}/"
    return [file for file, names in imported.items() if any(f"{n}.".startswith(f"{package}.") for n in names)]


def test_igulora_leaves_triton_to_the_kernels() -> None:
    assert _importers("igulora", "triton") == []


@pytest.mark.parametrize("package", ["transformers", "peft", "torch.nn.modules"])
def test_kernels_know_nothing_of_modules_and_models(package: str) -> None:
    assert _importers("kernels", package) == []


@pytest.mark.parametrize("folder", ["igulora", "kernels", "tests", "benchmarks"])
def test_nothing_imports_kernels_by_its_folder_name(folder: str) -> None:
    assert _importers(folder, "kernels") == []


def test_every_subpackage_goes_into_the_wheel(tmp_path: Path) -> None:
    """Built from a copy, so that setuptools leaves no build folder behind in the tree."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for folder in ("igulora", "kernels", "benchmarks"):
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                target = source / file.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        tmp_path,
        source,
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("igulora-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    configs = {
        f"igulora/{f.relative_to(ROOT)}" for f in (ROOT / "benchmarks" / "projection" / "configs").glob("*.json")
    }
    assert configs
    assert configs <= set(names)
    held = {name for name in names if name.endswith(".py")}
    wanted = {str(f.relative_to(ROOT)) for f in (ROOT / "igulora").rglob("*.py")}
    wanted |= {
        f"igulora/{f.relative_to(ROOT)}" for name in ("kernels", "benchmarks") for f in (ROOT / name).rglob("*.py")
    }
    assert held == wanted
