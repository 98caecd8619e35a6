"""The host's cost of an image: this pipeline against torchvision's, Pillow's and plain tf.data's.

    python bench/input.py --images=DIR [--peer_python=PYTHON] [--rounds=5] [--json=FILE]

Measures processor milliseconds per image on one core, from the file to the batch for the device,
masks included. Every pipeline has its own process, pinned to the same core; rounds alternate, so
that all see the same machine, and medians are reported. The pipelines:

  official     native, as the configs have it
  fast         native with config.data.augment.fidelity = "fast"; the jitter is left to the device
  tf.data      decode_and_crop_jpeg, a flip, antialiased bicubic resizing: view 1 alone, no jitter
  torchvision  the official pipeline with torchvision's own transforms
  pillow       the same with Pillow's ImageEnhance instead

torchvision is imported in --peer_python's environment. Where its build does not match that torch,
its compiled operators cannot be loaded and the import fails; the transforms need none of them, so
two of their names are declared first (`peer_operators` in the JSON says so).

It also measures images per second against workers, bytes per image to the device, and the distance
of a view from Pillow's with the same box and jitter, as mean absolute levels of 255.
"""

import argparse
import io
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from machine import Answering, processor_name, save  # beside this file

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

NATIVE = ("official", "fast", "tf.data")
PEERS = ("torchvision", "pillow")
SIZE, TOKEN_SIZE, GRID, MASKED = 224, 112, 14, 75
# First batches of a round, which are not timed: they were prepared while another pipeline was
# measured. (One batch and a part of the next: nothing is prefetched here, but batching runs ahead.)
WARM_UP = 3
EXTENSIONS = (".jpg", ".jpeg")


def main() -> None:
    """Measures, prints tables and writes JSON where a file is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", required=True, help="a folder of JPEGs")
    parser.add_argument("--peer_python", default=sys.executable, help="one with torchvision")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=4, help="of a round")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--compared", type=int, default=50, help="photographs")
    parser.add_argument("--core", type=int, default=0, help="where processor time is measured")
    parser.add_argument("--json", default="")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=1, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.worker:
        serve(flags)
        return

    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "device": processor_name(),
        "clock": "processor milliseconds per image, one core",
        "images": sum(1 for _ in jpegs(flags.images)),
        "batch": flags.batch,
        "rounds": flags.rounds,
        "versions": {"python": platform.python_version()},
    }
    print(f"{result['device']}; {result['images']} JPEGs; {result['clock']}")
    result |= one_core(flags, versions=result["versions"])
    medians = result["milliseconds"]
    for name, value in medians.items():
        ratio = result["ratios"].get(name)
        beside = f"{ratio:6.2f} x the images of {result['reference']}" if ratio else ""
        print(f"  {name:12s} {value:7.2f}   {beside}")
    print("  " + ", ".join(f"{name} {version}" for name, version in result["versions"].items()))
    print(f"bytes per image to the device: {result['bytes_per_image']}")

    result["images_per_second"] = against_workers(flags)
    print("images per second against workers (wall clock):")
    for name, speeds in result["images_per_second"].items():
        print(f"  {name:12s} " + ", ".join(f"{n}: {speed:.0f}" for n, speed in speeds.items()))

    with Worker("differences", flags, python=sys.executable) as worker:
        result["difference"] = worker.ask(flags.compared)
    print("levels of 255 from Pillow's views, mean over photographs (largest of one):")
    for name, values in result["difference"].items():
        print(f"  {name:24s} {values['mean']:.2f} ({values['largest']:.2f})")
    save(result, flags.json)


def jpegs(folder: str) -> Iterator[Path]:
    """All JPEGs under a folder, sorted."""
    return (path for path in sorted(Path(folder).rglob("*")) if path.suffix.lower() in EXTENSIONS)


def one_core(flags: argparse.Namespace, *, versions: dict[str, str]) -> dict[str, Any]:
    """Alternating rounds of every pipeline that can be had on one core."""
    workers: dict[str, Worker] = {}
    missing = {}
    for name in NATIVE + PEERS:
        python = flags.peer_python if name in PEERS else sys.executable
        worker = Worker(name, flags, python=python)
        if worker.error:
            missing[name] = worker.error
            print(f"  {name}: not measured: {worker.error}")
        else:
            workers[name] = worker
            versions |= worker.hello["versions"]
    times: dict[str, list[float]] = {name: [] for name in workers}
    sent = {}
    for _ in range(1 + flags.rounds):  # the first one warms up
        for name, worker in workers.items():
            answer = worker.ask(flags.batches)
            times[name].append(answer["milliseconds"])
            if name in ("official", "fast"):
                sent[name] = answer["bytes_per_image"]
    operators = {name: worker.hello.get("operators") for name, worker in workers.items()}
    for worker in workers.values():
        worker.close()
    times = {name: values[1:] for name, values in times.items()}
    reference = "torchvision" if "torchvision" in times else "pillow"
    pairs = {
        name: [b / a for a, b in zip(values, times.get(reference, []), strict=True)]
        for name, values in times.items()
        if reference in times and name in NATIVE
    }
    return {
        "milliseconds": {name: statistics.median(values) for name, values in times.items()},
        "all_milliseconds": times,
        "reference": reference,
        "ratios": {name: statistics.median(values) for name, values in pairs.items()},
        "all_ratios": pairs,
        "bytes_per_image": sent,
        "missing": missing,
        "peer_operators": operators.get("torchvision"),
    }


def against_workers(flags: argparse.Namespace) -> dict[str, dict[int, float]]:
    """Wall-clock images/s of the native pipelines, with 1, 2, 4... workers on as many cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    counts = sorted({1 << power for power in range(cores.bit_length()) if 1 << power <= cores})
    speeds: dict[str, dict[int, float]] = {}
    for name in ("official", "fast"):
        for count in counts:
            with Worker(name, flags, python=sys.executable, workers=count) as worker:
                answers = [worker.ask(flags.batches) for _ in range(3)]
            speed = statistics.median(answer["images_per_second"] for answer in answers)
            speeds.setdefault(name, {})[count] = speed
    return speeds


