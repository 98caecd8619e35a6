"""Makes one model's parameters fit another: fine-tuning from pre-training, other resolutions."""

import dataclasses
import math
from collections.abc import Iterable, Mapping

import numpy as np

from beit_jax.types import FlatParams
from beit_jax.weights import resize
from beit_jax.weights.report import Report, WeightsError, allowed, check_names

SHARED_TABLE = "encoder/relative_position_bias/table"
BLOCK_TABLE = "encoder/blocks/attention/relative_position_bias/table"
POSITIONS = "encoder/pos_embed"
GAMMA = "encoder/blocks/gamma_1"
# Parameters whose last axis is the number of classes or tokens.
HEADS = {
    "lm_head/kernel": "tokens (vocabulary)",
    "head/kernel": "classes",
    "head/classifier/kernel": "classes",
    "auxiliary/classifier/kernel": "classes",
}


def per_block(params: FlatParams, *, layers: int | None = None) -> dict[str, np.ndarray]:
    """Copies a shared relative-position table `[t, h]` to every block, `[l, t, h]`.

    Args:
      params: flat, with `SHARED_TABLE`.
      layers: blocks; None takes the parameters' own number.
    """
    rest = {name: array for name, array in params.items() if name != SHARED_TABLE}
    table = params[SHARED_TABLE]
    if layers is None:
        layers = next(a.shape[0] for n, a in params.items() if n.startswith("encoder/blocks/"))
    rest[BLOCK_TABLE] = np.repeat(table[None], layers, axis=0)
    return rest


def resize_to(params: FlatParams, *, grid: int) -> tuple[dict[str, np.ndarray], list[str]]:
    """Resizes every relative-position table and position embedding to another grid.

    Returns:
      The parameters and what was reshaped, for a `Report`.
    """
    result, reshaped = dict(params), []
    for name in (SHARED_TABLE, BLOCK_TABLE, POSITIONS):
        if name not in params:
            continue
        change = resize.resize_positions if name == POSITIONS else resize.resize_table
        result[name] = change(params[name], grid=grid)
        if result[name].shape != params[name].shape:
            reshaped.append(f"{name} {params[name].shape} → {result[name].shape}")
    return result, reshaped


@dataclasses.dataclass(frozen=True)
class _Fitted:
    """Parameters that have the wanted shapes as far as they can be made to, and what was done."""

    params: dict[str, np.ndarray]
    reshaped: tuple[str, ...]


def adapt(
    params: FlatParams,
    wanted: Mapping[str, tuple[int, ...]],
    *,
    source: str,
    allow_missing: Iterable[str] = (),
    allow_unused: Iterable[str] = (),
) -> tuple[dict[str, np.ndarray], Report]:
    """Turns the parameters of one model into those of another.

    A shared relative-position table becomes per-block copies, and tables and positions change their
    resolution, where that is wanted. A head with another number of outputs is dropped where its
    name is allowed to be both missing and unused (the official loader drops it silently).

    Args:
      params: flat, "a/b/c" → array.
      wanted: flat, "a/b/c" → shape.
      source: where they came from, for messages.
      allow_missing: names that may be missing: a parameter, a module that holds it or a glob.
      allow_unused: names that may be left over.

    Returns:
      The wanted parameters but for allowed missing ones, and the report.

    Raises:
      WeightsError: another architecture, another vocabulary, or names missing or unused.
    """
    fitted = _fit_positions(params, wanted, source=source)
    dropped = _other_heads(
        fitted.params,
        wanted,
        source=source,
        allow_missing=allow_missing,
        allow_unused=allow_unused,
    )
    kept = {name: array for name, array in fitted.params.items() if name not in dropped}
    missing, unused = check_names(
        wanted,
        {name: array.shape for name, array in kept.items()},
        source=source,
        allow_missing=allow_missing,
        allow_unused=allow_unused,
        hint=_other_kind(kept, wanted)
        + " (allow what is meant by name: init_allow_missing, init_allow_unused)",
    )
    result = {name: kept[name] for name in wanted if name in kept}
    return result, Report(
        used=tuple(result),
        missing=tuple(missing),
        unused=(*unused, *dropped),
        reshaped=fitted.reshaped,
    )


