"""Imports point one way: down the table in CONTRIBUTING.md, never up and never sideways between parts that do not name each other."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import nodesieve

ROOT = Path(nodesieve.__file__).parent

# From the top of the house to its foundations. A module may import from lines below its own, and from its own package.
TABLE = Path(__file__).parents[1] / "CONTRIBUTING.md"
ROWS = re.findall(r"^\| (`.*?`) \|", TABLE.read_text("utf-8"), re.MULTILINE)
ORDER = [name.removesuffix(".py").rstrip("/") for row in ROWS for name in re.findall(r"`(.*?)`", row)]


def layer(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports hide what they name"
            names = [f"nodesieve.{name}" for name in names] if node.module == "nodesieve" else [node.module or ""]
        found |= {name.split(".")[1] for name in names if name.startswith("nodesieve.")}
    return found


def test_every_module_has_its_line() -> None:
    assert sorted({layer(path) for path in ROOT.rglob("*.py")} - {"__init__", "__main__"}) == sorted(ORDER)


def test_imports_are_seen_however_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(
        "import nodesieve.run\nfrom nodesieve.cli.common import goes_on\nfrom nodesieve import discovery, report as r\n"
    )
    assert imports(tmp_path / "module.py") == {"run", "cli", "discovery", "report"}


def test_imports_point_down() -> None:
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        own = layer(path)
        if own.startswith("__"):
            continue
        wrong += [
            f"{path.relative_to(ROOT)} imports {other}"
            for other in sorted(imports(path))
            if other not in (own, "__version__") and ORDER.index(other) <= ORDER.index(own)
        ]
    assert wrong == []


def test_help_and_import_load_neither_torch_nor_transformers_nor_matplotlib() -> None:
    code = "import sys, nodesieve, nodesieve.cli; print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_are_few_and_there() -> None:
    assert len(nodesieve.__all__) < 10
    assert all(callable(getattr(nodesieve, name)) for name in nodesieve.__all__)
