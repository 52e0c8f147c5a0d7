"""The floors of the house: a file imports its own floor's folder and lower floors, never sideways, never up."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import bayesdl

PACKAGE = Path(bayesdl.__file__).parent

FLOORS = {
    "errors": 0,
    "_rng": 0,
    "_memory": 0,
    "_distributed": 0,
    "_files": 0,
    "data": 1,
    "models": 1,
    "density": 1,
    "statespace": 1,
    "posterior": 2,
    "curvature": 2.5,
    "infer": 3,
    "evaluate": 3,
    "bounds": 4,
    "infinite": 4,
    "theory": 5,
    "estimators": 5,
    "describe": 5,
    "compare": 5,
    "cli": 6,
}
FACE = {"__init__", "_registry"}
# Those that only call may look a method up by its name; the table itself imports nothing.
READS_THE_TABLE = 5


def room_of(path: Path) -> str:
    """The folder, or for a file at the top its name without .py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(source: str) -> set[tuple[str, int]]:
    """Rooms of bayesdl that a file imports anywhere in it, with line numbers; "__init__" is the package itself."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write it out, so that the floors can be seen"
            module = node.module or ""
            if module == "bayesdl":
                # A name that is no room is one of the face's own.
                names = (alias.name for alias in node.names)
                found |= {(name if name in FLOORS.keys() | FACE else "__init__", node.lineno) for name in names}
            elif module.startswith("bayesdl."):
                found.add((module.split(".")[1], node.lineno))
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name == "bayesdl":
                    found.add(("__init__", node.lineno))
                elif alias.name.startswith("bayesdl."):
                    found.add((alias.name.split(".")[1], node.lineno))
    return found


def violations(room: str, source: str) -> list[str]:
    found = []
    for target, line in sorted(imports_of(source), key=lambda item: item[1]):
        if target in FACE:
            if target == "__init__" or FLOORS[room] < READS_THE_TABLE:
                found.append(f"line {line}: {room} imports the face ({target})")
        elif target not in FLOORS:
            found.append(f"line {line}: {target} stands on no floor; add it to FLOORS")
        elif target != room and FLOORS[target] >= FLOORS[room] and FLOORS[room] > 0:
            way = "sideways" if FLOORS[target] == FLOORS[room] else "up"
            found.append(f"line {line}: {room} (floor {FLOORS[room]}) imports {way} from {target}")
        elif FLOORS[room] == 0 and FLOORS[target] > 0:
            found.append(f"line {line}: {room} (floor 0) imports up from {target}")
    return found


FILES = sorted(path for path in PACKAGE.rglob("*.py") if room_of(path) not in FACE)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    room = room_of(path)
    assert room in FLOORS, f"{room} stands on no floor; add it to FLOORS"
    assert violations(room, path.read_text()) == []


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("data", "from bayesdl.posterior import base"),
        ("data", "import bayesdl.models.priors"),
        ("infer", "def f():\n    from bayesdl.evaluate import metrics"),
        ("infer", "import bayesdl as bdl"),
        ("infer", "from bayesdl import fit"),
        ("infer", "from bayesdl import _registry"),
        ("cli", "from bayesdl import NUTS"),
        ("errors", "from bayesdl.data import Dataset"),
        ("infer", "from bayesdl.somewhere import thing"),
    ],
)
def test_the_check_sees_a_violation(room, source):
    assert len(violations(room, source)) == 1


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("_files", "from bayesdl.errors import FileError"),
        ("posterior", "from bayesdl import errors\nfrom bayesdl.posterior.base import Posterior"),
        ("cli", "from bayesdl._registry import method_class\nfrom bayesdl.describe import describe"),
    ],
)
def test_the_check_lets_the_way_down_pass(room, source):
    assert violations(room, source) == []
