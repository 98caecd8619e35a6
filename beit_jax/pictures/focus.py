"""`python -m beit_jax.pictures focus SOURCE --weights=W`: does attention separate objects?

A number beside the attention pictures: the lift of `evaluation/attention_focus.py`, for every
block, of images with label maps. Two figures to compare it with come along: the same maps with the
attention of another image (what looking near would give by itself), and random weights of the same
sizes.
"""

import argparse
import dataclasses
import json
import os
import re
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from PIL import Image

from beit_jax.config import ConfigError, check
from beit_jax.config.segment import IGNORE, SegmentDataConfig
from beit_jax.data import quiet_import
from beit_jax.evaluation.attention_focus import class_shares, mean_and_error, patch_classes
from beit_jax.features.command import add_checkpoint_options, checkpoint_facts
from beit_jax.files import write_whole
from beit_jax.pictures import bounds
from beit_jax.pretrained import PretrainedEncoder, load_encoder
from beit_jax.progress import Progress
from beit_jax.text_table import text_table
from beit_jax.types import JsonObject

# What the lift is compared with, and how each is called in the report.
TRAINED, ANOTHER, RANDOM = "trained", "another image's", "random weights"


SUMMARY = "measure how much of the attention stays within an object's class"


def add_options(command: argparse.ArgumentParser) -> None:
    """Adds the options of this command."""
    option = command.add_argument
    option("source", metavar="SOURCE", help="embedded, pairs:FOLDER or pairs:IMAGES,LABELS")
    option("--weights", required=True, metavar="W", help="whatever the library loads")
    option(
        "--count", type=int, default=200, metavar="N", help="images, evenly spread (default: 200)"
    )
    option("--batch-size", type=int, default=20, metavar="N", help="default: 20")
    option(
        "--background",
        type=int,
        nargs="*",
        default=None,
        metavar="LABEL",
        help="labels that are no objects (default: 0 of the embedded set, none of others)",
    )
    option("--ignore-label", type=int, default=IGNORE, metavar="LABEL", help=f"default: {IGNORE}")
    option("--seed", type=int, default=0, help="of the random weights (default: 0)")
    option("--output", default="", metavar="FILE", help="writes the figures as JSON, too")
    add_checkpoint_options(command)


