from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import bayesdl as bdl
from bayesdl import _registry
from bayesdl.errors import MethodError

PACKAGE = Path(bdl.__file__).parent


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print('\\n'.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    return set(run.stdout.split())


def test_import_loads_no_more_than_pyro_does():
    # Module sets, not seconds: everything that the import brings beyond Pyro's must be our own or the standard library.
    extra = modules_after("import bayesdl") - modules_after("import pyro")
    foreign = {name.partition(".")[0] for name in extra} - set(sys.stdlib_module_names) - {"bayesdl", "__mp_main__"}
    assert {name for name in foreign if not name.startswith("_")} == set()


def test_import_loads_no_heavy_part():
    loaded = modules_after("import bayesdl")
    heavy = {"torch", "pyro", "gpytorch", "sklearn", "scipy", "matplotlib", "arviz", "typer", "rich"}
    assert loaded & heavy == set()


@pytest.mark.parametrize("name", sorted(_registry.TABLE))
def test_every_public_name_resolves(name):
    assert getattr(bdl, name) is not None
    assert name in dir(bdl)
    assert name in bdl.__all__


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'NUTZ'"):
        bdl.NUTZ  # noqa: B018 - the access is the test


@pytest.mark.parametrize("module", ["bayesdl.evaluate", "bayesdl.describe", "bayesdl.compare"])
def test_function_is_not_hidden_by_the_module_of_its_name(module):
    importlib.import_module(module)
    assert callable(getattr(bdl, module.partition(".")[2]))


def test_type_checkers_see_the_table():
    tree = ast.parse(Path(bdl.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    seen = {}
    for node in imports:
        for alias in node.names:
            if alias.asname is None:
                continue
            is_module = node.module == "bayesdl" or f"{node.module}.{alias.name}" in _registry.MODULES.values()
            seen[alias.asname] = f"{node.module}.{alias.name}" if is_module else f"{node.module}:{alias.name}"
    assert seen == dict(_registry.TABLE)


def test_method_names_in_any_case():
    assert _registry.method_class("nuts") is bdl.NUTS
    assert _registry.method_class("MeanFieldVI") is bdl.MeanFieldVI


def test_misspelt_method_names_the_nearest():
    with pytest.raises(MethodError, match="Did you mean meanfieldvi"):
        _registry.method_class("meanfield")


def test_fit_without_a_method_takes_the_documented_default(monkeypatch):
    class Recorder:
        def fit(self, model, data, **options):
            return model, data, options

    monkeypatch.setitem(_registry.METHODS, "MeanFieldVI", f"{__name__}:unused")
    monkeypatch.setattr(bdl, "resolve", lambda name: Recorder if name == "MeanFieldVI" else None)
    assert bdl.fit("model", "data", seed=3) == ("model", "data", {"seed": 3})


def test_describe_forecasts_every_method_unless_told():
    data = bdl.data.synthetic.sine_line(20, seed=0)
    model = bdl.models.mlp(data, hidden=(2,))
    assert set(bdl.describe(model, data).forecasts) == set(_registry.METHODS)
    assert set(bdl.describe(model, data, [bdl.MAP()]).forecasts) == {"MAP"}
