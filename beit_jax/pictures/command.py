"""The command line: `python -m beit_jax.pictures KIND ... --output=FOLDER`."""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from types import ModuleType

import numpy as np

from beit_jax.config import check
from beit_jax.drawing.figure import montage
from beit_jax.drawing.sheets import save_png
from beit_jax.features.command import add_checkpoint_options, checkpoint_facts, reporting
from beit_jax.pictures import (
    attention,
    augment,
    bounds,
    focus,
    masks,
    reconstruct,
    segments,
    tokens,
)
from beit_jax.pretrained import load_encoder

# A module has SUMMARY, add_options(parser) and draw(encoder, options) -> [(name, picture)].
KINDS: dict[str, ModuleType] = {"attention": attention, "segments": segments}
# Those without an encoder: draw(options) -> [(name, picture)].
PLAIN: dict[str, ModuleType] = {
    "reconstruct": reconstruct,
    "tokens": tokens,
    "masks": masks,
    "augment": augment,
}
_OUTPUT = "a folder for the PNG files, or one file that ends in .png: all in one"
FOCUS = "focus"  # the kind that gives numbers instead of a picture


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(
        prog="python -m beit_jax.pictures",
        description="Draws what a model sees, as PNG files; needs no display.",
    )
    kinds = command.add_subparsers(dest="kind", required=True, metavar="KIND")
    for name, module in (KINDS | PLAIN).items():
        kind = kinds.add_parser(name, help=module.SUMMARY, description=module.__doc__)
        module.add_options(kind)
        kind.add_argument("--output", required=True, metavar="PATH", help=_OUTPUT)
        if name in PLAIN:
            continue
        kind.add_argument(
            "--weights", required=True, metavar="W", help="whatever the library loads"
        )
        kind.add_argument(
            "--image-size", type=int, default=0, help="pixels (default: the checkpoint's)"
        )
        add_checkpoint_options(kind)
    measure = kinds.add_parser(FOCUS, help=focus.SUMMARY, description=focus.__doc__)
    focus.add_options(measure)
    return command


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit code, as `features.command.reporting` says."""
    options = parsed(arguments)
    if options.kind == FOCUS:
        return reporting(lambda: focus.measure(options), interrupted="nothing was written")
    return reporting(lambda: draw(options), interrupted="some pictures may be missing")


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's options; `overrides` are the `--config.key=value` among the arguments."""
    given = sys.argv[1:] if arguments is None else arguments
    overrides = [each for each in given if each.startswith("--config.")]
    whole = parser()
    options = whole.parse_args([each for each in given if not each.startswith("--config.")])
    if overrides and not getattr(options, "config", ""):
        whole.error(f"{overrides[0]}: there is no --config=FILE whose setting this could be")
    options.overrides = overrides
    return options


def draw(options: argparse.Namespace) -> list[str]:
    """Draws and writes the pictures; returns their paths.

    Raises:
      ConfigError: something does not fit.
    """
    bounds.check_options(options)
    one_file = options.output.lower().endswith(".png")
    if one_file:
        check(not os.path.isdir(options.output), "--output", f"{options.output} is a folder")
    else:
        check(
            not os.path.exists(options.output) or os.path.isdir(options.output),
            "--output",
            f"{options.output} is no folder",
        )
    if options.kind in PLAIN:
        pictures = PLAIN[options.kind].draw(options)
    else:
        with bounds.naming("--weights", options.weights):
            encoder = load_encoder(
                options.weights,
                image_size=options.image_size or None,
                **checkpoint_facts(options),
            )
        pictures = KINDS[options.kind].draw(encoder, options)
    if one_file:
        os.makedirs(os.path.dirname(options.output) or ".", exist_ok=True)
        save_png(options.output, montage([picture for _, picture in pictures]))
        print(f"wrote {options.output}", file=sys.stderr)
        return [options.output]
    return _saved(pictures, options=options)


def _saved(pictures: Sequence[tuple[str, np.ndarray]], *, options: argparse.Namespace) -> list[str]:
    """Writes each picture into the folder `options.output`; returns their paths."""
    os.makedirs(options.output, exist_ok=True)
    paths = []
    for number, (name, picture) in enumerate(pictures, start=1):
        # Two images of different folders may have one name.
        plain = re.sub(r"[^\w-]+", "_", os.path.splitext(name)[0])[:60]
        stem = plain if plain == options.kind else f"{options.kind}_{number:02d}_{plain}"
        path = os.path.join(options.output, f"{stem}.png")
        save_png(path, picture)
        paths.append(path)
    print(f"wrote {len(paths)} PNG to {options.output}", file=sys.stderr)
    return paths
