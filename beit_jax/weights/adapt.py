"""Making one model's parameters fit another: fine-tuning from pre-training, other resolutions."""

import math
from collections.abc import Iterable, Mapping

import numpy as np

from beit_jax.weights import resize
from beit_jax.weights.report import Report, WeightsError, allowed, check_names

SHARED_TABLE = "encoder/relative_position_bias/table"
BLOCK_TABLE = "encoder/blocks/attention/relative_position_bias/table"
POSITIONS = "encoder/pos_embed"
# Of these the shape follows the number of classes or tokens.
HEADS = {"lm_head/kernel": "tokens (vocabulary)", "head/kernel": "classes"}


def per_block(params: Mapping[str, np.ndarray], *, layers: int | None = None) -> dict:
    """Copies a shared relative-position table `[t, h]` to every block, `[l, t, h]`.

    Args:
      params: flat, with `SHARED_TABLE`.
      layers: blocks; None: as many as the parameters have.
    """
    rest = {name: array for name, array in params.items() if name != SHARED_TABLE}
    table = params[SHARED_TABLE]
    if layers is None:
        layers = next(a.shape[0] for n, a in params.items() if n.startswith("encoder/blocks/"))
    rest[BLOCK_TABLE] = np.repeat(table[None], layers, axis=0)
    return rest


def resize_to(
    params: Mapping[str, np.ndarray], *, grid: int
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Every table and position for another grid.

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


def adapt(
    params: Mapping[str, np.ndarray],
    wanted: Mapping[str, tuple[int, ...]],
    *,
    source: str,
    allow_missing: Iterable[str] = (),
    allow_unused: Iterable[str] = (),
) -> tuple[dict[str, np.ndarray], Report]:
    """Parameters of one model for another.

    A shared relative-position table becomes per-block copies and tables and positions change their
    resolution where that is wanted. A head with another number of outputs is dropped where its name
    is allowed to be both missing and unused (the official loader drops it silently).

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
    params, reshaped = dict(params), []
    if BLOCK_TABLE in wanted and BLOCK_TABLE not in params and SHARED_TABLE in params:
        params = per_block(params, layers=wanted[BLOCK_TABLE][0])
        reshaped.append(f"{SHARED_TABLE} → {BLOCK_TABLE}, a copy for each block")
    _check_architecture(params, wanted, source=source)
    grid = _grid(wanted)
    if grid is not None:
        try:
            params, resized = resize_to(params, grid=grid)
        except ValueError as error:
            raise WeightsError(f"{source}: {error}") from None
        reshaped += resized

    dropped = []
    for name, what in HEADS.items():
        if name not in params or name not in wanted or params[name].shape == wanted[name]:
            continue
        module = name.removesuffix("/kernel")
        if allowed(name, allow_missing) and allowed(name, allow_unused):
            dropped += [each for each in params if each.startswith(f"{module}/")]
            continue
        raise WeightsError(
            f"{source}: {module} is for {params[name].shape[1]} {what}, needed"
            f" {wanted[name][1]}; to start it anew, allow {module!r} to be missing and unused"
        )
    params = {name: array for name, array in params.items() if name not in dropped}
    missing, unused = check_names(
        wanted,
        {name: array.shape for name, array in params.items()},
        source=source,
        allow_missing=allow_missing,
        allow_unused=allow_unused,
        hint=" (allow what is meant by name: init_allow_missing, init_allow_unused)",
    )
    fitting = {name: params[name] for name in wanted if name in params}
    return fitting, Report(
        used=tuple(fitting),
        missing=tuple(missing),
        unused=(*unused, *dropped),
        reshaped=tuple(reshaped),
    )


def _check_architecture(
    params: Mapping[str, np.ndarray], wanted: Mapping[str, tuple[int, ...]], *, source: str
) -> None:
    """One plain sentence where sizes differ, instead of a hundred shapes."""
    have = {name: array.shape for name, array in params.items()}
    ours, theirs = sizes(wanted), sizes(have)
    different = [
        f"{what} {theirs[what]} instead of {ours[what]}"
        for what in ours
        if what in theirs and ours[what] != theirs[what]
    ]
    if different:
        raise WeightsError(f"{source} has another architecture: {', '.join(different)}")


def sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The sizes that shapes tell: layers, width, MLP width, patch size, heads."""
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
