"""Compiles the train step while somebody waits: says how long it usually takes, and took.

What it took the last time stands beside the compiled programs, by the shapes and the chips that it
depends on. JAX's own cache forgets a program with every new version and every changed line of code,
and then it is good to know whether to wait for ten seconds or for ten minutes.
"""

import contextlib
import hashlib
import time

import jax
from absl import logging
from etils import epath

from beit_jax import progress
from beit_jax.config import ConfigError
from beit_jax.files import write_json
from beit_jax.json_text import read_json_object
from beit_jax.training import startup
from beit_jax.types import JsonObject, PyTree

NAME = "compile_seconds.json"
_MOST = 200  # programs that are remembered


def compile_step(jitted: jax.stages.Wrapped, *arguments: PyTree) -> jax.stages.Compiled:
    """Compiles a jitted function for arguments, with progress on process 0.

    Args:
      jitted: from `jax.jit`.
      arguments: arrays, or their shapes.

    Returns:
      What `jitted.lower(*arguments).compile()` gives.
    """
    first = jax.process_index() == 0
    path = _path() if first else None
    key = _key(arguments)
    usually = _seconds(path).get(key)
    took = f"usually {usually:.0f} s" if isinstance(usually, int | float) else ""
    logging.info("compiling the train step; %s", took or "a large model takes minutes")
    began = time.perf_counter()
    with startup.cache_hits() as hits:
        with progress.waiting("compiling the train step", usually=took, shown=first):
            compiled = jitted.lower(*arguments).compile()
        cached = hits() > 0
    seconds = time.perf_counter() - began
    logging.info(
        "compiled the train step in %.1f s%s",
        seconds,
        ", read from the compilation cache" if cached else "",
    )
    if path is not None and not cached:
        _remember(path, key, seconds)
    return compiled


def _path() -> epath.Path | None:
    """The file beside the compiled programs; None where none are kept."""
    # JAX adds the attributes of its settings at run time.
    folder = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    return epath.Path(folder) / NAME if folder else None


def _key(arguments: PyTree) -> str:
    """A digest of what the time depends on, whatever the code is: shapes and chips."""
    shapes = [f"{leaf.shape} {leaf.dtype}" for leaf in jax.tree.leaves(arguments)]
    chips = f"{jax.devices()[0].device_kind} × {jax.device_count()}"
    return hashlib.sha256("\n".join([chips, *shapes]).encode()).hexdigest()[:16]


def _seconds(path: epath.Path | None) -> JsonObject:
    """Seconds by key; {} where nothing can be read."""
    if path is None:
        return {}
    try:
        return read_json_object(path) if path.exists() else {}
    except (ConfigError, OSError):
        return {}


def _remember(path: epath.Path, key: str, seconds: float) -> None:
    known = {name: value for name, value in _seconds(path).items() if name != key}
    newest = dict(list(known.items())[-(_MOST - 1) :]) | {key: round(seconds, 1)}
    with contextlib.suppress(OSError):  # it is a convenience: no run ends over it
        write_json(path, newest)
