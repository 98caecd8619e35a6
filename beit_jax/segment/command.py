"""The command line and the run: list, load, segment batch after batch, write."""

import argparse
import collections
import contextlib
import dataclasses
import io
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding
from PIL import Image

from beit_jax.config import ConfigError, check
from beit_jax.config.segment import InferenceConfig
from beit_jax.drawing import class_maps
from beit_jax.drawing.sheets import save_png
from beit_jax.evaluation.features import host_rows
from beit_jax.features.command import add_checkpoint_options, reporting
from beit_jax.features.images import SUFFIXES, decode_image, find_images, load_images
from beit_jax.files import printable, write_json, write_whole
from beit_jax.preprocessing import NORMALIZATIONS
from beit_jax.pretrained import PretrainedSegmenter, load_segmenter
from beit_jax.progress import Progress
from beit_jax.segmentation import windows
from beit_jax.training import sharding
from beit_jax.types import Batch, Params

SHEET, CLASSES = "sheet.png", "classes.json"
_MAP, _OVERLAY = ".png", "_overlay.jpg"  # behind the name of an image
_ROWS = 12  # images on the sheet
_SHOWN = 640  # at least so many pixels along the longer side of an image on the sheet
_AHEAD = 2  # images decoded ahead for each thread; a photograph has megabytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentCommand:
    """What is painted, by which weights.

    Attributes:
      images: a folder.
      weights: whatever `load_segmenter` takes.
      output: the folder to write.
      batch_size: images computed at once.
      stride: pixels that windows advance by; 0: the checkpoint's, or two thirds of a window.
      scales: of the image's sides, "0.5,1,1.5"; "": the checkpoint's.
      flip: whether probabilities are averaged over the mirrored image, too.
      short_side: pixels that the shorter side of an image becomes; 0: the checkpoint's.
      image_size: side of the windows, to which positions are resized; 0: the checkpoint's.
      threads: that decode images; 0: by the CPUs.
      normalization, heads, epsilon, which: see `load_segmenter`.
    """

    images: str
    weights: str
    output: str
    batch_size: int = 4
    stride: int = 0
    scales: str = ""
    flip: bool = False
    short_side: int = 0
    image_size: int = 0
    threads: int = 0
    normalization: str = ""
    heads: int = 0
    epsilon: float | None = None
    which: str = ""

    def __post_init__(self) -> None:
        check(self.batch_size >= 1, "--batch-size", "must be at least 1")
        check(self.stride >= 0, "--stride", "must not be negative")
        check(self.short_side >= 0, "--short-side", "must not be negative")
        check(self.image_size >= 0, "--image-size", "must not be negative")
        check(self.threads >= 0, "--threads", "must not be negative")
        _numbers(self.scales)


def _numbers(text: str) -> tuple[float, ...]:
    """Numbers between commas; () for none."""
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise ConfigError(f"--scales: {text!r} is no list of numbers such as 0.5,1,1.5") from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Painted:
    """Which images were painted.

    Attributes:
      written: names, with which the files of each begin.
      unreadable: names of the others.
    """

    written: list[str]
    unreadable: list[str]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(
        prog="python -m beit_jax.segment",
        description="Paints a folder of images with the classes of their pixels.",
        epilog="writes for each image NAME.png, whose values are classes, and NAME_overlay.jpg;"
        f"\nand once {SHEET}, with the classes' names and colours, and {CLASSES}\n\n"
        "example:\n  python -m beit_jax.segment photos --weights=runs/camvid --output=painted",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = command.add_argument
    option("images", help=f"folder of images at any depth: {', '.join(SUFFIXES)}")
    option(
        "--weights",
        required=True,
        help="a segmentation run's directory, a checkpoint, a Hugging Face folder, .pth of mmseg,"
        " or hf:OWNER/NAME",
    )
    option("--output", required=True, metavar="DIR", help="folder to write, made where missing")
    option(
        "--scales",
        default="",
        metavar="A,B,...",
        help="average over the image at these scales (default: the checkpoint's, or 1)",
    )
    option("--flip", action="store_true", help="and over its mirror image")
    option(
        "--stride",
        type=int,
        default=0,
        metavar="PIXELS",
        help="of the windows (default: the checkpoint's, or two thirds of a window)",
    )
    option(
        "--short-side",
        type=int,
        default=0,
        metavar="PIXELS",
        help="what the shorter side of an image becomes (default: the run's, or a window)",
    )
    option("--batch-size", type=int, default=4, metavar="N", help="images at once; default: 4")
    option("--threads", type=int, default=0, metavar="N", help="decode images; default: by CPUs")
    _weights_options(command)
    return command


def _weights_options(command: argparse.ArgumentParser) -> None:
    """What a checkpoint may not say, or says otherwise."""
    option = command.add_argument
    option(
        "--image-size",
        type=int,
        default=0,
        metavar="PIXELS",
        help="side of the windows (default: the checkpoint's); positions are interpolated",
    )
    option(
        "--normalization",
        choices=tuple(NORMALIZATIONS),
        default="",
        help="of the pixels, in place of what the checkpoint says",
    )
    add_checkpoint_options(command)


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
        lambda: paint_folder(SegmentCommand(**vars(options))),
        interrupted="the files of each painted image are whole",
    )


