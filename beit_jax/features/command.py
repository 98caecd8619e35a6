"""The command line and the run: list, load, embed batch after batch, write."""

import argparse
import contextlib
import dataclasses
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

import beit_jax
from beit_jax import storage
from beit_jax.config import ConfigError, check, to_dict
from beit_jax.evaluation.features import on_host
from beit_jax.features.images import RESIZES, SUFFIXES, find_images, read_images
from beit_jax.features.output import FORMATS, check_output, open_output
from beit_jax.files import printable
from beit_jax.preprocessing import NORMALIZATIONS
from beit_jax.pretrained import EncoderOutput, PretrainedEncoder, load_encoder
from beit_jax.progress import Progress
from beit_jax.training import sharding
from beit_jax.types import Json, JsonObject, Params
from beit_jax.verbosity import verbosity

POOLS = ("cls", "mean", "patches")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """What is computed, of which images, by which weights.

    Attributes:
      images: a folder.
      weights: whatever `load_encoder` takes.
      output: the `.npz` or `.parquet` file to write.
      pool: "cls", the class token; "mean", the average of the patch tokens; or "patches", all of
        them where they are in the image.
      block: whose raw output is taken, numbered from 1; 0: the encoder's output, after the final
        norm where the checkpoint has one.
      batch_size: images computed at once.
      image_size: side of the images in pixels, to which positions are resized; 0: the checkpoint's.
      resize: "crop" or "squash", see `images.read_image`.
      dtype: of the stored features, "float32" or "float16".
      threads: that decode images.
      normalization: of the pixels, where the format doesn't say; "": what the checkpoint says.
      heads: attention heads, where the format doesn't say; 0: what it says, or width / 64.
      epsilon: of the LayerNorms, in place of what the checkpoint says.
      which: of a training checkpoint's weights, "ema" or "model"; "": see `load_encoder`.
    """

    images: str
    weights: str
    output: str
    pool: str = "cls"
    block: int = 0
    batch_size: int = 64
    image_size: int = 0
    resize: str = "crop"
    dtype: str = "float32"
    threads: int = 0
    normalization: str = ""
    heads: int = 0
    epsilon: float | None = None
    which: str = ""

    def __post_init__(self) -> None:
        check(self.block >= 0, "--block", f"{self.block}; blocks are numbered from 1")
        check(self.batch_size >= 1, "--batch-size", "must be at least 1")
        check(self.image_size >= 0, "--image-size", "must not be negative")
        check(self.threads >= 0, "--threads", "must not be negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Embedded:
    """Which images were written.

    Attributes:
      rows: images in the output.
      unreadable: names of the others.
    """

    rows: int
    unreadable: list[str]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(
        prog="python -m beit_jax.features",
        description="Writes the features of a folder of images, one row for each readable image.",
        epilog="example:\n  python -m beit_jax.features photos --weights=runs/base"
        " --output=features.npz\n\n"
        'In Python: numpy.load("features.npz") has "features", "names" and "metadata" (JSON).',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = command.add_argument
    option("images", help=f"folder of images at any depth: {', '.join(SUFFIXES)}")
    option(
        "--weights",
        required=True,
        help="a run's directory, a checkpoint, a Hugging Face folder, .safetensors of timm, .pth of"
        " unilm, or hf:OWNER/NAME",
    )
    option("--output", required=True, help=f"file to write, {' or '.join(FORMATS)}")
    option(
        "--pool",
        choices=POOLS,
        default="cls",
        help="class token (default), average of the patch tokens, or all patch tokens",
    )
    option(
        "--block",
        type=int,
        default=0,
        metavar="N",
        help="take the raw output of block N, counted from 1 (default: the encoder's output, after"
        " the final norm where the checkpoint has one)",
    )
    _input_options(command)
    return command


def _input_options(command: argparse.ArgumentParser) -> None:
    """Options of how images come in and numbers go out."""
    option = command.add_argument
    option("--batch-size", type=int, default=64, metavar="N", help="default: 64")
    option(
        "--image-size",
        type=int,
        default=0,
        metavar="PIXELS",
        help="default: the checkpoint's; for another, positions are interpolated",
    )
    option(
        "--resize",
        choices=RESIZES,
        default="crop",
        help="crop (default): resize the shorter side, cut out the centre; squash: resize both"
        " sides, whatever the shape",
    )
    option(
        "--dtype",
        choices=("float32", "float16"),
        default="float32",
        help="of the numbers in the file (default: float32)",
    )
    option("--threads", type=int, default=0, metavar="N", help="decode images; default: by CPUs")
    option(
        "--normalization",
        choices=tuple(NORMALIZATIONS),
        default="",
        help="of the pixels, where the checkpoint's format doesn't say (default: half)",
    )
    add_checkpoint_options(command)


def add_checkpoint_options(command: argparse.ArgumentParser) -> None:
    """Adds what a checkpoint may not say, or says otherwise: --heads, --epsilon, --which."""
    option = command.add_argument
    option(
        "--heads",
        type=int,
        default=0,
        help="attention heads, where the format doesn't say (default: width / 64)",
    )
    option(
        "--epsilon",
        type=float,
        default=None,
        help="of the LayerNorms, in place of what the checkpoint says",
    )
    option(
        "--which",
        choices=("ema", "model"),
        default="",
        help="of a training checkpoint with an average beside the model (default: a foreign file's"
        " average, a run's model)",
    )


def checkpoint_facts(options: argparse.Namespace) -> dict[str, Json]:
    """What the options of `add_checkpoint_options` say, as the loaders' arguments."""
    return {
        "heads": options.heads,
        "layer_norm_epsilon": options.epsilon,
        "weights": options.which,
    }


def main(arguments: list[str] | None = None) -> int:
    """Runs the command.

    Args:
      arguments: of the command line; None: the process's own.

    Returns:
      0; 2 where something does not fit or no image could be read, 74 where a disk is full or can't
      be used, with one line on stderr.
    """
    options = parser().parse_args(arguments)
    return reporting(
        lambda: embed_folder(FeaturesConfig(**vars(options))), interrupted="nothing was written"
    )


def reporting(run: Callable[[], object], *, interrupted: str) -> int:
    """Runs a command and says in one line on stderr what went wrong.

    Args:
      run: the command.
      interrupted: what is said of its output where the user interrupts it.

    Returns:
      The exit code: 0; 2 where something does not fit, 74 where a disk is full or can't be used.
    """
    try:
        with _few_warnings():
            run()
    except ConfigError as error:
        # The loader's messages name the flag of the conversion command.
        said = re.sub(r"--weights (ema|model)\b", r"--which=\1", str(error))
        print(f"error: {said}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; {interrupted}", file=sys.stderr)
        return 130
    except Exception as error:
        code = storage.failed(error)
        if code is None and not isinstance(error, OSError):
            raise
        if code is None:
            print(f"error: {error}", file=sys.stderr)
        return code or 2
    return 0


def embed_folder(config: FeaturesConfig) -> Embedded:
    """Writes the features of a folder's images and reports on stderr.

    Raises:
      ConfigError: something does not fit, before any image is read; or none can be read.
    """
    check_output(config.output)
    check(os.path.isdir(config.images), "IMAGES", f"there is no folder {config.images}")
    found = find_images(config.images)
    check(
        bool(found.names),
        "IMAGES",
        f"no images in {config.images} at any depth; looked for {', '.join(SUFFIXES)}",
    )
    encoder = load_encoder(
        config.weights,
        image_size=config.image_size or None,
        normalization=config.normalization,
        heads=config.heads,
        layer_norm_epsilon=config.epsilon,
        weights=config.which,
    )
    layers = encoder.config.layers
    check(config.block <= layers, "--block", f"{config.block}; the encoder has {layers} blocks")
    _say(
        f"{len(found.names)} images"
        + (f" ({found.others} other files left out)" if found.others else "")
        + f", {encoder.image_size} × {encoder.image_size} pixels, {encoder.normalization!r}"
    )
    batch_size = min(config.batch_size, len(found.names))
    compute = feature_function(encoder, pool=config.pool, block=config.block, batch=batch_size)
    images = read_images(
        config.images,
        found.names,
        size=encoder.image_size,
        resize=config.resize,
        threads=config.threads or min(16, os.cpu_count() or 1),
    )
    shape = {"patches": (encoder.grid, encoder.grid, encoder.width)}
    began = time.perf_counter()
    with (
        contextlib.closing(images),  # stops the threads where something goes wrong
        open_output(
            config.output, shape=shape.get(config.pool, (encoder.width,)), dtype=config.dtype
        ) as output,
    ):
        done = _embed(
            images,
            compute,
            add=output.add,
            batch_size=batch_size,
            dtype=config.dtype,
            progress=Progress(len(found.names)),
        )
        check(done.rows > 0, "IMAGES", f"none of {len(found.names)} images could be read")
        output.finish(_metadata(config, encoder, unreadable=done.unreadable))
    if done.unreadable:
        _say(f"warning: {len(done.unreadable)} of {len(found.names)} images could not be read")
    _say(f"wrote {done.rows} rows to {config.output} in {time.perf_counter() - began:.1f} s")
    return done


def feature_function(
    encoder: PretrainedEncoder, *, pool: str, block: int, batch: int
) -> Callable[[np.ndarray], np.ndarray]:
    """Compiles the encoder and the pooling for batches of one size, on all devices that it fits.

    Args:
      encoder: loaded.
      pool: a row of `POOLS`.
      block: from 1; 0: the encoder's output.
      batch: images; they are split over as many devices as divide them.

    Returns:
      `images -> features`: uint8 `[batch, s, s, 3]` to float32 `[batch, d]`, or
      `[batch, grid, grid, d]` of "patches".
    """

    def compute(params: Params, images: jax.Array) -> jax.Array:
        pixels = encoder.normalize(images)
        if block:
            (out,) = encoder.apply_blocks(params, pixels, (block,))
        else:
            out = encoder.apply(params, pixels)
        return _pooled(out, pool=pool)

    count = math.gcd(batch, jax.local_device_count())
    mesh = sharding.make_mesh(fsdp=1, devices=jax.local_devices()[:count])
    extract = on_host(compute, encoder.params, mesh=mesh)
    return lambda images: extract({"image": images})


def _pooled(out: EncoderOutput, *, pool: str) -> jax.Array:
    if pool == "cls":
        return out.cls.astype(jnp.float32)
    patches = out.patches.astype(jnp.float32)
    return patches.mean(axis=(1, 2)) if pool == "mean" else patches


def _embed(
    images: Iterable[tuple[str, np.ndarray | str]],
    compute: Callable[[np.ndarray], np.ndarray],
    *,
    add: Callable[[list[str], np.ndarray], None],
    batch_size: int,
    dtype: str,
    progress: Progress,
) -> Embedded:
    """Computes and stores the features of all images that could be read."""
    unreadable: list[str] = []

    def readable() -> Iterator[tuple[str, np.ndarray]]:
        for name, image in images:
            if isinstance(image, str):
                unreadable.append(name)
                progress.say(f"warning: can't read {printable(name)}: {printable(image)}")
            else:
                yield name, image

    rows = 0
    for names, batch in _batches(readable(), batch_size=batch_size):
        with np.errstate(over="ignore"):
            features = compute(batch)[: len(names)].astype(dtype)
        finite = np.isfinite(features.reshape(len(names), -1)).all(axis=1)
        if not finite.all():
            raise ConfigError(
                f"--dtype: features of {printable(names[int(finite.argmin())])} are not finite in"
                f" {dtype}"
            )
        add([_portable(name) for name in names], features)
        rows += len(names)
        progress.update(rows + len(unreadable))
    progress.finish()
    return Embedded(rows=rows, unreadable=[_portable(name) for name in unreadable])


def _batches(
    images: Iterable[tuple[str, np.ndarray]], *, batch_size: int
) -> Iterator[tuple[list[str], np.ndarray]]:
    """Names, and images `[batch_size, s, s, 3]`. The last batch is filled up with black images.

    Batches of one size compile once.
    """
    names: list[str] = []
    batch: list[np.ndarray] = []
    for name, image in images:
        names.append(name)
        batch.append(image)
        if len(batch) == batch_size:
            yield names, np.stack(batch)
            names, batch = [], []
    if batch:
        batch += [np.zeros_like(batch[0])] * (batch_size - len(batch))
        yield names, np.stack(batch)


def _metadata(
    config: FeaturesConfig, encoder: PretrainedEncoder, *, unreadable: list[str]
) -> JsonObject:
    """How the features were made."""
    return {
        "beit_jax": beit_jax.__version__,
        "weights": config.weights,
        "task": encoder.description.task,
        "block": config.block or None,
        "pool": config.pool,
        "final_norm": encoder.final_norm and not config.block,
        "image_size": encoder.image_size,
        "resize": config.resize,
        "normalization": encoder.normalization,
        "dtype": config.dtype,
        "grid": encoder.grid,
        "width": encoder.width,
        "model": to_dict(encoder.config),
        "unreadable": unreadable,
    }


def _portable(name: str) -> str:
    """A file's name as text that every format holds: bytes that are not UTF-8 become �."""
    return os.fsencode(name).decode("utf-8", "replace")


@contextlib.contextmanager
def _few_warnings() -> Iterator[None]:
    """Silences warnings that would only clutter the progress line."""
    with verbosity(logging.WARNING), warnings.catch_warnings():
        # The image is read all the same, as it is stored.
        warnings.filterwarnings("ignore", message="Corrupt EXIF data")
        yield


def _say(line: str) -> None:
    print(line, file=sys.stderr)
