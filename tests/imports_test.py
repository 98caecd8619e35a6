"""Packages import only from below, and only what their requirements name."""

import ast
import re
import sys
from pathlib import Path

import pytest

from tests.absent import run_without

PACKAGE = Path(__file__).parent.parent / "beit_jax"
# From top to bottom; a package imports from itself and from the rows below it.
ORDER = [
    ("cli",),
    ("doctor", "pictures"),
    ("jobs",),
    ("planning",),
    ("features", "report", "segment"),
    ("tasks",),
    ("evaluation",),
    ("training",),
    ("distributed",),
    ("pretrained",),
    ("weights",),
    ("drawing",),
    ("segmentation",),
    ("data",),
    ("tokenizers",),
    ("models",),
    (
        *(
            "config",
            "config_file",
            "files",
            "hardware",
            "json_text",
            "metrics_file",
            "preprocessing",
            "progress",
            "storage",
            "text_table",
            "types",
        ),
        "verbosity",
    ),
]


def test_imports_go_one_way():
    level = {name: i for i, row in enumerate(ORDER) for name in row}
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own in ("__init__", "__main__"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("beit_jax"):
                base = node.module.split(".")[1:]
                names = [".".join([*base, alias.name]) for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [a.name[9:] for a in node.names if a.name.startswith("beit_jax.")]
            for name in names:
                top = name.split(".")[0]
                if top.startswith("__"):
                    continue
                assert level[top] >= level[own], f"{path.relative_to(PACKAGE)} imports {name}"


@pytest.mark.parametrize("absent", ["tensorflow", "torch"])
def test_a_step_needs_neither_tensorflow_nor_pytorch(absent):
    """The modules are imported in a process where importing either fails."""
    program = f"""
import beit_jax.models.heads, beit_jax.tokenizers.loading, beit_jax.tasks.pretrain
import beit_jax.training.loop, beit_jax.training.checkpoint, beit_jax.weights
import beit_jax.drawing.sheets, beit_jax.planning.plan
from beit_jax.config import MaskConfig
from beit_jax.data import masking
assert masking.max_masked(MaskConfig(), grid=14) == 75  # settings are checked without TensorFlow
import sys
assert {absent!r} not in sys.modules
"""
    run_without([absent], program)


# Packages that only training installs, and the rooms that may import them.
TRAINING_LIBRARIES = (
    "clu",
    "ml_collections",
    "orbax",
    "tensorboard",
    "tensorflow",
    "tensorflow_datasets",
    "torch",
)
TRAINING_ROOMS = {"data", "distributed", "doctor", "jobs", "planning", "tasks", "training"}


def test_the_library_imports_without_what_only_training_installs():
    """Every module outside the rooms for training, in a process where those packages are absent."""
    modules = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        if parts[1] not in TRAINING_ROOMS and parts[-1] != "__main__":
            modules.append(".".join(parts).removesuffix(".__init__"))
    assert "beit_jax.pretrained.loading" in modules
    program = "\n".join(f"import {module}" for module in modules)
    check = f"assert not set(sys.modules) & {set(TRAINING_LIBRARIES)!r}"
    run_without(TRAINING_LIBRARIES, f"{program}\n{check}")


# Where a package is imported by another name than it is installed by.
IMPORT_NAMES = {
    "absl-py": "absl",
    "huggingface-hub": "huggingface_hub",
    "importlib-resources": "importlib_resources",
    "ml-collections": "ml_collections",
    "ml-dtypes": "ml_dtypes",
    "orbax-checkpoint": "orbax",
    "pillow": "PIL",
    "tensorflow-cpu": "tensorflow",
    "tensorflow-datasets": "tensorflow_datasets",
}
# Needed only for one thing each, which says so where it is missing: writing a .pth; asking libtpu
# for a topology; reading a TFDS data set at random, which comes with tfds.
OPTIONAL = {"torch", "libtpu", "array_record"}


def required(name: str) -> set[str]:
    """The import names of what requirements/NAME.txt lists."""
    lines = (PACKAGE.parent / "requirements" / f"{name}.txt").read_text().splitlines()
    names = {re.match(r"[\w.-]+", line)[0] for line in lines if line and not line.startswith("#")}
    names = {name.lower().replace("_", "-") for name in names}
    return {IMPORT_NAMES.get(name, name) for name in names}


def imported(path: Path) -> dict[str, bool]:
    """Packages from elsewhere that a module imports → whether it does so when it is imported."""
    tree = ast.parse(path.read_text())
    guarded = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.If))]
    lazy = {id(inner) for node in guarded for inner in ast.walk(node)}
    found: dict[str, bool] = {}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        for name in names:
            top = name.split(".")[0]
            if top != "beit_jax" and top not in sys.stdlib_module_names:
                found[top] = found.get(top, False) or id(node) not in lazy
    return found


def test_requirements_name_what_is_imported():
    library = required("library")
    training = library | required("train")
    optional = training | required("hub") | required("parquet") | required("wandb") | OPTIONAL
    used: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for name, at_once in imported(path).items():
            allowed = training if room in TRAINING_ROOMS else library
            if room == "report":  # its command says which package is missing
                allowed = library | required("report")
            allowed = allowed if at_once else optional
            assert name in allowed, f"{path.relative_to(PACKAGE)} imports {name}"
            if room not in (*TRAINING_ROOMS, "report") and at_once:
                used.add(name)
    assert used == library, "requirements/library.txt lists what the library imports, no more"
