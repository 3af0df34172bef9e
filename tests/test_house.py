"""The house keeps its order: imports point one way, reading needs no torch, importing is light."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "sharpscope"
# From the ground up: a module may import what stands before it. Modules of one room stand together.
ROOMS = [
    ["_version", "errors", "toml", "counts", "factory", "home"],
    ["table", "recipe", "progress", "classes", "classnames"],
    ["storage", "journal", "calibration"],
    ["stragglers"],
    ["sharding"],
    ["tree", "naming"],
    ["partition"],
    ["recipe_file"],
    ["device", "capacity", "path", "ball", "losses", "sparsity", "ranks", "board", "weight_norm"],
    ["objective"],
    ["network", "batches", "loaders", "data", "precision", "provenance"],
    ["gathering"],
    ["replay"],
    ["apgd", "curvature"],
    ["perturbation", "evaluate", "budget", "soundness", "agreement"],
    ["measures", "memory", "caches"],
    ["models", "optim"],
    ["pictures", "collection", "folders", "shards", "webdataset", "rows", "items", "sources", "finetune", "merging"],
    ["pairs"],
    ["plan"],
    ["job"],
    ["preparation"],
    ["backoff", "apart"],
    ["moves", "trials", "intervention", "search"],
    ["report", "summary", "leftovers", "result", "saved"],
    ["detectors", "adapters", "prediction", "comparison"],
    ["measurement"],
    ["scanner"],
    ["config", "doctor", "demo", "crosscheck", "criticality"],
    ["commands", "cli", "__main__"],
]
RANK = {module: rank for rank, room in enumerate(ROOMS) for module in room}


def imports(path):
    """Yield the sharpscope modules that a file imports when it is loaded; not those inside functions or for types."""
    tree = ast.parse(path.read_text())
    tops = [node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))]
    for node in tops:
        for sub in ast.walk(node) if not isinstance(node, ast.FunctionDef | ast.ClassDef) else ():
            if isinstance(sub, ast.ImportFrom) and (sub.module or "").startswith("sharpscope."):
                yield sub.module.split(".")[1]
            elif isinstance(sub, ast.ImportFrom) and sub.module == "sharpscope":
                yield from (alias.name for alias in sub.names)


def files():
    return sorted(PACKAGE.rglob("*.py"))


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    if room(path) == "__init__":
        return
    assert room(path) in RANK, f"{path} is in no room"
    for imported in imports(path):
        assert RANK[imported] <= RANK[room(path)], f"{path.name} imports {imported}, which stands above it"


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import sharpscope", {"torch", "matplotlib", "transformers", "pandas"}),
        ("import sharpscope.result, sharpscope.stragglers.correlation", {"torch", "matplotlib", "transformers"}),
        ("import sharpscope; sharpscope.scan, sharpscope.layers", {"matplotlib", "transformers"}),
        ("import sharpscope; sharpscope.load", {"matplotlib", "transformers", "open_clip", "timm", "torchvision"}),
        ("import sharpscope.report.page", {"torch", "transformers"}),
        ("import sharpscope.commands.check", {"torch", "matplotlib", "transformers"}),
        ("import sharpscope.comparison, sharpscope.prediction, sharpscope.recipe_file", {"torch", "transformers"}),
        ("import sharpscope.commands.diff", {"torch", "matplotlib", "transformers"}),
        ("import sharpscope.cli", {"torch", "matplotlib", "transformers", "pandas"}),
    ],
)
def test_importing_loads_nothing_it_does_not_need(statement, absent):
    code = f"{statement}; import sys; print(*({absent!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_the_package_is_imported_in_60_ms():
    code = "import time; t = time.process_time(); import sharpscope; print(time.process_time() - t)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.06  # about 1 ms: it loads nothing but itself


def test_the_times_that_the_benchmark_found_keep_their_limits():
    found = json.loads((PACKAGE.parent / "benchmarks" / "results" / "imports.json").read_text())
    assert found["lines"]["sharpscope --help"]["wall_seconds"] < found["limits"]["sharpscope --help"] == 0.3
    added = "added to torch by import sharpscope"
    assert found[added]["worst_seconds"] < found["limits"][added] == 0.06


def test_no_public_name_is_shadowed_by_a_module():
    import sharpscope

    modules = {path.stem for path in PACKAGE.glob("*.py")} | {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert not modules & set(sharpscope.__all__)


@pytest.mark.parametrize(
    "name",
    [
        *("scan", "layers", "check", "open", "load", "folder", "images", "ScanResult", "Split", "verify", "merge"),
        *("diff", "across_models", "Recipe"),
    ],
)
def test_every_public_name_resolves_and_is_documented(name):
    import sharpscope

    assert (getattr(sharpscope, name).__doc__ or "").strip()


def test_an_unknown_name_is_an_attribute_error():
    import sharpscope

    with pytest.raises(AttributeError, match="no attribute 'scann'"):
        sharpscope.scann  # noqa: B018
