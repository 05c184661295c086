"""Import rules, load times, and the limits on code, settings and tasks."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from glmbatch.settings import tuning  # noqa: F401  registers its settings classes
from glmbatch.settings.job import Settings
from tests.support import ROOT

# Forbidden imports by package. "glmbatch.cli.main" is exempt: one function imports the flow.
FORBIDDEN = {
    "glmbatch": {"prefect", "tasks", "flows"},
    "glmbatch/store": {"torch", "transformers", "glmbatch.glm", "glmbatch.steps"},
    "glmbatch/ledger": {"torch", "transformers", "glmbatch.glm", "glmbatch.steps"},
    "glmbatch/glm": {"pyarrow", "pandas", "glmbatch.ledger", "glmbatch.store", "glmbatch.steps"},
    "glmbatch/steps": {"torch", "transformers", "pandas"},
    "glmbatch/report": {"torch", "transformers", "pandas", "glmbatch.run", "glmbatch.steps"},
    "glmbatch/run": {"glmbatch.cli"},
    "tasks": {"flows", "torch", "transformers"},
    "flows": {"torch", "transformers"},
}


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_go_one_way(package: str) -> None:
    forbidden = tuple(f"{name}." for name in FORBIDDEN[package])
    broken = []
    for path in (ROOT / package).rglob("*.py"):
        if path == ROOT / "glmbatch/cli/main.py":
            continue
        for name in imports_of(path):
            if f"{name}.".startswith(forbidden):
                broken.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not broken


def test_only_one_cli_function_imports_the_flow() -> None:
    tree = ast.parse((ROOT / "glmbatch/cli/main.py").read_text())
    outside = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not [
        node for node in outside if getattr(node, "module", "") in {"prefect", "flows", "tasks"}
    ]


def test_settings_and_errors_import_no_other_package() -> None:
    folder = ROOT / "glmbatch"
    for path in (*(folder / "settings").rglob("*.py"), folder / "errors.py"):
        for name in imports_of(path):
            if name.startswith(("glmbatch", "tasks", "flows")):
                assert name.startswith(("glmbatch.settings", "glmbatch.errors")), path


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return set(done.stdout.split())


@pytest.mark.slow
def test_importing_the_flows_loads_no_torch() -> None:
    assert not {"torch", "transformers"} & loaded_by("import flows.annotate")


def test_importing_glmbatch_loads_no_prefect() -> None:
    assert "prefect" not in loaded_by(
        "import glmbatch.run.job, glmbatch.run.preview, glmbatch.cli.main"
    )


def test_the_model_runs_without_prefect_and_pydantic() -> None:
    blocked = "import sys; sys.modules.update(dict.fromkeys(('prefect', 'pydantic')))"
    needed = "glmbatch.glm.engine.worker, glmbatch.glm.tokenizer, glmbatch.glm.checkpoint.doctor"
    loaded_by(f"{blocked}\nimport {needed}")


def test_an_engine_loads_without_transformers() -> None:
    code = """
from glmbatch.glm.engine.loading import load_engine
from glmbatch.settings.model import ModelConfig
from glmbatch.settings.job import RuntimeConfig
model = ModelConfig(path="tests/goldens/base-sharded")
load_engine(model, RuntimeConfig(device="cpu")).close()
"""
    assert "transformers" not in loaded_by(code)


def test_help_loads_nothing_heavy() -> None:
    loaded = loaded_by(
        "import glmbatch.cli.main\ntry: glmbatch.cli.main.main(['--help'])\nexcept SystemExit: pass"
    )
    assert not {"torch", "transformers", "prefect", "pandas", "pyarrow", "rich"} & loaded


def test_importing_glmbatch_loads_nothing_heavy() -> None:
    assert not {"torch", "pandas", "pyarrow", "pydantic"} & loaded_by("import glmbatch")


def settings_classes() -> list[type[BaseModel]]:
    classes = [Settings]
    for kind in classes:  # the list grows during the loop
        classes += kind.__subclasses__()
    return classes[1:]


@pytest.mark.parametrize("settings", settings_classes(), ids=lambda each: each.__name__)
def test_settings_are_described_and_refuse_unknown_keys(settings: type[BaseModel]) -> None:
    undescribed = [
        name
        for name, field in settings.model_fields.items()
        if not field.description and name != "kind"
    ]
    assert not undescribed
    assert settings.model_config["extra"] == "forbid"
    assert settings.model_config["frozen"]


def test_every_task_declares_its_caching_and_retries() -> None:
    for path in sorted((ROOT / "tasks").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef):
                continue
            for decorator in node.decorator_list:
                if isinstance(decorator, ast.Call) and getattr(decorator.func, "id", "") == "task":
                    options = {keyword.arg for keyword in decorator.keywords}
                    assert options & {"cache_key_fn", "cache_policy"}, f"{path.name}: {node.name}"
                    assert "retry_condition_fn" in options, f"{path.name}: {node.name}"


# The figures below are limits, not targets. Review any code that comes near one.

PRODUCT = ("glmbatch", "tasks", "flows", "deployments")
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
# `location` is a function of ours; tables have one too, as a method and a parameter.
STORE_NAMES = re.compile(r"\b(ObjectPath|is_remote|side_by_side)\b|(?<!\.)\blocation\(")


def modules(*folders: str) -> dict[str, str]:
    """Source text of every module under the folders, keyed by its path from the root."""
    texts = {}
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            texts[path.relative_to(ROOT).as_posix()] = path.read_text()
    return texts


def functions(text: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """All functions of a module, including methods and nested functions."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, FUNCTIONS):
            yield node


