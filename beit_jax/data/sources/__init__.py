"""Where images come from: made by code, a folder of files, a prepared set, or a TFDS data set.

`open_source` turns `config.source` into a `Source`: a number of images, a name for each, and a
function that loads one inside a tf.data graph.

    source = open_source(DataConfig(source="folder:/data/photos", holdout=500), training=True)
    len(source), source.name(7)
    source.load(tf.constant(7, tf.int64))["image"]  # uint8 [h, w, 3]

Access is random: any image by its index at any time, so that the order of the data can be computed
instead of stored. The exception is a TFDS data set prepared as TFRecord, which can only be read
from front to back; see `Source.sequence`.
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf
from absl import logging

from beit_jax.config import ConfigError, SourceConfig, check
from beit_jax.data import prepared

# TensorFlow only feeds the run here: it must not take the accelerators' memory away from JAX. It
# has to be said before TensorFlow first runs anything, hence on import.
tf.config.set_visible_devices([], "GPU")

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp")

# What the embedded set shows: a shape, told by its segmentation map (0 for the background, 1 + the
# place here on the shape), ...
SHAPES = (
    "disc",
    "square",
    "triangle",
    "ring",
    "cross",
    "flower",
    "bar",
    "crescent",
    "frame",
    "half disc",
)
# ... on a texture: its class. (The shape would be too hard a class for a few minutes' training.)
TEXTURES = ("stripes", "waves", "checks", "dots", "rings", "gradient")
EMBEDDED_IMAGES = 10_000
# Drawn this much larger than config.image_size, so that most random crops are not enlarged.
EMBEDDED_SCALE = 1.25
# Held-out images are those from this index on: disjoint from any number of training images.
EMBEDDED_EVAL_START = 1 << 40

# Records in memory from which a sequential source draws at random (about 110 kB each in ImageNet).
SHUFFLE_RECORDS = 4096

Element = dict[str, tf.Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Window:
    """The part of an image that is wanted, so that the rest needs no decoding.

    Attributes:
      box: from the upright image's height and width (int32 scalars) to top, left, height and width
        (int32 [4]).
      side: pixels that the shorter side must have at least; a box of twice that side and more may
        come at half the resolution, and so on.
    """

    box: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
    side: int


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """A set of images.

    Attributes:
      size: number of images.
      name: from an index, what a person calls that image: a path, for instance.
      load: from an index (int64 scalar tensor) to `image`, uint8 [h, w, 3] RGB, and the other
        `fields`: `label` (int32 scalar), `segmentation` (uint8 [h, w]). Works in a tf.data graph;
        raises a TensorFlow error there for an image that can't be read or decoded. With `window=`,
        a `Window` or None, `image` is that part of it; `segmentation` stays whole.
      fields: names of what `load` returns.
      classes: their names, where images have a label: it is a place in this list.
      reliable: `load` can't fail.
      travels: `load` works in other processes too (`data/service.py`): it's all TensorFlow.
      sequence: None where access is random. Otherwise records come only in order:
        `sequence(seed=, epoch=, shard=, shards=)` is a dataset of dicts with `index` (int64, the
        place in that order) and what `load` then takes in place of an index. For shards without
        overlap; shuffled as a function of (seed, epoch), or in the stored order where seed is None.
    """

    size: int
    name: Callable[[int], str]
    load: Callable[..., Element]
    fields: tuple[str, ...] = ("image",)
    classes: tuple[str, ...] = ()
    reliable: bool = False
    sequence: Callable[..., tf.data.Dataset] | None = None
    travels: bool = True

    def __len__(self) -> int:
        return self.size


def open_source(config: SourceConfig, *, training: bool) -> Source:
    """Opens the training or the evaluation images.

    Evaluation images are `eval_source` where it is given. Otherwise they are `holdout` images of
    `source`: other indices of the embedded set, files of a folder that training never sees; and of
    a TFDS data set, the split `eval_split`.

    Raises:
      ConfigError: the source is unknown, missing or empty, or nothing is left to train on or to
        evaluate on. The message names the setting.
    """
    setting, value = "config.data.source", config.source
    if not training and config.eval_source:
        setting, value = "config.data.eval_source", config.eval_source
    separate = bool(config.eval_source)  # nothing is withheld from `source`
    kind, _, rest = value.partition(":")
    if kind == "embedded":
        return _open_embedded(rest, config, setting=setting, training=training, separate=separate)
    if kind == "folder":
        return _open_folder(rest, config, setting=setting, training=training, separate=separate)
    if kind == "tfds":
        return _open_tfds(rest, config, setting=setting, training=training)
    if kind == "prepared":
        return _open_prepared(rest, config, setting=setting, training=training, separate=separate)
    raise ConfigError(
        f"{setting}: must be embedded, embedded:NUMBER, folder:PATH, prepared:PATH or tfds:NAME;"
        f" got {value!r}"
    )


# ---------------------------------------------------------------------------- embedded


def _open_embedded(
    rest: str, config: SourceConfig, *, setting: str, training: bool, separate: bool
) -> Source:
    check(
        rest == "" or (rest.isdecimal() and int(rest) > 0),
        setting,
        f"embedded:NUMBER needs a positive whole number of images, got {rest!r}",
    )
    number, start = int(rest) if rest else EMBEDDED_IMAGES, 0
    if not training:
        start = EMBEDDED_EVAL_START
        if not separate:
            _check_holdout(config)
            number = config.holdout
    side = round(EMBEDDED_SCALE * config.image_size)

    def load(index: tf.Tensor, *, window: Window | None = None) -> Element:
        drawn = draw_embedded(start + index, side=side)
        return drawn | {"image": _cut(drawn["image"], window=window)}

    return Source(
        size=number,
        name=lambda index: f"embedded image {start + index}",
        load=load,
        fields=("image", "label", "segmentation"),
        classes=TEXTURES,
        reliable=True,
    )


def draw_embedded(index: tf.Tensor, *, side: int) -> Element:
    """Draws one image of the embedded set: a textured shape on a textured background.

    Both textures are periodic or smooth (stripes, checks, dots, a gradient, rings, waves) in two
    colours, and run on across patches: what a hidden patch shows follows from its neighbours, while
    colours, scale, angle and phase differ from image to image.

    Args:
      index: int64 scalar; the image is a pure function of it and of `side`.
      side: height and width in pixels.

    Returns:
      `image` uint8 [side, side, 3], `label` int32 scalar (the background's place in `TEXTURES`),
      `segmentation` uint8 [side, side]: 0 for the background, 1 + a place in `SHAPES` on the shape.
    """
    key = tf.stack([tf.constant(2106_08254, tf.int64), tf.cast(index, tf.int64)])
    uniform = tf.random.stateless_uniform([32], seed=key, alg="philox")

    # Coordinates in -1..1, [side, side].
    axis = (np.arange(side, dtype=np.float32) + 0.5) / side * 2 - 1
    x, y = (tf.constant(values) for values in np.meshgrid(axis, axis))

    shape = tf.cast(uniform[0] * len(SHAPES), tf.int32)
    radius = 0.4 + 0.35 * uniform[1]
    angle = 2 * np.pi * uniform[2]
    centre = (uniform[3:5] * 2 - 1) * (0.95 - radius)
    inside = _shape(shape, *_turn((x - centre[0]) / radius, (y - centre[1]) / radius, angle))
    # `inside` is a distance from the outline in units of `radius`; one pixel of soft edge.
    alpha = tf.clip_by_value(inside * radius * (side / 2) + 0.5, 0.0, 1.0)

    background = uniform[5:8]
    # At least 0.3 from the background in each channel, wrapped around.
    foreground = tf.math.floormod(background + 0.3 + 0.4 * uniform[8:11], 1.0)
    # The shape's two colours are closer to each other, which lets its outline be seen.
    back_share, back_step, label = _texture(x, y, colour=background, uniform=uniform[11:21])
    front_share, front_step, _ = _texture(x, y, colour=foreground, uniform=uniform[21:31])
    colours = tf.stack([background, back_step, foreground, 0.6 * front_step])
    shares = [1 - alpha, (1 - alpha) * back_share, alpha, alpha * front_share]
    # As a matrix product this is several times faster than broadcasting over three channels.
    image = tf.matmul(tf.reshape(shares, [4, side * side]), 255 * colours, transpose_a=True)
    return {
        "image": tf.reshape(tf.cast(image + 0.5, tf.uint8), [side, side, 3]),
        "label": label,
        "segmentation": tf.where(alpha > 0.5, tf.cast(shape + 1, tf.uint8), tf.zeros((), tf.uint8)),
    }


def _turn(x: tf.Tensor, y: tf.Tensor, angle: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Coordinates in axes turned by `angle`."""
    cos, sin = tf.cos(angle), tf.sin(angle)
    return cos * x + sin * y, cos * y - sin * x


def _shape(shape: tf.Tensor, x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
    """Roughly the distance to the shape's outline, positive inside; the shape fits |x|, |y| < 1."""

    def disc(x, y, radius):
        return radius - tf.sqrt(x * x + y * y)

    def box(x, y, half_width, half_height):
        return tf.minimum(half_width - tf.abs(x), half_height - tf.abs(y))

    def triangle():
        slope = 3**0.5 / 2
        return 0.5 - tf.maximum(y, slope * tf.abs(x) - 0.5 * y)

    def flower():
        return 0.65 + 0.3 * tf.cos(5 * tf.atan2(y, x)) - tf.sqrt(x * x + y * y)

    drawn = {
        "disc": lambda: disc(x, y, 0.9),
        "square": lambda: box(x, y, 0.8, 0.8),
        "triangle": triangle,
        "ring": lambda: 0.24 - tf.abs(disc(x, y, 0.72)),
        "cross": lambda: tf.maximum(box(x, y, 0.3, 0.95), box(x, y, 0.95, 0.3)),
        "flower": flower,
        "bar": lambda: box(x, y, 1.0, 0.34),
        "crescent": lambda: tf.minimum(disc(x, y, 0.95), -disc(x - 0.5, y, 0.72)),
        "frame": lambda: 0.2 - tf.abs(box(x, y, 0.68, 0.68)),
        "half disc": lambda: tf.minimum(disc(x, y - 0.4, 0.95), 0.4 - y),
    }
    return tf.switch_case(shape, [drawn[name] for name in SHAPES])


def _texture(
    x: tf.Tensor, y: tf.Tensor, *, colour: tf.Tensor, uniform: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """A texture in two colours.

    Args:
      x, y: float32 [side, side] in -1..1.
      colour: float32 [3] in 0..1, one of the two; the other is at some distance from it.
      uniform: float32 [10] in 0..1: everything else.

    Returns:
      The share of the other colour, float32 [side, side] in 0..1; the step from the one colour to
      the other, float32 [3]; and the texture's place in `TEXTURES`, int32 scalar.
    """
    frequency = 2 * np.pi * (1.25 + 2.5 * uniform[0])  # radians over half the image
    sharpness = 1.0 + 2.5 * uniform[1]
    along, across = _turn(x, y, np.pi * uniform[2])
    phase, phase_across = 2 * np.pi * uniform[3], 2 * np.pi * uniform[4]
    kind = tf.cast(uniform[5] * len(TEXTURES), tf.int32)

    def stripes(bend: float = 0.0):
        wave = bend * tf.sin(5 * across + phase_across)
        return tf.cos(frequency * along + phase + wave)

    def grid():
        return tf.cos(frequency * along + phase), tf.cos(frequency * across + phase_across)

    def checks():
        first, second = grid()
        return 1.6 * first * second

    def dots():
        first, second = grid()
        return first + second - 0.5

    def rings():
        east, north = x - tf.cos(phase), y - tf.sin(phase)
        return tf.cos(frequency * tf.sqrt(east * east + north * north))

    value = tf.switch_case(
        kind,
        [
            stripes,
            lambda: stripes(bend=1.5),
            checks,
            dots,
            rings,
            lambda: (along + 0.4 * across) / sharpness,
        ],
    )
    share = tf.clip_by_value(0.5 + 0.5 * sharpness * value, 0.0, 1.0)
    # Where the other colour would leave 0..1 it lies the other way, so that contrast stays.
    step = 0.25 + 0.3 * uniform[6:9]
    return share, tf.where(colour > 0.5, -step, step), kind


# ---------------------------------------------------------------------------- folder


def _open_folder(
    rest: str, config: SourceConfig, *, setting: str, training: bool, separate: bool
) -> Source:
    root = os.path.expanduser(rest) if "://" not in rest else rest
    if not rest or not tf.io.gfile.isdir(root):
        raise ConfigError(f"{setting}: no such folder: {rest!r}")
    names = _list_images(root)
    if not names:
        raise ConfigError(
            f"{setting}: no images in {rest!r} at any depth; looked for {', '.join(EXTENSIONS)}"
        )
    classes = _class_folders(names)
    if not separate:
        if not training:
            _check_holdout(config)
        if config.holdout >= len(names):
            raise ConfigError(
                f"config.data.holdout: {config.holdout} of the {len(names)} images in {rest!r} "
                "leave none to train on"
            )
        held_out = set(sorted(names, key=_lot)[: config.holdout])
        names = [name for name in names if (name in held_out) != training]

    # One tensor, not a Python list: at 14 million names that is memory on every host.
    # Bytes, since a file system may hold names that aren't UTF-8.
    table = tf.constant([os.fsencode(name) for name in names])
    size = len(names)
    place = {each: number for number, each in enumerate(classes)}
    labels = tf.constant([place[each.split("/")[0]] for each in names] if classes else [], tf.int32)

    def name(index: int) -> str:
        return table[index].numpy().decode("utf-8", "backslashreplace")

    def load(index: tf.Tensor, *, window: Window | None = None) -> Element:
        data = tf.io.read_file(tf.strings.join([root, table[index]], separator="/"))
        image = decode_window(data, window=window, exif_orientation=config.exif_orientation)
        return {"image": image} | ({"label": labels[index]} if classes else {})

    fields = ("image", "label") if classes else ("image",)
    return Source(size=size, name=name, load=load, fields=fields, classes=classes)


def _class_folders(names: list[str]) -> tuple[str, ...]:
    """The first folders, sorted, as the classes; none where images lie beside them."""
    if any("/" not in name for name in names):
        return ()
    return tuple(sorted({name.split("/")[0] for name in names}))


def _lot(name: str) -> bytes:
    """A fixed lot drawn by name: adding files to a folder doesn't move the others in or out."""
    return hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()


def _list_images(root: str) -> list[str]:
    """Paths of all images under `root`, relative to it, sorted: the same on every host."""
    names, others = [], []
    for name in _walk(root):
        (names if name.lower().endswith(EXTENSIONS) else others).append(name)
    if others:
        logging.info(
            "%s: %d files are not images by their extension and are skipped, such as %s",
            root,
            len(others),
            ", ".join(sorted(others)[:3]),
        )
    return sorted(names)


def _walk(root: str) -> Iterator[str]:
    """All files under `root` but hidden ones, as relative paths with "/"; follows links."""
    if "://" in root:
        yield from _walk_remote(root, "")
        return
    seen = {os.path.realpath(root)}  # a link to a folder above would never end
    for folder, folders, files in os.walk(root, followlinks=True):
        kept = []
        for name in folders:
            real = os.path.realpath(os.path.join(folder, name))
            if not name.startswith(".") and real not in seen:
                seen.add(real)
                kept.append(name)
        folders[:] = kept
        relative = os.path.relpath(folder, root)
        prefix = "" if relative == "." else relative.replace(os.sep, "/") + "/"
        for name in files:
            if not name.startswith("."):
                yield prefix + name


def _walk_remote(root: str, prefix: str) -> Iterator[str]:
    """`_walk` for object stores. tf.io.gfile.walk would ask about each file over the network."""
    for entry in tf.io.gfile.listdir(f"{root.rstrip('/')}/{prefix}"):
        name = prefix + entry.rstrip("/")
        if not entry.rstrip("/") or entry.startswith("."):
            continue
        is_image = entry.lower().endswith(EXTENSIONS)
        if entry.endswith("/") or (
            not is_image and tf.io.gfile.isdir(f"{root.rstrip('/')}/{name}")
        ):
            yield from _walk_remote(root, name + "/")
        else:
            yield name


def _check_holdout(config: SourceConfig) -> None:
    check(
        config.holdout > 0,
        "config.data.holdout",
        "0 leaves no images to evaluate on; hold some out or give config.data.eval_source",
    )


# ---------------------------------------------------------------------------- prepared


def _open_prepared(
    rest: str, config: SourceConfig, *, setting: str, training: bool, separate: bool
) -> Source:
    opened = prepared.open_set(rest, setting=setting)
    places = np.arange(opened.size)
    if not separate:
        if not training:
            _check_holdout(config)
        check(
            config.holdout < opened.size,
            "config.data.holdout",
            f"{config.holdout} of the {opened.size} images in {rest!r} leave none to train on",
        )
        lots = places.tolist() if config.holdout else []
        held_out = np.isin(places, sorted(lots, key=lambda i: _lot(str(i)))[: config.holdout])
        places = places[held_out != training]
    table = tf.constant(places)
    labels = None if opened.labels is None else tf.constant(opened.labels[places])

    def load(index: tf.Tensor, *, window: Window | None = None) -> Element:
        data = tf.numpy_function(opened.read, [table[index]], tf.string, stateful=False)
        # Turned upright, where that was wanted, when it was prepared.
        image = decode_window(tf.ensure_shape(data, []), window=window, exif_orientation=False)
        return {"image": image} | ({} if labels is None else {"label": labels[index]})

    return Source(
        size=len(places),
        name=lambda index: f"{rest}, record {places[index]}",
        load=load,
        fields=("image",) if labels is None else ("image", "label"),
        classes=opened.classes,
        travels=False,
    )


# ---------------------------------------------------------------------------- TFDS


def _open_tfds(rest: str, config: SourceConfig, *, setting: str, training: bool) -> Source:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import read_only_builder

    if config.holdout and not config.eval_source:
        raise ConfigError(
            f"config.data.holdout: not for {config.source}: name the images to evaluate on with "
            "config.data.eval_split (TFDS can split a split: 'train[:5000]')"
        )
    split = config.split if training else config.eval_split
    try:
        # From the prepared files alone: no network, and nothing is downloaded by surprise.
        builder = read_only_builder.builder_from_files(
            rest, data_dir=os.environ.get("TFDS_DATA_DIR")
        )
    except tfds.core.DatasetNotFoundError:
        raise ConfigError(_tfds_missing(rest, setting=setting)) from None
    split_setting = "config.data.split" if training else "config.data.eval_split"
    try:
        size = builder.info.splits[split].num_examples
    except (KeyError, ValueError) as error:
        known = ", ".join(sorted(builder.info.splits))
        raise ConfigError(f"{split_setting}: {rest} has no {split!r}, but {known}") from error
    check(size > 0, split_setting, f"{split!r} of {rest} is empty")

    image_feature, label_feature = _tfds_features(builder, setting=setting)
    classes = tuple(builder.info.features[label_feature].names) if label_feature else ()
    wanted = {image_feature: True} | ({label_feature: True} if label_feature else {})
    partial = tfds.decode.PartialDecoding(
        wanted, decoders={image_feature: tfds.decode.SkipDecoding()}
    )

    def decode(data: tf.Tensor, label: tf.Tensor, *, window: Window | None) -> Element:
        image = decode_window(data, window=window, exif_orientation=config.exif_orientation)
        return {"image": image} | ({"label": tf.cast(label, tf.int32)} if label_feature else {})

    fields = ("image", "label") if label_feature else ("image",)
    if builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
        # (A data source takes no PartialDecoding.)
        records = builder.as_data_source(
            split=split, decoders={image_feature: tfds.decode.SkipDecoding()}
        )

        def read(index: int) -> tuple[bytes, int]:
            record = records[int(index)]
            return record[image_feature], record[label_feature] if label_feature else -1

        def load(index: tf.Tensor, *, window: Window | None = None) -> Element:
            data, label = tf.numpy_function(read, [index], [tf.string, tf.int64], stateful=False)
            return decode(tf.ensure_shape(data, []), tf.ensure_shape(label, []), window=window)

        name = f"{rest} {split}"
        return Source(
            size=size,
            name=lambda index: f"{name}, record {index}",
            load=load,
            fields=fields,
            classes=classes,
            travels=False,
        )

    logging.warning(
        "%s is stored as %s, which is read in order: batches then depend on the number of hosts, "
        "and a resumed run first reads its way to where it stopped. Prepare it with "
        "--file_format=array_record to avoid both.",
        rest,
        builder.info.file_format.value,
    )

    def sequence(*, seed: int | None, epoch: int, shard: int, shards: int) -> tf.data.Dataset:
        # Shards of equal size in training, so that all hosts have the same number of batches.
        parts = tfds.even_splits(split, n=shards, drop_remainder=seed is not None)
        start = sum(builder.info.splits[part].num_examples for part in parts[:shard])
        mixed = None
        if seed is not None:
            text = f"{seed} {epoch}".encode()
            mixed = int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big") >> 1
        records = builder.as_dataset(
            split=parts[shard],
            shuffle_files=seed is not None,
            decoders=partial,
            read_config=tfds.ReadConfig(
                shuffle_seed=mixed, try_autocache=False, skip_prefetch=True
            ),
        )
        if mixed is not None:
            records = records.shuffle(SHUFFLE_RECORDS, seed=mixed)

        def named(place: tf.Tensor, record: Element) -> Element:
            label = {"label": record[label_feature]} if label_feature else {}
            return {"index": start + place, "data": record[image_feature]} | label

        return records.enumerate().map(named)

    return Source(
        size=size,
        name=lambda index: f"{rest} {split}, image {index} in that epoch's order",
        load=lambda record, *, window=None: decode(
            record["data"], record.get("label"), window=window
        ),
        fields=fields,
        classes=classes,
        sequence=sequence,
    )


def _tfds_features(builder, *, setting: str) -> tuple[str, str | None]:
    """Names of the image feature and, where there is one, of the class label."""
    import tensorflow_datasets as tfds

    features = dict(builder.info.features.items())
    images = [name for name, each in features.items() if isinstance(each, tfds.features.Image)]
    labels = [name for name, each in features.items() if isinstance(each, tfds.features.ClassLabel)]
    if not images:
        raise ConfigError(
            f"{setting}: {builder.name} has no image feature, but {', '.join(sorted(features))}"
        )
    image = "image" if "image" in images else images[0]
    label = "label" if "label" in labels else (labels[0] if len(labels) == 1 else None)
    return image, label


def _tfds_missing(name: str, *, setting: str) -> str:
    folder = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    data_set = name.split("/")[0].split(":")[0]
    message = (
        f"{setting}: no prepared data set {name!r} in {folder} ($TFDS_DATA_DIR). Prepare it once, "
        f"on a machine with a CPU: `tfds build {data_set} --file_format=array_record "
        f"--data_dir={folder}`, copying it to gs:// afterwards if hosts share it there"
    )
    if data_set == "imagenet2012":
        message += (
            "; imagenet2012 needs ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar (from "
            f"image-net.org, with an account, unmodified) in {folder}/downloads/manual first"
        )
    return message


# ---------------------------------------------------------------------------- decoding


@tf.function(autograph=False, reduce_retracing=True)  # traced once, not with every pipeline
def decode_image(data: tf.Tensor, *, exif_orientation: bool) -> tf.Tensor:
    """Decodes a JPEG, PNG, BMP, GIF (first frame) or WebP as Pillow's convert("RGB") does.

    The format is told by content, not by name. Alpha is dropped; of 16 bits the high 8 stay (where
    Pillow clips grey ones). JPEG uses the accurate inverse DCT, which equals Pillow's bit for bit.

    Args:
      data: string scalar, the file's content.
      exif_orientation: turn JPEGs upright as PIL.ImageOps.exif_transpose does. (The official loader
        does not.)

    Returns:
      uint8 [h, w, 3].

    Raises:
      tf.errors.InvalidArgumentError: the data is not such an image or is incomplete. Animated WebP
        and BMP with fewer than 8 bits a pixel are not supported by TensorFlow and end here too.
    """

    def jpeg() -> tf.Tensor:
        image = tf.io.decode_jpeg(data, channels=3, dct_method="INTEGER_ACCURATE")
        return _turn_upright(image, data) if exif_orientation else image

    def other() -> tf.Tensor:
        header = tf.io.decode_raw(_pad(tf.strings.substr(data, 0, 32), 32), tf.uint8)
        start, kind = header[:4], header[8:16]
        is_webp = _equal(start, b"RIFF") & _equal(kind[:4], b"WEBP")
        is_palette_bmp = _equal(start[:2], b"BM") & (header[28] == 8) & (header[29] == 0)
        return tf.case(
            [
                (is_webp, lambda: _decode_webp(data, header)),
                (is_palette_bmp, lambda: _decode_palette_bmp(data)),
            ],
            default=lambda: tf.io.decode_image(data, channels=3, expand_animations=False),
            exclusive=True,
        )

    image = tf.cond(_equal_bytes(data, b"\xff\xd8\xff"), jpeg, other)
    return tf.ensure_shape(image, [None, None, 3])


def decode_window(data: tf.Tensor, *, window: Window | None, exif_orientation: bool) -> tf.Tensor:
    """Decodes a part of an image.

    Of a JPEG that lies upright nothing but that part is decoded, at a half, a quarter or an eighth
    of the resolution where `Window.side` allows; of any other image everything.

    Args:
      data: string scalar, the file's content.
      window: the part; None: all of it.
      exif_orientation: as for `decode_image`.

    Returns:
      uint8 [h, w, 3].

    Raises:
      tf.errors.InvalidArgumentError: as `decode_image` does.
    """
    if window is None:
        return decode_image(data, exif_orientation=exif_orientation)

    def whole() -> tf.Tensor:
        return _cut(decode_image(data, exif_orientation=exif_orientation), window=window)

    def part() -> tf.Tensor:
        height, width, _ = tf.unstack(tf.io.extract_jpeg_shape(data))
        box = window.box(height, width)
        shorter = tf.reduce_min(box[2:])

        def at(ratio: int) -> tf.Tensor:
            return tf.image.decode_and_crop_jpeg(
                data, box // ratio, channels=3, ratio=ratio, dct_method="INTEGER_ACCURATE"
            )

        halvings = sum(tf.cast(shorter >= ratio * window.side, tf.int32) for ratio in (2, 4, 8))
        return tf.switch_case(halvings, [lambda r=ratio: at(r) for ratio in (1, 2, 4, 8)])

    upright = _equal_bytes(data, b"\xff\xd8\xff")
    if exif_orientation:
        upright = tf.cond(upright, lambda: _stored_upright(data), lambda: False)
    return tf.ensure_shape(tf.cond(upright, part, whole), [None, None, 3])


def _stored_upright(data: tf.Tensor) -> tf.Tensor:
    return exif_orientation(data) == 1


def _cut(image: tf.Tensor, *, window: Window | None) -> tf.Tensor:
    if window is None:
        return image
    top, left, height, width = tf.unstack(window.box(*tf.unstack(tf.shape(image)[:2])))
    return image[top : top + height, left : left + width]


def _equal_bytes(data: tf.Tensor, start: bytes) -> tf.Tensor:
    return tf.strings.substr(data, 0, len(start)) == start


def _equal(values: tf.Tensor, text: bytes) -> tf.Tensor:
    return tf.reduce_all(values == tf.constant(list(text), values.dtype))


def _pad(data: tf.Tensor, length: int) -> tf.Tensor:
    """The string, filled up with zero bytes to at least `length`, then cut to it."""
    return tf.strings.substr(tf.strings.join([data, tf.constant(b"\0" * length)]), 0, length)


def _decode_webp(data: tf.Tensor, header: tf.Tensor) -> tf.Tensor:
    """Decodes a WebP, whose channels TensorFlow wants to be told beforehand.

    Three channels make TensorFlow 2.21 refuse an animation. With "as many as there are" it corrupts
    the heap and the process dies, so that must never be asked for.
    """
    flags = tf.cast(header[20], tf.int32)
    extended = _equal(header[12:16], b"VP8X")
    animated = extended & (flags & 0x02 != 0)
    has_alpha = (extended & (flags & 0x10 != 0)) | (
        _equal(header[12:16], b"VP8L") & (tf.cast(header[24], tf.int32) & 0x10 != 0)
    )
    return tf.cond(
        has_alpha & ~animated,
        lambda: tf.io.decode_webp(data, channels=4)[0, ..., :3],  # [frame, h, w, channel]
        lambda: tf.io.decode_webp(data, channels=3)[0],
    )


def _decode_palette_bmp(data: tf.Tensor) -> tf.Tensor:
    """Decodes a BMP of 8 bits a pixel, of which TensorFlow returns the places in the palette."""
    places = tf.io.decode_bmp(data)[..., 0]
    info_size = tf.io.decode_raw(tf.strings.substr(data, 14, 4), tf.int32)[0]
    pixels_start = tf.io.decode_raw(tf.strings.substr(data, 10, 4), tf.int32)[0]
    size = tf.minimum((pixels_start - 14 - info_size) // 4 * 4, 1024)
    palette = tf.io.decode_raw(_pad(tf.strings.substr(data, 14 + info_size, size), 1024), tf.uint8)
    palette = tf.reshape(palette, [256, 4])[:, 2::-1]  # stored as blue, green, red, unused
    return tf.gather(palette, tf.cast(places, tf.int32))


def _turn_upright(image: tf.Tensor, data: tf.Tensor) -> tf.Tensor:
    """Undoes the rotation and mirroring that a JPEG's EXIF block tells of."""
    orientation = exif_orientation(data)

    def turn() -> tf.Tensor:
        turned = tf.cond(orientation >= 5, lambda: tf.transpose(image, [1, 0, 2]), lambda: image)

        def mirror(image: tf.Tensor, axis: int, *orientations: int) -> tf.Tensor:
            wanted = tf.reduce_any(orientation == tf.constant(orientations))
            return tf.cond(wanted, lambda: tf.reverse(image, [axis]), lambda: image)

        return mirror(mirror(turned, 1, 2, 3, 6, 7), 0, 3, 4, 7, 8)

    return tf.cond(orientation > 1, turn, lambda: image)


def exif_orientation(data: tf.Tensor) -> tf.Tensor:
    """Reads the EXIF orientation of a JPEG.

    Args:
      data: string scalar, the file's content.

    Returns:
      int32 scalar in 1..8; 1 (upright) also where there is no such tag or it makes no sense.
    """
    length = tf.strings.length(data)

    def segment(start: tf.Tensor) -> tf.Tensor:
        """The ten bytes of a segment's marker, length and kind; zeros past the end."""
        start = tf.minimum(start, length)
        return tf.io.decode_raw(_pad(tf.strings.substr(data, start, 10), 10), tf.uint8)

    def is_other_application(head: tf.Tensor) -> tf.Tensor:
        marker = (head[0] == 0xFF) & (head[1] >= 0xE0) & (head[1] <= 0xEF)
        return marker & ~is_exif(head)

    def is_exif(head: tf.Tensor) -> tf.Tensor:
        return (head[1] == 0xE1) & _equal(head[4:10], b"Exif\0\0")

    def size(head: tf.Tensor) -> tf.Tensor:
        head = tf.cast(head, tf.int32)
        return head[2] * 256 + head[3]

    def search() -> tf.Tensor:
        # Application segments come first in the file; most files have one or two.
        first = tf.constant(2)
        start, head = tf.while_loop(
            lambda start, head: is_other_application(head),
            lambda start, head: (start + 2 + size(head), segment(start + 2 + size(head))),
            [first, segment(first)],
            maximum_iterations=32,
        )

        def parse() -> tf.Tensor:
            block = tf.strings.substr(data, start + 10, tf.maximum(size(head) - 8, 0))
            return _tiff_orientation(tf.cast(tf.io.decode_raw(block, tf.uint8), tf.int32))

        return tf.cond(is_exif(head), parse, lambda: tf.constant(1))

    # Most files have a JFIF segment of sixteen bytes and no other: two looks instead of a loop.
    begin = tf.io.decode_raw(_pad(tf.strings.substr(data, 2, 20), 20), tf.uint8)
    another = (begin[18] == 0xFF) & (begin[19] >= 0xE0) & (begin[19] <= 0xEF)
    jfif_alone = tf.reduce_all(begin[:4] == tf.constant([0xFF, 0xE0, 0, 16], tf.uint8)) & ~another
    return tf.cond(jfif_alone, lambda: tf.constant(1), search)


def _tiff_orientation(block: tf.Tensor) -> tf.Tensor:
    """The orientation tag of a TIFF block's first directory; `block` is int32 [bytes]."""
    length = tf.size(block)
    padded = tf.concat([block, tf.zeros([16], tf.int32)], 0)
    little = padded[0] == ord("I")

    def number(values: tf.Tensor, places: int) -> tf.Tensor:
        """Numbers from bytes [..., places] in the block's byte order."""
        rising = tf.constant([256**place for place in range(places)])
        return tf.reduce_sum(values * tf.where(little, rising, rising[::-1]), -1)

    directory = number(padded[4:8], 4)
    directory = tf.where((directory >= 8) & (directory < length), directory, length)
    count = number(padded[directory : directory + 2], 2)
    count = tf.maximum(tf.minimum(count, (length - directory - 2) // 12), 0)
    entries = tf.reshape(padded[directory + 2 : directory + 2 + 12 * count], [-1, 12])
    is_orientation = number(entries[:, 0:2], 2) == 0x0112
    values = tf.boolean_mask(number(entries[:, 8:10], 2), is_orientation)
    orientation = tf.concat([values, [1]], 0)[0]
    return tf.where((orientation >= 1) & (orientation <= 8), orientation, 1)