def paint_folder(config: SegmentCommand) -> Painted:
    """Writes the class maps of a folder's images and reports on stderr.

    Raises:
      ConfigError: something does not fit, before any image is read; or none can be read.
    """
    check(os.path.isdir(config.images), "IMAGES", f"there is no folder {config.images}")
    inside = os.path.realpath(config.output) + os.sep
    check(
        not inside.startswith(os.path.realpath(config.images) + os.sep),
        "--output",
        f"{config.output} is in the folder of images; choose another",
    )
    found = find_images(config.images)
    check(
        bool(found.names),
        "IMAGES",
        f"no images in {config.images} at any depth; looked for {', '.join(SUFFIXES)}",
    )
    in_the_way = [name for name in found.names if "/" in name and _top(name) in (SHEET, CLASSES)]
    check(
        not in_the_way,
        "IMAGES",
        f"the folder of {printable(''.join(in_the_way[:1]))} has the name of a file that is"
        " written; rename it",
    )
    segmenter = load_segmenter(
        config.weights,
        image_size=config.image_size or None,
        normalization=config.normalization,
        heads=config.heads,
        layer_norm_epsilon=config.epsilon,
        weights=config.which,
    )
    if config.short_side:
        segmenter = dataclasses.replace(
            segmenter, short_side=config.short_side, long_side=4 * config.short_side
        )
    inference = segmenter.settings(
        stride=config.stride or None,
        scales=_numbers(config.scales) or None,
        flip=config.flip or None,
    )
    _say(
        f"{len(found.names)} images"
        + (f" ({found.others} other files left out)" if found.others else "")
        + f", {segmenter.description.outputs} classes, windows of {segmenter.image_size} pixels on"
        f" a shorter side of {segmenter.short_side}, {windows.passes(inference)} pass(es)"
    )
    began = time.perf_counter()
    done = _paint(config, found.names, segmenter, inference)
    check(bool(done.written), "IMAGES", f"none of {len(found.names)} images could be read")
    if done.unreadable:
        _say(f"warning: {len(done.unreadable)} of {len(found.names)} images could not be read")
    seconds = time.perf_counter() - began
    _say(f"painted {len(done.written)} images in {config.output} in {seconds:.1f} s; {SHEET} has")
    _say("the first of them, and the names of the classes")
    return done


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Loaded:
    """An image as it is and as its windows."""

    pixels: np.ndarray
    prepared: windows.Prepared


