"""What must run where TensorFlow or PyTorch is not installed imports neither; imports go down."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "beit_jax"
# From the top of the house to the ground; a package imports from itself and from below.
ORDER = [
    ("jobs", "cli"),
    ("planning",),
    ("features",),
    ("tasks",),
    ("evaluation",),
    ("training",),
    ("distributed",),
    ("pretrained",),
    ("weights",),
    ("pictures",),
    ("data",),
    ("tokenizers",),
    ("models",),
    ("config", "files", "preprocessing", "text_table", "types"),
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
    """In a process where importing either fails."""
    program = f"""
import sys
sys.modules[{absent!r}] = None  # import raises ModuleNotFoundError
import beit_jax.models.heads, beit_jax.tokenizers.loading, beit_jax.tasks.pretrain
import beit_jax.training.loop, beit_jax.training.checkpoint, beit_jax.weights, beit_jax.pictures
import beit_jax.planning.plan
assert {absent!r} not in {{name for name, module in sys.modules.items() if module is not None}}
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
