"""Which module may import which, and what an import must not load. Each probe is shown to notice a planted offence."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import neuron_sparsity

PACKAGE = "neuron_sparsity"

# From the top of the house to the bottom: a room imports only from itself and from rooms above it.
ROOMS = [
    "errors",
    "typed",
    "advice",
    "interrupts",
    "allocator",
    "parallel",
    "kernels",
    "metrics",
    "laws",
    "store",
    "sources",
    "rows",
    "windows",
    "corpus",
    "overlap",
    "placement",
    "fingerprint",
    "model_info",
    "weights",
    "blueprint",
    "plain",
    "adapter",
    "entry",
    "activation",
    "divergence",
    "perplexity",
    "statistics",
    "recording",
    "recorder",
    "footprint",
    "plan",
    "curves",
    "truncation",
    "passage",
    "search",
    "bootstrap",
    "evaluation",
    "interval",
    "cett_search",
    "sparsity",
    "saliency",
    "scores",
    "ranking",
    "replacement",
    "greedy",
    "tally",
    "removal",
    "confirmation",
    "holding",
    "ablation",
    "ablation_files",
    "wording",
    "checkpoint",
    "model_card",
    "surgery",
    "pruning_forms",
    "pruning",
    "damage_tables",
    "damage",
    "rules",
    "rule_passes",
    "frontier",
    "pareto",
    "tasks",
    "task_scores",
    "downstream",
    "taxonomy",
    "trajectory",
    "study",
    "report",
    "viz",
    "run_results",
    "pipeline",
    "summary",
    "terminal",
    "progress",
    "doctor",
    "options",
    "console",
    "commands",
    "atlas_commands",
    "effect_commands",
    "report_commands",
    "study_command",
    "track_command",
    "cli",
    "__main__",
]

# Third-party packages with one owner: the prefix of the only modules that may import them.
OWNERS = {
    "transformer_lens": f"{PACKAGE}.adapter",
    "triton": f"{PACKAGE}.kernels.triton",
    "circuitsvis": f"{PACKAGE}.report.views",
}

MAX_LINES = 420
MAX_BYTES = 1_000_000


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(source: str, module: str, *, is_package: bool) -> list[tuple[int, str]]:
    """Return (line, absolute dotted name) of every import: in functions, under TYPE_CHECKING, by import_module.

    `from a.b import c` counts as `a.b.c`: whether `c` is a module or a name in one, its room is the same.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                package = package[: len(package) - (node.level - 1)]
                base = ".".join([*package, base] if base else package)
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in {"import_module", "__import__"}:
                found.append((node.lineno, str(node.args[0].value)))
    return found


def room_of(name: str) -> str:
    """Return the room of a dotted name in the package; a public name is in the room that defines it."""
    parts = name.split(".")
    if len(parts) == 1:
        return "__init__"
    return parts[1] if parts[1] in ROOMS else neuron_sparsity._MODULE_OF.get(parts[1], parts[1])


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """Return one line for every import of `module` that the order of the rooms or an owner forbids."""
    problems = []
    own_room = room_of(module)
    for line, name in imported_modules(source, module, is_package=is_package):
        where = f"{module}:{line} imports {name}"
        top = name.split(".")[0]
        owner = OWNERS.get(top)
        if owner and module != owner and not module.startswith(f"{owner}."):
            problems.append(f"{where}: only {owner} may import {top}")
        if top != PACKAGE or own_room == "__init__":
            continue
        room = room_of(name)
        if room == "__init__":
            problems.append(f"{where}: import from the module that defines the name")
        elif room == "__version__":
            continue
        elif room not in ROOMS:
            problems.append(f"{where}: {room} is no room, add it to ROOMS where it belongs")
        elif own_room in ROOMS and ROOMS.index(room) > ROOMS.index(own_room):
            problems.append(f"{where}: {room} is below {own_room}")
        if module.startswith(f"{PACKAGE}.kernels.triton") and name.startswith(f"{PACKAGE}.kernels.reference"):
            problems.append(f"{where}: a kernel never imports its oracle")
    return problems


@pytest.fixture(scope="module")
def package_files(repository: Path) -> list[Path]:
    return sorted((repository / PACKAGE).rglob("*.py"))


