"""What pre-training makes of its images: the model's view with its hidden patches, the tokenizer's.

Training images of a config as they are augmented and masked by its settings. Both views show the
same part of the image, mirrored and coloured alike; they differ in size and in how it is resized.
"""

import argparse
import dataclasses
import os

import jax.numpy as jnp
import numpy as np

from beit_jax.config import DataConfig, check
from beit_jax.data import quiet_import
from beit_jax.drawing.figure import figure, shown_side
from beit_jax.drawing.sheets import hide_patches
from beit_jax.files import printable
from beit_jax.pictures import inputs
from beit_jax.pictures.masks import described
from beit_jax.training import device_jitter
from beit_jax.types import HostBatch

SUMMARY = "the two views that a config's pre-training makes of its images"

_MOST = 1000  # images are one batch, and rows of one picture


def add_options(command: argparse.ArgumentParser) -> None:
    """Adds the options of this picture."""
    inputs.add_config(command, "whose training images are shown")
    command.add_argument("--count", type=int, default=6, metavar="N", help="images (default: 6)")
    command.add_argument("--seed", type=int, default=None, help="default: the run's")


def draw(options: argparse.Namespace) -> list[tuple[str, np.ndarray]]:
    """One picture, named "augment", with a row for each image: uint8 `[H, W, 3]`.

    Raises:
      ConfigError: the config does not pre-train, or its images can't be read.
    """
    check(1 <= options.count <= _MOST, "--count", f"{options.count}; must be 1 to {_MOST}")
    _, job = inputs.config_of(options)
    check(
        isinstance(job.data, DataConfig) and getattr(job, "model", None) is not None,
        "--config",
        f"its task is {job.task!r}, which makes no two views; take one that pre-trains",
    )
    seed = job.run.seed if options.seed is None else options.seed
    batch, names, originals = training_batch(
        job.data, grid=job.model.image_size // job.model.patch_size, seed=seed, count=options.count
    )
    return [("augment", augment_picture(batch, names=names, originals=originals, config=job.data))]


def training_batch(
    config: DataConfig, *, grid: int, seed: int, count: int
) -> tuple[HostBatch, list[str], list[np.ndarray]]:
    """Training images as the model is given them, jitter included.

    Args:
      config: the data.
      grid: patches along a side.
      seed: of order, views and masks.
      count: b, or as many as there are.

    Returns:
      The batch: `image`, uint8 `[b, s, s, 3]`, `token_image`, uint8 or float32 0..255
      `[b, t, t, 3]`, and `mask`, bool `[b, grid, grid]`; what a person calls each image; and the
      images themselves, uint8 `[h, w, 3]`, none where the source can't be read twice.
    """
    quiet_import.tensorflow()
    import tensorflow as tf

    from beit_jax.data import pipeline, views
    from beit_jax.data.sources import open_source

    source = open_source(dataclasses.replace(config, service=()), training=True)
    batches = pipeline.training_batches(
        source,
        config=config,
        views=views.pretraining_views(config, grid=grid, keys=("image", "token_image", "mask")),
        seed=seed,
        batch_size=min(count, len(source)),
        cycle=0,
    )
    drawn = next(batches)
    index = [int(each) for each in drawn["index"]]
    names = [printable(os.path.basename(source.name(each))) for each in index]
    if config.source.startswith(inputs.EMBEDDED):
        names = [f"training image {each}" for each in index]
    names = [
        f"{name}, replaced: it can't be read" if replaced else name
        for name, replaced in zip(names, drawn["replaced"], strict=True)
    ]
    originals = []
    if source.sequence is None and not drawn["replaced"].any():
        originals = [source.load(tf.constant(each, tf.int64))["image"].numpy() for each in index]
    arrays = {name: jnp.asarray(drawn[name]) for name in drawn if name in _VIEWS}
    return (
        {name: np.asarray(each) for name, each in device_jitter.jitter_batch(arrays).items()},
        names,
        originals,
    )


# What a batch may have of the views; the last two are the fast mode's.
_VIEWS = ("image", "token_image", "mask", "factors", "order")


def augment_picture(
    batch: HostBatch, *, names: list[str], originals: list[np.ndarray], config: DataConfig
) -> np.ndarray:
    """Draws the rows: uint8 `[H, W, 3]`; the arguments are what `training_batch` returns."""
    image = batch["image"]
    second = np.clip(np.rint(batch["token_image"]), 0, 255).astype(np.uint8)
    columns: dict[str, list[np.ndarray]] = {"image": originals} if originals else {}
    columns |= {
        f"model's view, {image.shape[1]} px": list(image),
        "hidden patches": list(hide_patches(image, batch["mask"])),
        f"tokenizer's view, {second.shape[1]} px": list(second),
    }
    augment = config.augment
    return figure(
        list(zip(*columns.values(), strict=True)),
        title="What pre-training makes of its images",
        columns=list(columns),
        labels=names,
        note=f"Crops of {augment.min_crop_scale:.0%} to {augment.max_crop_scale:.0%} of the image,"
        f" {'mirrored or not' if augment.flip else 'never mirrored'}; brightness ±"
        f"{augment.brightness:g}, contrast ±{augment.contrast:g}, saturation"
        f" ±{augment.saturation:g}, the same in both views. Masks: {described(config.mask)}.",
        cell=shown_side(image.shape[1]),
    ).pixels