class Worker(Answering):
    """A pipeline in its own process, which answers a number of batches with the time they took.

    Attributes:
      error: why it can't be had; "" where it can.
    """

    def __init__(self, name: str, flags: argparse.Namespace, *, python: str, workers: int = 1):
        command = [python, __file__, f"--worker={name}", f"--images={flags.images}"]
        command += [f"--workers={workers}", f"--batch={flags.batch}", f"--core={flags.core}"]
        super().__init__(command, stderr=subprocess.PIPE if name in PEERS else subprocess.DEVNULL)
        self.error = ""
        if self.hello is None:
            said = self.errors().strip()
            self.error = said.splitlines()[-1] if said else "it ended"

    def ask(self, line: Any = "") -> Any:
        """Another round of that many batches."""
        answer = super().ask(line)
        if answer is None:
            raise RuntimeError("a pipeline's process ended")
        return answer


# ---------------------------------------------------------------------------- in the processes


def serve(flags: argparse.Namespace) -> None:
    """Says hello with its versions, then answers numbers of batches with what they cost."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        alone = {flags.core} if flags.core in cores else {cores[0]}
        os.sched_setaffinity(0, alone if flags.workers == 1 else set(cores[: flags.workers]))
    if flags.worker == "differences":
        print("{}", flush=True)
        for line in sys.stdin:
            print(json.dumps(differences(flags.images, count=int(line))), flush=True)
        return
    if flags.worker in PEERS:
        batches, hello = peer_batches(flags)
    else:
        batches, hello = native_batches(flags)
    next(batches)
    print(json.dumps(hello), flush=True)
    for line in sys.stdin:
        for _ in range(WARM_UP):
            next(batches)
        began = time.process_time(), time.perf_counter()
        for _ in range(int(line)):
            size = next(batches)
        images = int(line) * flags.batch
        answer = {
            "milliseconds": (time.process_time() - began[0]) / images * 1e3,
            "images_per_second": images / (time.perf_counter() - began[1]),
            "bytes_per_image": size,
        }
        print(json.dumps(answer), flush=True)


def native_batches(flags: argparse.Namespace) -> tuple[Iterator[int], dict[str, Any]]:
    """Batches of "official", "fast" or "tf.data" (as bytes per image), and versions."""
    import tensorflow as tf

    from beit_jax.config import AugmentConfig, DataConfig
    from beit_jax.data import pipeline, sources, views

    fidelity = "fast" if flags.worker == "fast" else "official"
    config = DataConfig(
        source=f"folder:{flags.images}",
        workers=flags.workers,
        prefetch=0,
        augment=AugmentConfig(fidelity=fidelity),
    )
    hello = {"versions": {"tensorflow": tf.__version__}}
    if flags.worker == "tf.data":
        return plain_batches(flags), hello
    source = sources.open_source(config, training=True)
    keys = ("image", "token_image", "mask")
    made = views.pretraining_views(config, grid=GRID, keys=keys)
    batches = pipeline.training_batches(
        source, config=config, views=made, seed=0, batch_size=flags.batch
    )
    return (bytes_per_image(batch) for batch in batches), hello


def bytes_per_image(batch: dict[str, Any]) -> int:
    """Of what goes to the device; the bookkeeping stays."""
    names = [name for name in batch if name not in ("index", "replaced")]
    return sum(batch[name].nbytes for name in names) // len(batch["image"])


def plain_batches(flags: argparse.Namespace) -> Iterator[int]:
    """The simplest pipeline: a random crop, decoded alone, flipped and resized."""
    import tensorflow as tf

    paths = tf.constant([str(path) for path in jpegs(flags.images)])

    def view(index: tf.Tensor) -> tf.Tensor:
        data = tf.io.read_file(paths[index % len(paths)])
        box = tf.image.sample_distorted_bounding_box(
            tf.io.extract_jpeg_shape(data),
            tf.zeros([1, 0, 4]),
            min_object_covered=0,
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(0.08, 1.0),
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.concat([box.begin[:2], box.size[:2]], 0)
        image = tf.image.decode_and_crop_jpeg(data, window, channels=3)
        image = tf.image.random_flip_left_right(image)
        image = tf.image.resize(image, [SIZE, SIZE], method="bicubic", antialias=True)
        return tf.cast(tf.clip_by_value(tf.round(image), 0.0, 255.0), tf.uint8)

    numbers = tf.data.Dataset.counter(dtype=tf.int64)
    views = numbers.map(view, num_parallel_calls=flags.workers).batch(flags.batch)
    options = tf.data.Options()
    options.autotune.enabled = False
    options.threading.private_threadpool_size = flags.workers
    options.threading.max_intra_op_parallelism = 1
    for batch in views.with_options(options).as_numpy_iterator():
        yield batch.nbytes // flags.batch


def peer_batches(flags: argparse.Namespace) -> tuple[Iterator[int], dict[str, Any]]:
    """The official pipeline in Python, in batches, and versions."""
    import numpy
    import PIL
    from PIL import Image

    hello: dict[str, Any] = {"versions": {"numpy": numpy.__version__, "pillow": PIL.__version__}}
    if flags.worker == "torchvision":
        torch, transforms, hello["operators"] = import_torchvision()
        torch.set_num_threads(1)
        import torchvision

        hello["versions"] |= {"torch": torch.__version__, "torchvision": torchvision.__version__}
        jitter = transforms.ColorJitter(0.4, 0.4, 0.4)
        flip = transforms.RandomHorizontalFlip()
        first = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)]
        )
        second = transforms.ToTensor()
    else:
        jitter, flip, first, second = pillow_transforms()
    files = list(jpegs(flags.images))
    mask = mask_generator(numpy)

    def transform(path: Path) -> int:
        with Image.open(io.BytesIO(path.read_bytes())) as opened:
            image = opened.convert("RGB")
        image = flip(jitter(image))
        left, top, width, height = random_box(*image.size)
        crop = image.crop((left, top, left + width, top + height))
        view = first(crop.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
        token_view = second(crop.resize((TOKEN_SIZE, TOKEN_SIZE), Image.Resampling.LANCZOS))
        return view.nbytes + token_view.nbytes + mask().nbytes

    def batches() -> Iterator[int]:
        index = 0
        while True:
            for _ in range(flags.batch):
                size = transform(files[index % len(files)])
                index += 1
            yield size

    return batches(), hello


def import_torchvision() -> tuple[Any, Any, str]:
    """torch, torchvision.transforms, and how its compiled operators were found."""
    import torch

    try:
        from torchvision import transforms

        return torch, transforms, "torchvision's own"
    except RuntimeError as error:
        if "does not exist" not in str(error):
            raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    # Declared as long as the library is held.
    import_torchvision.library = library
    from torchvision import transforms

    return torch, transforms, "declared by name only; the transforms are torchvision's own"


def pillow_transforms() -> tuple[Callable, Callable, Callable, Callable]:
    """Jitter, flip, and the conversion of both views to normalised floats, without torch."""
    import numpy
    from PIL import Image, ImageEnhance

    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)

    def jitter(image: Any) -> Any:
        for enhancer in random.sample(enhancers, 3):
            image = enhancer(image).enhance(random.uniform(0.6, 1.4))
        return image

    def flip(image: Any) -> Any:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else image

    def second(image: Any) -> Any:
        channels = numpy.asarray(image).transpose(2, 0, 1)
        return numpy.ascontiguousarray(channels).astype(numpy.float32) / 255

    return jitter, flip, lambda image: (second(image) - 0.5) / 0.5, second


def random_box(width: int, height: int) -> tuple[int, int, int, int]:
    """The official crop: ten tries, else the centre with the aspect clamped."""
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1.0)
        aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if w <= width and h <= height:
            return random.randint(0, width - w), random.randint(0, height - h), w, h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (width - w) // 2, (height - h) // 2, w, h


def mask_generator(numpy: Any) -> Callable[[], Any]:
    """The official blockwise masks, one at a time in Python."""
    log_aspect = math.log(0.3)

    def add_block(mask: Any, room: int) -> int:
        for _ in range(10):
            area = random.uniform(16, room)
            aspect = math.exp(random.uniform(log_aspect, -log_aspect))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h >= GRID or w >= GRID:
                continue
            top, left = random.randint(0, GRID - h), random.randint(0, GRID - w)
            block = mask[top : top + h, left : left + w]
            fresh = h * w - int(block.sum())
            if 0 < fresh <= room:
                block[:] = 1
                return fresh
        return 0

    def draw() -> Any:
        mask, masked = numpy.zeros((GRID, GRID), int), 0
        while masked < MASKED:
            fresh = add_block(mask, MASKED - masked)
            if not fresh:
                break
            masked += fresh
        return mask

    return draw


def differences(folder: str, *, count: int) -> dict[str, dict[str, Any]]:
    """How far the native views are from Pillow's with the same box and jitter.

    Args:
      folder: of JPEGs.
      count: photographs, evenly spaced.

    Returns:
      By "official image", "official token_image", "fast image" and "fast token_image": `mean` over
      photographs, `largest` and `each`, mean absolute differences in levels of 255.
    """
    import numpy as np
    import tensorflow as tf
    from PIL import Image, ImageEnhance

    from beit_jax.config import AugmentConfig
    from beit_jax.data import augment, decode
    from beit_jax.training import device_jitter

    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    sizes = {"image_size": SIZE, "token_image_size": TOKEN_SIZE}
    files = list(jpegs(folder))
    found: dict[str, list[float]] = {}
    for number, path in enumerate(files[:: max(1, len(files) // count)][:count]):
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as opened:
            picture = opened.convert("RGB")
        drawn = augment.draw_parameters(
            tf.constant([0, number], tf.int64),
            height=tf.constant(picture.height),
            width=tf.constant(picture.width),
            config=AugmentConfig(),
        )
        views = {
            "official": augment.apply_views(
                decode.decode_image(tf.constant(data), exif_orientation=False),
                parameters=drawn,
                **sizes,
            )
        }
        window = decode.Window(
            box=lambda height, width, drawn=drawn: augment.unflipped_box(drawn, width=width),
            side=SIZE,
        )
        crop = decode.decode_window(tf.constant(data), window=window, exif_orientation=False)
        fast = augment.fast_views(crop, parameters=drawn, **sizes)
        fast = {name: np.asarray(value)[None] for name, value in fast.items()}
        jittered = device_jitter.jitter_batch(fast)
        views["fast"] = {name: np.asarray(value)[0] for name, value in jittered.items()}

        for which in drawn["order"].numpy():
            picture = enhancers[which](picture).enhance(float(drawn["factors"][which]))
        if drawn["flip"]:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        top, left, height, width = drawn["box"].numpy().tolist()
        cut = picture.crop((left, top, left + width, top + height))
        wanted = {
            "image": cut.resize((SIZE, SIZE), Image.Resampling.BICUBIC),
            "token_image": cut.resize((TOKEN_SIZE, TOKEN_SIZE), Image.Resampling.LANCZOS),
        }
        for kind, made in views.items():
            for name, view in wanted.items():
                levels = np.asarray(made[name]).astype(int) - np.asarray(view).astype(int)
                found.setdefault(f"{kind} {name}", []).append(float(np.abs(levels).mean()))
    return {
        name: {"mean": statistics.mean(levels), "largest": max(levels), "each": levels}
        for name, levels in found.items()
    }


if __name__ == "__main__":
    main()