def measure(options: argparse.Namespace) -> JsonObject:
    """Measures, prints a table and writes `options.output`.

    Returns:
      "blocks": for every block, and each of `TRAINED`, `ANOTHER` and `RANDOM`: "lift" and
      "error", its mean over images and standard error; "attention" and "area", the two shares;
      "images", how many had a patch to ask.

    Raises:
      ConfigError: something does not fit.
    """
    _check(options)
    with bounds.naming("--weights", options.weights):
        encoder = load_encoder(
            options.weights,
            **checkpoint_facts(options),
        )
    random = dataclasses.replace(encoder, params=encoder.init(jax.random.key(options.seed)))
    background = options.background
    if background is None:
        background = [0] if options.source.startswith("embedded") else []
    images, labels = labelled_images(
        options.source, count=options.count, size=encoder.image_size, ignore=options.ignore_label
    )
    classes = patch_classes(labels, grid=encoder.grid, ignore=options.ignore_label)
    found = {
        name: shares_by_block(
            model,
            seen,
            classes,
            background=background,
            batch_size=min(options.batch_size, len(images)),
        )
        for name, model, seen in (
            (TRAINED, encoder, images),
            # From the other half of the set: neighbours may be frames of one video.
            (ANOTHER, encoder, np.roll(images, len(images) // 2, axis=0)),
            (RANDOM, random, images),
        )
    }
    blocks: JsonObject = {
        str(block): {name: _figures(*shares[block - 1]) for name, shares in found.items()}
        for block in range(1, encoder.config.layers + 1)
    }
    report: JsonObject = {
        "source": options.source,
        "weights": options.weights,
        "images": len(images),
        "background": background,
        "blocks": blocks,
    }
    _print(found)
    if options.output:
        write_whole(options.output, json.dumps(report, indent=2).encode())
    return report


def _check(options: argparse.Namespace) -> None:
    """Refuses options that could not work, before anything is loaded."""
    if options.output:
        bounds.check_options(options, makes_folder=False)
        check(not os.path.isdir(options.output), "--output", f"{options.output} is a folder")
    else:
        bounds.check_numbers(options)
    check(options.count >= 2, "--count", f"{options.count}; must be at least 2")
    check(options.batch_size >= 1, "--batch-size", f"{options.batch_size}; must be at least 1")


def labelled_images(
    source: str, *, count: int, size: int, ignore: int
) -> tuple[np.ndarray, np.ndarray]:
    """Images with label maps, evenly spread over a set; the square in the middle of each.

    Args:
      source: as `config.data.source`; of the embedded set those that no training sees.
      count: at most so many.
      size: s, to which the squares are resized.
      ignore: the label that is no class.

    Returns:
      Images, uint8 `[b, s, s, 3]`, and labels as they are stored, uint8 `[b, s, s]`.

    Raises:
      ConfigError: there is no such set, it has no label maps or fewer than two usable images, or
        TensorFlow is not installed.
    """
    quiet_import.tensorflow()
    try:
        import tensorflow as tf

        from beit_jax.data.label_maps import sample
        from beit_jax.data.sources import open_source
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"SOURCE: needs {error.name}, which is not installed: pip install 'beit-jax[train]'"
        ) from None
    embedded = source.startswith("embedded")
    try:
        config = SegmentDataConfig(
            source=source,
            eval_source="" if embedded else source,
            holdout=count,
            image_size=size,
            ignore_label=ignore,
        )
        opened = open_source(config, training=False)
    except ConfigError as error:
        # The user gave no config: its keys' names would say nothing.
        said = re.sub(r"^(config\.)?(data\.)?(eval_)?source: ", "", str(error))
        raise ConfigError(f"SOURCE: {said}") from None
    check("segmentation" in opened.fields, "SOURCE", f"{source} has no label maps")
    found: list[tuple[np.ndarray, np.ndarray]] = []
    progress = Progress(min(count, len(opened)))
    for _, request in sample(opened, count=min(count, len(opened))):
        try:
            loaded = opened.load(request)
        except tf.errors.OpError:
            continue  # the data command names such files; here one image less does no harm
        image, label = (loaded[name].numpy() for name in ("image", "segmentation"))
        if image.shape[:2] == label.shape:
            found.append(_middle(image, label, size=size))
            progress.update(len(found))
    progress.finish()
    check(len(found) >= 2, "SOURCE", f"{source} has {len(found)} usable images, 2 are needed")
    images, labels = zip(*found, strict=True)
    return np.stack(images), np.stack(labels)


def _middle(image: np.ndarray, labels: np.ndarray, *, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The largest square in the middle, resized; labels are never mixed."""
    height, width = labels.shape
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    box = (left, top, left + side, top + side)
    resized = [
        Image.fromarray(picture).resize((size, size), how, box=box)
        for picture, how in (
            (image, Image.Resampling.BICUBIC),
            (labels, Image.Resampling.NEAREST),
        )
    ]
    return np.asarray(resized[0]), np.asarray(resized[1])


def shares_by_block(
    encoder: PretrainedEncoder,
    images: np.ndarray,
    classes: np.ndarray,
    *,
    background: Sequence[int],
    batch_size: int,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The shares of attention and of area of every image, by block; heads are averaged.

    Args:
      encoder: whose attention is measured.
      images: uint8 `[b, s, s, 3]`.
      classes: int `[b, grid, grid]`, as `patch_classes` returns them.
      background: classes that don't ask.
      batch_size: images at once.

    Returns:
      For each block `(attention, area)`, float64 `[b]` each, as `class_shares` has them.
    """
    blocks = tuple(range(1, encoder.config.layers + 1))
    parts: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in blocks]
    progress = Progress(len(images))
    for start, batch in _batches(images, batch_size=batch_size):
        weights = np.asarray(encoder.attention(batch, blocks).mean(axis=2))
        mine = classes[start : start + batch_size]
        for part, block in zip(parts, weights, strict=True):
            shares = class_shares(block[: len(mine)], mine, background=background)
            part.append((shares.attention, shares.area))
        progress.update(start + len(mine))
    progress.finish()
    return [
        (np.concatenate([each[0] for each in part]), np.concatenate([each[1] for each in part]))
        for part in parts
    ]


def _batches(images: np.ndarray, *, batch_size: int) -> Iterator[tuple[int, np.ndarray]]:
    """Where each batch begins, and its images; the last is filled up from the set's beginning."""
    for start in range(0, len(images), batch_size):
        chosen = np.arange(start, start + batch_size) % len(images)
        yield start, images[chosen]


def _figures(attention: np.ndarray, area: np.ndarray) -> JsonObject:
    lift, error, images = mean_and_error(attention / area)
    return {
        "lift": lift if images else None,
        "error": error if images > 1 else None,
        "attention": float(np.nanmean(attention)) if images else None,
        "area": float(np.nanmean(area)) if images else None,
        "images": images,
    }


def _print(found: dict[str, list[tuple[np.ndarray, np.ndarray]]]) -> None:
    rows = []
    for block, each in enumerate(zip(*found.values(), strict=True), start=1):
        figures = [mean_and_error(attention / area) for attention, area in each]
        rows.append([str(block), *(f"{mean:.3f} ± {error:.3f}" for mean, error, _ in figures)])
    print("lift of attention within the query's class, mean over images ± standard error")
    print(text_table(rows, header=["block", *found], align="r" * 4))
