"""The host's cost of segmentation's training views: this pipeline against mmseg's steps in OpenCV.

    python bench/segment_input.py --pairs=DIR [--shorter=512] [--crop=512] [--json=FILE]

Measures processor milliseconds per image on one core, from the two files to the batch for the
device. DIR holds `images` and `labels`, as for the source `pairs:DIR`; without it, images and maps
of the embedded set are written to files of 683 x 512, which is what most of ADE20K has. Each side
has its own process, pinned to the same core; rounds alternate and medians are reported. The sides:

  native    the training batches of `views.segmentation_views`
  plain     the same without photometric distortion
  decoding  the image and the map alone, decoded
  opencv    mmseg's steps with cv2 (Pillow for the map), as mmseg has them: the whole image is
            resized, then cropped

--shorter=N measures copies of the files whose shorter side is N pixels, in a temporary folder.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from machine import Answering, processor_name, save  # beside this file

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

SIDES = ("native", "plain", "decoding", "opencv")
EMBEDDED = 64  # images that are written where no folder is named
ADE_SIDES = 683, 512  # width and height


def main() -> None:
    """Measures, prints a table and writes JSON where a file is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", default="", help="a folder of images/ and labels/")
    parser.add_argument("--shorter", type=int, default=0, help="of resized copies; 0: as they are")
    parser.add_argument("--crop", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=64, help="of a round")
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--json", default="")
    parser.add_argument("--side", default="", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.side:
        serve(flags)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = flags.pairs or write_embedded(Path(scratch) / "embedded")
        if flags.shorter:
            folder = write_resized(folder, Path(scratch) / "resized", shorter=flags.shorter)
        times = measure(flags, folder)
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "device": processor_name(),
        "clock": "processor milliseconds per image, one core",
        "pairs": Path(flags.pairs).name or "embedded",
        "shorter": flags.shorter,
        "crop": flags.crop,
        "milliseconds": {name: statistics.median(values) for name, values in times.items()},
        "all_milliseconds": times,
    }
    print(f"{result['device']}; {result['pairs']}, crop {flags.crop}; {result['clock']}")
    for name, value in result["milliseconds"].items():
        print(f"  {name:10s} {value:7.2f}   {1000 / value:6.0f} images/s")
    save(result, flags.json)


def measure(flags: argparse.Namespace, folder: str) -> dict[str, list[float]]:
    """Milliseconds per image of each side that can be had, in alternating rounds."""
    workers = {}
    for name in SIDES:
        command = [sys.executable, __file__, f"--side={name}", f"--pairs={folder}"]
        command += [f"--crop={flags.crop}", f"--core={flags.core}"]
        worker = Answering(command)
        if worker.hello is None:
            print(f"  {name}: not measured")
        else:
            workers[name] = worker
    times: dict[str, list[float]] = {name: [] for name in workers}
    for number in range(1 + flags.rounds):  # the first one warms up
        for name, worker in workers.items():
            answer = worker.ask(flags.images)
            if answer is None:
                raise RuntimeError(f"the process of {name} ended")
            if number:
                times[name].append(answer)
    for worker in workers.values():
        worker.close()
    return times


def write_embedded(folder: Path) -> str:
    """Images and maps of the embedded set as files, as large as most of ADE20K's."""
    import tensorflow as tf
    from PIL import Image

    from beit_jax.data.sources import embedded

    for index in range(EMBEDDED):
        drawn = embedded.draw_embedded(tf.constant(index, tf.int64), side=ADE_SIDES[0])
        _write(
            folder,
            f"{index:03d}",
            Image.fromarray(drawn["image"].numpy()[: ADE_SIDES[1]]),
            Image.fromarray(drawn["segmentation"].numpy()[: ADE_SIDES[1]]),
        )
    return str(folder)


def write_resized(folder: str, to: Path, *, shorter: int) -> str:
    """Copies whose shorter side is `shorter`; classes of maps stay what they are."""
    from PIL import Image

    for image_file, map_file in _files(folder):
        with Image.open(image_file) as image, Image.open(map_file) as labels:
            scale = shorter / min(image.size)
            size = round(image.width * scale), round(image.height * scale)
            resized = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
            _write(to, image_file.stem, resized, labels.resize(size, Image.Resampling.NEAREST))
    return str(to)