def _fit_positions(
    params: FlatParams, wanted: Mapping[str, tuple[int, ...]], *, source: str
) -> _Fitted:
    """Copies a shared table to the blocks and resizes positions, where `wanted` says so."""
    result, reshaped = dict(params), []
    if BLOCK_TABLE in wanted and BLOCK_TABLE not in result and SHARED_TABLE in result:
        result = per_block(result, layers=wanted[BLOCK_TABLE][0])
        reshaped.append(f"{SHARED_TABLE} → {BLOCK_TABLE}, a copy for each block")
    _check_architecture(result, wanted, source=source)
    grid = _grid(wanted)
    if grid is not None:
        try:
            result, resized = resize_to(result, grid=grid)
        except ValueError as error:
            raise WeightsError(f"{source}: {error}") from None
        reshaped += resized
    return _Fitted(result, tuple(reshaped))


def _other_heads(
    params: FlatParams,
    wanted: Mapping[str, tuple[int, ...]],
    *,
    source: str,
    allow_missing: Iterable[str],
    allow_unused: Iterable[str],
) -> list[str]:
    """Names of heads with another number of outputs that may start anew; others are an error."""
    dropped: list[str] = []
    for name, what in HEADS.items():
        if name not in params or name not in wanted or params[name].shape == wanted[name]:
            continue
        module = name.removesuffix("/kernel")
        if not (allowed(name, allow_missing) and allowed(name, allow_unused)):
            raise WeightsError(
                f"{source}: {module} is for {params[name].shape[-1]} {what}, needed"
                f" {wanted[name][-1]}; to start it anew: --config.run.init_allow_missing={module}"
                f" --config.run.init_allow_unused={module}"
            )
        dropped += [other for other in params if other.startswith(f"{module}/")]
    return dropped


def _other_kind(found: Iterable[str], wanted: Iterable[str]) -> str:
    """What names say in plain words where they are those of another kind of encoder; "" else."""
    there, here = _kind(set(found)), _kind(set(wanted))
    different = [
        f"{there[what]} instead of {here[what]}" for what in there if there[what] != here[what]
    ]
    return f"; it has {' and '.join(different)}" if different else ""


def _kind(names: set[str]) -> dict[str, str]:
    tables = {
        POSITIONS: "absolute positions",
        SHARED_TABLE: "relative_shared positions",
        BLOCK_TABLE: "relative_per_block positions",
    }
    positions = [words for name, words in tables.items() if name in names]
    return {
        "positions": " and ".join(positions) or "no positions",
        "scale": "LayerScale" if GAMMA in names else "no LayerScale",
    }


def _check_architecture(
    params: FlatParams, wanted: Mapping[str, tuple[int, ...]], *, source: str
) -> None:
    """Raises one plain sentence where sizes differ, instead of a hundred shapes."""
    needed = sizes(wanted)
    found = sizes({name: array.shape for name, array in params.items()})
    different = [
        f"{size} {found[size]} instead of {needed[size]}"
        for size in needed
        if size in found and needed[size] != found[size]
    ]
    if different:
        raise WeightsError(f"{source} has another architecture: {', '.join(different)}")


def sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The sizes that shapes determine: layers, width, MLP width, patch size, heads."""
    found = {}
    if "encoder/cls_token" in shapes:
        found["width"] = shapes["encoder/cls_token"][-1]
    if "encoder/blocks/mlp/fc1/kernel" in shapes:
        layers, _, mlp_width = shapes["encoder/blocks/mlp/fc1/kernel"]
        found |= {"layers": layers, "mlp_width": mlp_width}
    if "encoder/patch_embed/kernel" in shapes:
        found["patch_size"] = shapes["encoder/patch_embed/kernel"][0]
    for name in (SHARED_TABLE, BLOCK_TABLE):
        if name in shapes:
            found["heads"] = shapes[name][-1]
    return found


def _grid(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    for name in (SHARED_TABLE, BLOCK_TABLE):
        if name in shapes:
            return resize.grid_of_table(shapes[name][-2])
    if POSITIONS in shapes:
        return math.isqrt(shapes[POSITIONS][1] - 1)
    return None