def _paint(
    config: SegmentCommand,
    names: Sequence[str],
    segmenter: PretrainedSegmenter,
    inference: InferenceConfig,
) -> Painted:
    """Segments and writes all images that can be read, then the sheet."""
    batch_size = min(config.batch_size, len(names))
    segment = segment_function(segmenter, inference, batch=batch_size)

    def load(path: str) -> _Loaded:
        pixels = decode_image(path)
        return _Loaded(pixels=pixels, prepared=segmenter.prepare(pixels, inference=inference))

    images = load_images(
        config.images,
        names,
        load=load,
        threads=config.threads or min(16, os.cpu_count() or 1),
        ahead=_AHEAD,
    )
    outputs = output_names(names)
    progress = Progress(len(names))
    done = Painted(written=[], unreadable=[])
    shown: list[tuple[str, np.ndarray, np.ndarray]] = []
    with contextlib.closing(images):  # stops the threads where something goes wrong
        for batch in _batches(_readable(images, done, progress), size=batch_size):
            maps = segment([image.prepared for _, image in batch])
            for (name, image), classes in zip(batch, maps, strict=True):
                _write(os.path.join(config.output, outputs[name]), image.pixels, classes)
                done.written.append(outputs[name])
                if len(shown) < _ROWS:
                    step = max(1, max(classes.shape) // _SHOWN)
                    shown.append((name, image.pixels[::step, ::step], classes[::step, ::step]))
                progress.update(len(done.written) + len(done.unreadable))
    progress.finish()
    if shown:
        _write_legend(config.output, shown, segmenter)
    return done


def _readable(
    images: Iterable[tuple[str, _Loaded | str]], done: Painted, progress: Progress
) -> Iterator[tuple[str, _Loaded]]:
    for name, image in images:
        if isinstance(image, str):
            done.unreadable.append(name)
            progress.say(f"warning: can't read {printable(name)}: {printable(image)}")
        else:
            yield name, image


def _batches(
    images: Iterator[tuple[str, _Loaded]], *, size: int
) -> Iterator[list[tuple[str, _Loaded]]]:
    while batch := list(itertools.islice(images, size)):
        yield batch


def segment_function(
    segmenter: PretrainedSegmenter, inference: InferenceConfig, *, batch: int
) -> Callable[[Sequence[windows.Prepared]], list[np.ndarray]]:
    """Compiles the segmenter for batches of one size, on all devices that it fits.

    Args:
      segmenter: loaded.
      inference: how images are covered.
      batch: images; they are split over as many devices as divide them.

    Returns:
      Prepared images, up to `batch` of them → a class map uint8 `[h, w]` for each.
    """
    passes, tile = windows.passes(inference), inference.tile
    rooms = windows.Rooms(tile=tile)
    count = math.gcd(batch, jax.local_device_count())
    mesh = sharding.make_mesh(fsdp=1, devices=jax.local_devices()[:count])

    def compute(held: Params, packed: Batch) -> jax.Array:
        return segmenter.predict(
            held["params"], held["variables"], packed, passes=passes, tile=tile
        )

    compiled = jax.jit(
        sharding.on_mesh(compute, mesh), out_shardings=NamedSharding(mesh, sharding.BATCH)
    )
    held = sharding.replicate({"params": segmenter.params, "variables": segmenter.variables}, mesh)

    def segment(images: Sequence[windows.Prepared]) -> list[np.ndarray]:
        packed = windows.pack(images, images=batch, crop=segmenter.image_size, rooms=rooms)
        tiles = host_rows(compiled(held, sharding.to_devices(packed, mesh)))
        return [windows.assemble(tiles[i], size=each.size) for i, each in enumerate(images)]

    return segment


def output_names(names: Sequence[str]) -> dict[str, str]:
    """What the files of each image begin with: its name without the suffix.

    Images that would share it, "a.jpg" and "a.png", keep their suffixes, and so does one that would
    be written over the sheet or in the place of a folder. Where that is not enough, a number
    follows. Names that differ in case alone are the same one, as they are to some disks.

    Returns:
      image → the path of its files, relative to the output, without ".png" and "_overlay.jpg".
    """
    folders = {parent for name in names for parent in _parents(name.casefold())}

    def is_free(output: str) -> bool:
        files = {f"{output.casefold()}{end}" for end in (_MAP, _OVERLAY)}
        return files.isdisjoint(folders | {SHEET, CLASSES})

    outputs = {name: os.path.splitext(name)[0] for name in names}
    while True:  # a whole name may be what is left of a longer one
        counts = collections.Counter(output.casefold() for output in outputs.values())
        shared = {
            name
            for name, output in outputs.items()
            if output != name and (counts[output.casefold()] > 1 or not is_free(output))
        }
        if not shared:
            break
        outputs |= {name: name for name in shared}
    taken: set[str] = set()
    for name, output in outputs.items():
        candidates = (f"{output}_{number}" for number in itertools.count(2))
        for candidate in itertools.chain([output], candidates):
            key = candidate.casefold()
            alone = key not in taken and (candidate == output or key not in counts)
            if alone and is_free(candidate):
                break
        taken.add(key)
        outputs[name] = candidate
    return outputs


def _top(name: str) -> str:
    """The first part of a path, as it is on a disk that does not tell cases apart."""
    return name.partition("/")[0].casefold()


def _parents(name: str) -> list[str]:
    """The folders that a file is in: "a/b/c.jpg" → "a", "a/b"."""
    parts = name.split("/")
    return ["/".join(parts[:i]) for i in range(1, len(parts))]


def _write(path: str, pixels: np.ndarray, classes: np.ndarray) -> None:
    """Writes an image's class map and its overlay; a folder of its own where it had one."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    class_maps.save_class_map(f"{path}{_MAP}", classes)
    content = io.BytesIO()
    Image.fromarray(class_maps.overlay(pixels, classes)).save(content, format="JPEG", quality=90)
    write_whole(f"{path}{_OVERLAY}", content.getvalue())


def _write_legend(
    output: str,
    shown: Sequence[tuple[str, np.ndarray, np.ndarray]],
    segmenter: PretrainedSegmenter,
) -> None:
    """Writes the sheet with the first images, and every class with its name and colour."""
    names = segmenter.classes or tuple(f"class {i}" for i in range(segmenter.description.outputs))
    sheet = class_maps.sheet(
        {
            "image": [pixels for _, pixels, _ in shown],
            "classes": [classes for _, _, classes in shown],
        },
        names=names,
        titles=[printable(name) for name, _, _ in shown],
    )
    save_png(os.path.join(output, SHEET), sheet)
    colors = class_maps.palette()
    write_json(
        os.path.join(output, CLASSES),
        {str(i): {"name": name, "color": colors[i].tolist()} for i, name in enumerate(names)},
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr)
