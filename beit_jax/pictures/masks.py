"""What a masking config hides: sixteen examples, and how often each patch is hidden."""

import argparse
import dataclasses
from collections.abc import Mapping

import numpy as np

from beit_jax.config import ConfigError, MaskConfig, check, parse
from beit_jax.data import masking, quiet_import
from beit_jax.drawing.figure import figure
from beit_jax.drawing.heat import heat, scale
from beit_jax.pictures import inputs
from beit_jax.types import Json

SUMMARY = "what a masking config hides; needs no weights"
_DEFAULT = MaskConfig()  # the official masks
_OFFICIAL_PATCHES = 14 * 14
_EXAMPLES, _ACROSS = 16, 4
_DRAWN, _LEAST_DRAWN = 4096, 64  # masks that the map counts; fewer of large grids, which are slow
_SIDE = 14  # pixels of a patch
_HIDDEN, _SHOWN, _LINE = (60, 60, 60), (235, 235, 235), (200, 200, 200)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds --config; --grid and the options of `add_mask_options`."""
    inputs.add_config(parser, "whose masks are drawn")
    add_mask_options(parser)
    parser.add_argument("--grid", type=int, default=0, help="patches along a side; default: 14")


def add_mask_options(parser: argparse.ArgumentParser) -> None:
    """Adds --mask-kind, --mask-count, --mask-ratio and --seed."""
    option = parser.add_argument
    option("--mask-kind", default="", help=f"{', '.join(masking.KINDS)} (default: {_DEFAULT.kind})")
    option("--mask-count", type=int, default=None, metavar="N", help="patches to hide")
    option(
        "--mask-ratio", type=float, default=None, metavar="R", help="the same as a share, 0 to 1"
    )
    option("--seed", type=int, default=0)


def draw(options: argparse.Namespace) -> list[tuple[str, np.ndarray]]:
    """One picture, uint8 `[H, W, 3]`: examples in four rows, and the map below them.

    Raises:
      ConfigError: settings that fit no grid, or TensorFlow is not installed.
    """
    config, grid = _of_options(options)
    drawn_masks = max(_LEAST_DRAWN, min(_DRAWN, _DRAWN * _OFFICIAL_PATCHES // grid**2))
    masks = draw_masks(config, count=drawn_masks, grid=grid, seed=options.seed)
    examples = [_painted(mask) for mask in masks[:_EXAMPLES]]
    hidden = masks.mean(axis=0)
    shares = masks.mean(axis=(1, 2))
    rows = [examples[i : i + _ACROSS] for i in range(0, _EXAMPLES, _ACROSS)]
    side = grid * _SIDE
    drawn = figure(
        [*rows, [heat(hidden, largest=1.0)]],
        title=f"Masks of {grid} by {grid} patches: {described(config)}",
        labels=[
            "sixteen examples; hidden patches are dark",
            *[""] * (len(rows) - 1),
            f"how often a patch is hidden, of {drawn_masks:,} masks",
        ],
        legend=scale("never", "always"),
        note=f"{shares.mean():.1%} of the patches are hidden on average, {shares.min():.1%} to"
        f" {shares.max():.1%}; a patch in {hidden.min():.1%} to {hidden.max():.1%} of the masks.",
        cell=side,
    )
    return [("masks", drawn.pixels)]


def mask_config(
    options: argparse.Namespace, *, grid: int, values: Mapping[str, Json] | None = None
) -> MaskConfig:
    """The masks that the options ask for.

    Args:
      options: of `add_mask_options`.
      grid: patches along a side.
      values: what holds where the options say nothing, such as a run's; None: the official masks,
        scaled to the grid.

    Raises:
      ConfigError: settings that fit no grid, or not this one; one line.
    """
    patches = grid * grid
    if values is None:
        scale = patches / _OFFICIAL_PATCHES
        least = max(1, min(_DEFAULT.min_block, round(_DEFAULT.min_block * scale)))
        values = {"count": round(_DEFAULT.count * scale), "min_block": least}
    chosen = dict(values)
    if options.mask_kind:
        chosen["kind"] = options.mask_kind
    if options.mask_ratio is not None:
        ratio = options.mask_ratio
        check(0 < ratio < 1, "--mask-ratio", f"{ratio}; must be above 0 and below 1")
        check(options.mask_count is None, "--mask-ratio", "--mask-count says how many already")
        chosen |= {"ratio": ratio, "count": max(1, round(ratio * patches))}
    if options.mask_count is not None:
        count = options.mask_count
        check(1 <= count < patches, "--mask-count", f"{count}; must be 1 to {patches - 1}")
        share = min(max(count / patches, 0.001), 0.999)
        chosen |= {"count": count, "ratio": share}
    try:
        config = parse(MaskConfig, chosen)
        masking.check_masks(config, grid=grid)
    except ConfigError as error:
        raise ConfigError(f"masks: {error}") from None
    return config


def draw_masks(config: MaskConfig, *, count: int, grid: int, seed: int) -> np.ndarray:
    """Masks as training draws them: bool `[count, grid, grid]`.

    Raises:
      ConfigError: TensorFlow is not installed.
    """
    quiet_import.tensorflow()
    try:
        import tensorflow as tf
    except ModuleNotFoundError:
        raise ConfigError(
            "masks: needs tensorflow, which is not installed: pip install 'beit-jax[train]'"
        ) from None
    keys = np.stack([np.full(count, seed), np.zeros(count, int), np.arange(count)], axis=1)
    draw_all = tf.function(lambda k: masking.draw_masks(k, config=config, grid=grid))
    return draw_all(tf.constant(keys, tf.int64)).numpy()


def described(config: MaskConfig) -> str:
    """The settings that masks of this kind depend on, as a person reads them."""
    said = [f"kind {config.kind}"]
    if config.kind == "block_paper":
        said.append(f"more than {config.ratio:.0%} hidden")
    else:
        said.append(f"{'at most ' if config.kind == 'block' else ''}{config.count} patches hidden")
    if config.kind.startswith("block"):
        most = "" if config.max_block is None else f" to {config.max_block}"
        said.append(f"blocks of {config.min_block}{most or ' or more'} patches")
        said.append(f"aspect {config.min_aspect:g} to {1 / config.min_aspect:.3g}")
    return ", ".join(said)


def _of_options(options: argparse.Namespace) -> tuple[MaskConfig, int]:
    """The masks and the grid of a config file, or of the options."""
    values: Mapping[str, Json] | None = None
    grid = 14
    if options.config:
        _, job = inputs.config_of(options)
        mask, model = getattr(job.data, "mask", None), getattr(job, "model", None)
        if mask is None or model is None:
            raise ConfigError("--config: it has no masks")
        values, grid = dataclasses.asdict(mask), model.image_size // model.patch_size
    check(options.grid >= 0, "--grid", "must not be negative")
    grid = options.grid or grid
    return mask_config(options, grid=grid, values=values), grid


def _painted(mask: np.ndarray) -> np.ndarray:
    """A mask as squares with thin lines between them."""
    cells = np.where(mask[..., None], np.asarray(_HIDDEN), np.asarray(_SHOWN)).astype(np.uint8)
    pixels = cells.repeat(_SIDE, axis=0).repeat(_SIDE, axis=1)
    pixels[::_SIDE], pixels[:, ::_SIDE] = _LINE, _LINE
    return pixels