def test_imports_only_point_up(package_files: list[Path], repository: Path) -> None:
    problems = []
    for path in package_files:
        source = path.read_text(encoding="utf-8")
        problems += violations(source, module_name(path, repository), is_package=path.name == "__init__.py")
    assert not problems, "\n".join(problems)


def test_every_module_is_in_a_room(package_files: list[Path], repository: Path) -> None:
    rooms = {room_of(module_name(path, repository)) for path in package_files}
    assert rooms <= {*ROOMS, "__init__"}, f"add to ROOMS, in its place: {sorted(rooms - {*ROOMS, '__init__'})}"


@pytest.mark.parametrize(
    ("module", "source", "problem"),
    [
        ("metrics", "from neuron_sparsity.recorder import record", "recorder is below metrics"),
        ("metrics", "from neuron_sparsity import record", "recorder is below metrics"),
        ("metrics", "from neuron_sparsity import recorder", "recorder is below metrics"),
        ("metrics", "from .recorder import record", "recorder is below metrics"),
        ("metrics", "def f():\n    import neuron_sparsity.cli", "cli is below metrics"),
        ("store", "if TYPE_CHECKING:\n    from neuron_sparsity.report import report", "report is below store"),
        ("kernels.reference", "from ..metrics import cett", "metrics is below kernels"),
        ("report.page", "import neuron_sparsity", "import from the module that defines the name"),
        ("report.page", "from neuron_sparsity.helpers import x", "helpers is no room"),
        ("recorder", "from transformer_lens import HookedTransformer", "only neuron_sparsity.adapter may"),
        ("recorder", "importlib.import_module('transformer_lens.model_bridge')", "only neuron_sparsity.adapter may"),
        ("kernels.reference", "import triton.language as tl", "only neuron_sparsity.kernels.triton may"),
        ("report.page", "import circuitsvis", "only neuron_sparsity.report.views may"),
        ("kernels.triton.topk", "from neuron_sparsity.kernels.reference import topk", "never imports its oracle"),
    ],
)
def test_checker_notices_a_planted_violation(module: str, source: str, problem: str) -> None:
    found = violations(source, f"{PACKAGE}.{module}")
    assert len(found) == 1
    assert problem in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("recorder", "import torch\nfrom neuron_sparsity.metrics import cett\nfrom neuron_sparsity import ModelError"),
        ("report.page", "from neuron_sparsity import __version__\nfrom . import views\nfrom .views import histogram"),
        ("adapter", "from transformer_lens.model_bridge import TransformerBridge"),
        ("kernels.triton.topk", "import triton.language as tl"),
    ],
)
def test_checker_accepts_what_is_allowed(module: str, source: str) -> None:
    assert violations(source, f"{PACKAGE}.{module}") == []


def loaded_after(code: str) -> set[str]:
    """Return which of the heavy packages a fresh interpreter holds after `code`."""
    heavy = "[name for name in ('torch', 'transformer_lens') if name in sys.modules]"
    probe = f"{code}\nimport json, sys\nprint(json.dumps({heavy}))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_package_import_is_light() -> None:
    assert loaded_after("import neuron_sparsity; dir(neuron_sparsity); neuron_sparsity.ModelError") == set()


def test_import_probe_notices_torch() -> None:
    assert loaded_after("import neuron_sparsity, torch") == {"torch"}


def test_help_does_not_import_torch() -> None:
    run_help = "\n".join(
        [
            "import sys",
            "from neuron_sparsity.cli import main",
            "sys.argv = ['neuron-sparsity', '--help']",
            "try:",
            "    code = main()",
            "except SystemExit as exit:",
            "    code = exit.code",
            "assert not code, code",
        ]
    )
    assert loaded_after(run_help) == set()


def test_package_files_stay_short(package_files: list[Path], repository: Path) -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in package_files}
    long = {str(path.relative_to(repository)): n for path, n in lengths.items() if n > MAX_LINES}
    assert not long, f"longer than {MAX_LINES} lines: {long}"


def test_no_file_in_the_repository_is_large(repository: Path) -> None:
    """Tracked files, and those that `git add` would take."""
    if not (repository / ".git").exists():
        pytest.skip("no git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True).stdout.split("\0")
    paths = [repository / name for name in names if name]
    large = {path.name: path.stat().st_size for path in paths if path.is_file() and path.stat().st_size > MAX_BYTES}
    assert not large, f"larger than {MAX_BYTES} bytes: {large}"
