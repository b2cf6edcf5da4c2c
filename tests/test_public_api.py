"""The public names: complete, lazy, the same whatever was imported first; one version everywhere."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import neuron_sparsity as ns

PUBLIC_NAMES = sorted(set(ns.__all__) - {"__version__"} - ns._SUBMODULES)
SHARED_NAMES = ["damage", "pareto", "perplexity", "plan", "report", "saliency", "study"]


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_public_name_is_what_its_module_defines(name: str) -> None:
    value = getattr(ns, name)
    assert not isinstance(value, ModuleType)
    assert value is getattr(importlib.import_module(f"neuron_sparsity.{ns._MODULE_OF[name]}"), name)
    assert value.__name__ == name
    assert value.__module__.startswith("neuron_sparsity")
    assert inspect.getdoc(value)


def test_lists_of_public_names_agree(repository: Path) -> None:
    assert len(set(ns.__all__)) == len(ns.__all__)
    assert set(PUBLIC_NAMES) == set(ns._MODULE_OF)
    assert dir(ns) == sorted(ns.__all__)
    tree = ast.parse((repository / "neuron_sparsity" / "__init__.py").read_text(encoding="utf-8"))
    for_type_checkers = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("neuron_sparsity.")
        for alias in node.names
    }
    assert for_type_checkers == {name: f"neuron_sparsity.{module}" for name, module in ns._MODULE_OF.items()}


@pytest.mark.parametrize("name", sorted(ns._SUBMODULES))
def test_submodule_is_loaded_when_it_is_used(name: str) -> None:
    check = "; ".join(
        [
            "import sys, neuron_sparsity as ns",
            f"assert 'neuron_sparsity.{name}' not in sys.modules and 'torch' not in sys.modules",
            f"assert ns.{name} is sys.modules['neuron_sparsity.{name}']",
        ]
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    module = getattr(ns, name)
    assert all(inspect.getdoc(getattr(module, public)) for public in module.__all__)


def test_unknown_name_says_so() -> None:
    with pytest.raises(AttributeError, match="module 'neuron_sparsity' has no attribute 'sparsness'"):
        ns.sparsness  # noqa: B018


@pytest.mark.parametrize("name", SHARED_NAMES)
@pytest.mark.parametrize(
    "first",
    [
        "import neuron_sparsity as ns; getattr(ns, {name!r})",
        "import neuron_sparsity.{name}",
        "from neuron_sparsity.{name} import {name}",
        "import importlib; importlib.import_module('neuron_sparsity.{name}')",
        "from neuron_sparsity import {name}",
    ],
)
def test_function_keeps_its_name_beside_a_module_of_that_name(name: str, first: str) -> None:
    check = "; ".join(
        [
            first.format(name=name),
            "import sys, inspect, neuron_sparsity as ns",
            f"assert inspect.isfunction(ns.{name}), ns.{name}",
            f"assert inspect.ismodule(sys.modules['neuron_sparsity.{name}'])",
            f"import neuron_sparsity.{name}",
            f"assert inspect.isfunction(ns.{name}), ns.{name}",
        ]
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_shared_names_are_all_tested() -> None:
    assert sorted(ns._SAME_NAME) == SHARED_NAMES


def test_errors_form_one_tree() -> None:
    errors = [name for name in PUBLIC_NAMES if ns._MODULE_OF[name] == "errors"]
    assert errors == sorted(importlib.import_module("neuron_sparsity.errors").__all__)
    assert all(issubclass(getattr(ns, name), ns.NeuronSparsityError) for name in errors)


def test_version_is_one(repository: Path) -> None:
    """Of the package, of what is installed, and at the top of the changelog's releases."""
    changelog = (repository / "CHANGELOG.md").read_text(encoding="utf-8")
    releases = re.findall(r"^## \[(\d[^\]]*)\] - \d{4}-\d{2}-\d{2}$", changelog, flags=re.MULTILINE)
    assert releases[0] == ns.__version__
    assert "## [Unreleased]" in changelog
    try:
        installed = importlib.metadata.version("neuron-sparsity")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is on the path, not installed")
    assert installed == ns.__version__


def test_package_is_typed(repository: Path) -> None:
    assert (repository / "neuron_sparsity" / "py.typed").is_file()


def test_module_runs_as_a_command() -> None:
    command = [sys.executable, "-m", "neuron_sparsity", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "report" in done.stdout
