"""What a masking config hides: sixteen examples, and how often each patch is hidden."""

import argparse
import dataclasses

import numpy as np

from beit_jax import config_file
from beit_jax.config import ConfigError, MaskConfig, check, parse
from beit_jax.data import masking, quiet_import
from beit_jax.drawing.figure import figure
from beit_jax.drawing.heat import heat
from beit_jax.types import Json

SUMMARY = "what a masking config hides; needs no weights"
_EXAMPLES, _ACROSS = 16, 4
_DRAWN = 4096  # masks that the map counts
_SIDE = 14  # pixels of a patch
_HIDDEN, _SHOWN, _LINE = (60, 60, 60), (235, 235, 235), (200, 200, 200)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds --config, or --mask-kind, --count, --ratio and --grid; --seed."""
    defaults = MaskConfig()
    option = parser.add_argument
    option("--config", default="", help="a config file, whose masks are drawn (needs [train])")
    option(
        "--mask-kind",
        dest="mask_kind",
        default="",
        help=f"{', '.join(masking.KINDS)}; default: {defaults.kind}",
    )
    option("--count", type=int, default=None, help=f"patches; default: {defaults.count}")
    option("--ratio", type=float, default=None, help='of "block_paper"')
    option("--grid", type=int, default=0, help="patches along a side; default: 14")
    option("--seed", type=int, default=0)


def draw(options: argparse.Namespace) -> list[tuple[str, np.ndarray]]:
    """One picture, uint8 `[H, W, 3]`: examples in four rows, and the map below them.

    Raises:
      ConfigError: settings that fit no grid, or TensorFlow is not installed.
    """
    config, grid = _settings(options)
    try:
        masking.check_masks(config, grid=grid)
    except ConfigError as error:
        raise ConfigError(f"masks: {error}") from None
    masks = _drawn(config, grid=grid, seed=options.seed)
    examples = [_painted(mask) for mask in masks[:_EXAMPLES]]
    hidden = masks.mean(axis=0)
    shares = masks.mean(axis=(1, 2))
    rows = [examples[i : i + _ACROSS] for i in range(0, _EXAMPLES, _ACROSS)]
    side = grid * _SIDE
    scale = np.linspace(1, 0, side)[:, None].repeat(side // 8, axis=1)
    rows.append([heat(hidden, largest=1.0), heat(scale, largest=1.0)])
    drawn = figure(
        rows,
        title=f"Masks of kind {config.kind}, {grid} by {grid} patches",
        labels=[
            "sixteen examples; hidden patches are dark",
            *[""] * (len(rows) - 2),
            f"how often a patch is hidden, of {_DRAWN:,} masks; the scale runs from 0 to 1",
        ],
        note=f"{shares.mean():.1%} of the patches are hidden on average, {shares.min():.1%} to"
        f" {shares.max():.1%}; a patch in {hidden.min():.1%} to {hidden.max():.1%} of the masks."
        f" Settings: {', '.join(f'{k} {v}' for k, v in dataclasses.asdict(config).items())}.",
        cell=side,
    )
    return [("masks", drawn.pixels)]


def _settings(options: argparse.Namespace) -> tuple[MaskConfig, int]:
    """The masks and the grid of a config file, or of the options."""
    values: dict[str, Json] = {}
    grid = 14
    if options.config:
        whole = config_file.load([f"--config={options.config}"]).values
        # The quickstart's pre-training is a section of its config.
        found = whole if "data" in whole else whole.get("pretrain", {})
        mask, model = found.get("data", {}).get("mask"), found.get("model")
        if mask is None or model is None:
            raise ConfigError("--config: it has no masks")
        values, grid = dict(mask), model["image_size"] // model["patch_size"]
    given = {"kind": options.mask_kind or None, "count": options.count, "ratio": options.ratio}
    values |= {name: value for name, value in given.items() if value is not None}
    check(options.grid >= 0, "--grid", "must not be negative")
    return parse(MaskConfig, values), options.grid or grid


def _drawn(config: MaskConfig, *, grid: int, seed: int) -> np.ndarray:
    """Masks as training draws them: bool `[n, grid, grid]`."""
    quiet_import.tensorflow()
    try:
        import tensorflow as tf
    except ModuleNotFoundError:
        raise ConfigError(
            "masks: needs tensorflow, which is not installed: pip install 'beit-jax[train]'"
        ) from None
    keys = np.stack([np.full(_DRAWN, seed), np.zeros(_DRAWN, int), np.arange(_DRAWN)], axis=1)
    draw_all = tf.function(lambda k: masking.draw_masks(k, config=config, grid=grid))
    return draw_all(tf.constant(keys, tf.int64)).numpy()


def _painted(mask: np.ndarray) -> np.ndarray:
    """A mask as squares with thin lines between them."""
    cells = np.where(mask[..., None], np.asarray(_HIDDEN), np.asarray(_SHOWN)).astype(np.uint8)
    pixels = cells.repeat(_SIDE, axis=0).repeat(_SIDE, axis=1)
    pixels[::_SIDE], pixels[:, ::_SIDE] = _LINE, _LINE
    return pixels
