"""Versions of the code and of the libraries that a run's numbers depend on."""

import contextlib
import hashlib
import importlib.metadata
import pathlib

LIBRARIES = (
    "jax",
    "jaxlib",
    "libtpu",
    "flax",
    "optax",
    "orbax-checkpoint",
    "tensorflow",
    "tensorflow-cpu",
    "numpy",
)


def code_version(root: pathlib.Path | None = None) -> str:
    """A hash of a folder's Python files, 12 hexadecimal digits; of this package where None."""
    root = root or pathlib.Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


def library_versions() -> dict[str, str]:
    """The version of every installed library of `LIBRARIES`, by its name."""
    versions = {}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