def _write(folder: Path, stem: str, image: Any, labels: Any) -> None:
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    image.save(folder / "images" / f"{stem}.jpg", quality=95)
    labels.save(folder / "labels" / f"{stem}.png")


def _files(folder: str) -> list[tuple[Path, Path]]:
    """The image and the map of each pair, of a flat folder."""
    images = sorted(Path(folder, "images").iterdir())
    return [(path, Path(folder, "labels", f"{path.stem}.png")) for path in images]


# ---------------------------------------------------------------------------- in the processes


def serve(flags: argparse.Namespace) -> None:
    """Says hello, then answers numbers of images with what each of them cost."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {flags.core if flags.core in cores else cores[0]})
    images = opencv_views(flags) if flags.side == "opencv" else native_views(flags)
    next(images)
    print(json.dumps(flags.side), flush=True)
    for line in sys.stdin:
        began = time.process_time()
        for _ in range(int(line)):
            next(images)
        print(json.dumps((time.process_time() - began) / int(line) * 1e3), flush=True)


def native_views(flags: argparse.Namespace) -> Iterator[Any]:
    """One view after the other."""
    import tensorflow as tf

    from beit_jax.config import SegmentAugmentConfig, SegmentDataConfig
    from beit_jax.data import pipeline, sources, views

    plain = {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0}
    config = SegmentDataConfig(
        source=f"pairs:{flags.pairs}",
        image_size=flags.crop,
        augment=SegmentAugmentConfig(**(plain if flags.side == "plain" else {})),
        workers=1,
        prefetch=0,
    )
    source = sources.open_source(config, training=True)
    if flags.side == "decoding":
        indices = tf.data.Dataset.range(len(source)).repeat()
        yield from indices.map(source.load).with_options(pipeline.fixed_options(1))
    made = views.segmentation_views(config, classes=255)
    batches = pipeline.training_batches(source, config=config, views=made, seed=0, batch_size=8)
    for batch in batches:
        yield from batch["image"]


def opencv_views(flags: argparse.Namespace) -> Iterator[Any]:
    """mmseg 0.11's pipeline, one view after the other."""
    import cv2
    import numpy as np
    from PIL import Image

    cv2.setNumThreads(1)
    files = _files(flags.pairs)
    side = flags.crop

    def convert(levels: Any, scale: float = 1.0, shift: float = 0.0) -> Any:
        changed = levels.astype(np.float32) * scale + shift
        return np.clip(changed, 0, 255).astype(np.uint8)

    def distort(image: Any) -> Any:
        if random.random() < 0.5:
            image = convert(image, shift=random.uniform(-32, 32))
        first = random.random() < 0.5
        if first and random.random() < 0.5:
            image = convert(image, random.uniform(0.5, 1.5))
        if random.random() < 0.5:
            hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
            hsv[..., 1] = convert(hsv[..., 1], random.uniform(0.5, 1.5))
            image = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
        if random.random() < 0.5:
            hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
            hsv[..., 0] = (hsv[..., 0].astype(int) + random.randrange(-18, 18)) % 180
            image = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
        if not first and random.random() < 0.5:
            image = convert(image, random.uniform(0.5, 1.5))
        return image

    while True:
        image_file, map_file = random.choice(files)
        image = cv2.imread(str(image_file))
        with Image.open(map_file) as opened:
            labels = np.asarray(opened)
        scale = random.uniform(0.5, 2.0)
        height, width = labels.shape
        factor = min(
            int(4 * side * scale) / max(height, width), int(side * scale) / min(height, width)
        )
        size = int(width * factor + 0.5), int(height * factor + 0.5)
        image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
        labels = cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST)
        for _ in range(10):
            top, left = (random.randint(0, max(n - side, 0)) for n in labels.shape)
            crop = labels[top : top + side, left : left + side]
            found, counts = np.unique(crop, return_counts=True)
            counts = counts[found != 255]
            if len(counts) > 1 and counts.max() / counts.sum() < 0.75:
                break
        image = image[top : top + side, left : left + side]
        if random.random() < 0.5:
            image, crop = image[:, ::-1], crop[:, ::-1]
        image = distort(np.ascontiguousarray(image))[..., ::-1]
        below, beside = side - image.shape[0], side - image.shape[1]
        np.pad(crop, [(0, below), (0, beside)], constant_values=255)
        yield np.pad(image, [(0, below), (0, beside), (0, 0)])


if __name__ == "__main__":
    main()