def test_no_function_is_longer_than_45_lines() -> None:
    long = []
    for name, text in modules(*PRODUCT).items():
        for function in functions(text):
            assert function.end_lineno is not None
            if function.end_lineno - function.lineno >= 45:
                long.append(f"{name}: {function.name}")
    assert not long


def test_no_module_is_longer_than_350_lines() -> None:
    texts = modules(*PRODUCT)
    assert not [name for name, text in texts.items() if len(text.splitlines()) > 350]


def test_no_folder_has_more_than_14_modules() -> None:
    counts = Counter(
        Path(name).parent for name in modules(*PRODUCT) if not name.endswith("__init__.py")
    )
    assert max(counts.values()) <= 14, counts


def test_no_line_is_longer_than_100_characters() -> None:
    long = []
    for name, text in modules(*PRODUCT, "tests", "benchmarks", "sample_data").items():
        for number, line in enumerate(text.splitlines(), 1):
            if len(line) > 100:
                long.append(f"{name}:{number}")
    assert not long


def test_no_comprehension_is_nested() -> None:
    nested = []
    for name, text in modules(*PRODUCT).items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, COMPREHENSIONS):
                parts = list(ast.walk(node))[1:]
                if len(node.generators) > 1 or any(
                    isinstance(part, COMPREHENSIONS) for part in parts
                ):
                    nested.append(f"{name}:{node.lineno}")
    assert not nested


def test_few_modules_distinguish_stores_from_disks() -> None:
    knowing = [name for name, text in modules(*PRODUCT).items() if STORE_NAMES.search(text)]
    assert len(knowing) <= 8, knowing


def test_few_functions_take_the_whole_job() -> None:
    taking = []
    for name, text in modules(*PRODUCT).items():
        for function in functions(text):
            arguments = [*function.args.args, *function.args.kwonlyargs]
            kinds = [ast.unparse(each.annotation) for each in arguments if each.annotation]
            if any("JobConfig" in kind for kind in kinds):
                taking.append(f"{name}: {function.name}")
    assert len(taking) <= 22, taking


def test_modules_have_no_import_cycles() -> None:
    imports = {}
    texts = modules(*PRODUCT)
    for name, text in texts.items():
        imports[name] = imports_at_load(text) & texts.keys() - {name}
    # Keep removing modules without remaining imports. Only cycles survive.
    while ends := [name for name, targets in imports.items() if not targets]:
        for name in ends:
            del imports[name]
        for targets in imports.values():
            targets.difference_update(ends)
    assert not imports


def imports_at_load(text: str) -> set[str]:
    """Paths of the modules imported at load time. Imports inside functions do not count."""
    pending: list[ast.AST] = [ast.parse(text)]
    paths = set()
    while pending:
        node = pending.pop()
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            names = []
            for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            if not for_types and not isinstance(node, FUNCTIONS):
                pending.extend(ast.iter_child_nodes(node))
        paths |= {f"{name.replace('.', '/')}.py" for name in names}
    return paths


def test_test_names_are_under_60_characters() -> None:
    long = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and len(node.name) >= 60:
                long.append(f"{path.name}: {node.name}")
    assert not long
