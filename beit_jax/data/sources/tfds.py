"""A TensorFlow Datasets (TFDS) data set with an image feature, prepared beforehand.

Prepared as ArrayRecord it is read at random. Prepared as TFRecord it can only be read in order, in
shards of its own, see `Source.sequence`.
"""

import dataclasses
import hashlib
import os
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from beit_jax.config import ConfigError, check
from beit_jax.config.parse import shown
from beit_jax.data.decode import Window, decode_element
from beit_jax.data.label_maps import decode_labels
from beit_jax.data.sources.source import Element, Request, Source

# A sequential source draws at random from this many records in memory (about 110 kB each in
# ImageNet).
SHUFFLE_RECORDS = 4096
# What data sets call the image that is a label map.
MAPS = ("segmentation", "annotation", "segmentation_mask", "segmentation_label", "label_map")


def open_tfds(request: Request) -> Source:
    """Opens "tfds:NAME" with the split of the settings.

    Raises:
      ConfigError: the data set is not prepared, has no image feature or no such split, or images
        are to be held out of it.
    """
    # Here and not above: the import takes seconds, and only TFDS data sets need it.
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import read_only_builder

    name, config = request.value, request.config
    if config.holdout and request.withholds:
        raise ConfigError(
            f"config.data.holdout: not for {config.source}: name the images to evaluate on with "
            "config.data.eval_split (TFDS can split a split: 'train[:5000]')"
        )
    try:
        # From the prepared files alone: no network, and nothing is downloaded by surprise.
        builder = read_only_builder.builder_from_files(
            name, data_dir=os.environ.get("TFDS_DATA_DIR")
        )
    except tfds.core.DatasetNotFoundError:
        raise ConfigError(_how_to_prepare(name, setting=request.setting)) from None
    split = config.split if request.training else config.eval_split
    split_setting = "config.data.split" if request.training else "config.data.eval_split"
    try:
        size = builder.info.splits[split].num_examples
    except (KeyError, ValueError) as error:
        known = ", ".join(sorted(builder.info.splits))
        raise ConfigError(f"{split_setting}: {name} has no {shown(split)}, but {known}") from error
    check(size > 0, split_setting, f"{shown(split)} of {name} is empty")

    image_feature, label_feature, map_feature = _features(
        builder, setting=request.setting, label_maps=request.label_maps
    )
    records = _Records(
        builder=builder,
        name=name,
        split=split,
        size=size,
        image_feature=image_feature,
        label_feature=label_feature,
        map_feature=map_feature,
        exif_orientation=config.exif_orientation,
        max_pixels=config.max_pixels,
    )
    if builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
        return _random_access(records)
    logging.warning(
        "%s is stored as %s, which is read in order: batches then depend on the number of hosts, "
        "and a resumed run first reads its way to where it stopped. Prepare it with "
        "--file_format=array_record to avoid both.",
        name,
        builder.info.file_format.value,
    )
    return _in_order(records)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Records:
    """One split of a data set, whose images are still encoded.

    Attributes:
      builder: TFDS' builder of the data set.
      name, split: of the data set.
      size: records in the split.
      image_feature: the name of the image feature.
      label_feature: the name of the class label; None where there is none.
      map_feature: the name of the label map; None where there is none, or the job reads none.
      exif_orientation: turn photographs upright.
      max_pixels: that an image may have.
    """

    builder: Any
    name: str
    split: str
    size: int
    image_feature: str
    label_feature: str | None
    map_feature: str | None
    exif_orientation: bool
    max_pixels: int

    @property
    def encoded(self) -> list[str]:
        """The features that are read as the files they were: the image and, if read, the map."""
        return [name for name in (self.image_feature, self.map_feature) if name]

    @property
    def fields(self) -> tuple[str, ...]:
        label = ("label",) if self.label_feature else ()
        return ("image", *label, *(("segmentation",) if self.map_feature else ()))

    @property
    def classes(self) -> tuple[str, ...]:
        if not self.label_feature:
            return ()
        return tuple(self.builder.info.features[self.label_feature].names)

    @property
    def segmentation_classes(self) -> tuple[str, ...]:
        """A map's names, where TFDS has them (its feature LabeledImage)."""
        if not self.map_feature:
            return ()
        return tuple(getattr(self.builder.info.features[self.map_feature], "names", None) or ())

    def decode(
        self, files: tf.Tensor, label: tf.Tensor | None, *, window: Window | None
    ) -> Element:
        """What `Source.load` returns, of the encoded image and map, string [1 or 2]."""
        element = decode_element(
            files[0],
            window=window,
            exif_orientation=self.exif_orientation,
            max_pixels=self.max_pixels,
        )
        if self.label_feature:
            element["label"] = tf.cast(label, tf.int32)
        if self.map_feature:
            element["segmentation"] = decode_labels(files[1], max_pixels=self.max_pixels)
        return element


def _random_access(records: _Records) -> Source:
    """A source of ArrayRecord files."""
    import tensorflow_datasets as tfds

    encoded, label_feature = records.encoded, records.label_feature
    # (A data source takes no PartialDecoding.)
    stored = records.builder.as_data_source(
        split=records.split, decoders={name: tfds.decode.SkipDecoding() for name in encoded}
    )

    def read(index: int) -> tuple[np.ndarray, int]:
        record = stored[int(index)]
        files = np.array([record[name] for name in encoded], object)
        return files, record[label_feature] if label_feature else -1

    def load(index: tf.Tensor, *, window: Window | None = None) -> Element:
        files, label = tf.numpy_function(read, [index], [tf.string, tf.int64], stateful=False)
        files = tf.ensure_shape(files, [len(encoded)])
        return records.decode(files, tf.ensure_shape(label, []), window=window)

    return Source(
        size=records.size,
        name=lambda index: f"{records.name} {records.split}, record {index}",
        load=load,
        fields=records.fields,
        classes=records.classes,
        segmentation_classes=records.segmentation_classes,
        portable=False,
    )


def _in_order(records: _Records) -> Source:
    """A source of files that can only be read from front to back."""
    import tensorflow_datasets as tfds

    builder, encoded, label_feature = records.builder, records.encoded, records.label_feature
    wanted = dict.fromkeys([*encoded, *([label_feature] if label_feature else [])], True)
    partial = tfds.decode.PartialDecoding(
        wanted, decoders={name: tfds.decode.SkipDecoding() for name in encoded}
    )

    def sequence(*, seed: int | None, epoch: int, shard: int, shards: int) -> tf.data.Dataset:
        # Shards of equal size in training, so that all hosts have the same number of batches.
        parts = tfds.even_splits(records.split, n=shards, drop_remainder=seed is not None)
        start = sum(builder.info.splits[part].num_examples for part in parts[:shard])
        shuffle_seed = None
        if seed is not None:
            text = f"{seed} {epoch}".encode()
            shuffle_seed = int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big") >> 1
        dataset = builder.as_dataset(
            split=parts[shard],
            shuffle_files=seed is not None,
            decoders=partial,
            read_config=tfds.ReadConfig(
                shuffle_seed=shuffle_seed, try_autocache=False, skip_prefetch=True
            ),
        )
        if shuffle_seed is not None:
            dataset = dataset.shuffle(SHUFFLE_RECORDS, seed=shuffle_seed)

        def with_index(position: tf.Tensor, record: Element) -> Element:
            label = {"label": record[label_feature]} if label_feature else {}
            files = tf.stack([record[name] for name in encoded])
            return {"index": start + position, "files": files} | label

        return dataset.enumerate().map(with_index)

    return Source(
        size=records.size,
        name=lambda index: f"{records.name} {records.split}, image {index} in that epoch's order",
        load=lambda record, *, window=None: records.decode(
            record["files"], record.get("label"), window=window
        ),
        fields=records.fields,
        classes=records.classes,
        segmentation_classes=records.segmentation_classes,
        sequence=sequence,
    )


def _features(
    builder: Any, *, setting: str, label_maps: bool
) -> tuple[str, str | None, str | None]:
    """The names of the image feature and, where there are such, of class label and label map."""
    import tensorflow_datasets as tfds

    features = dict(builder.info.features.items())
    images = [name for name, kind in features.items() if isinstance(kind, tfds.features.Image)]
    maps = [
        *(name for name in MAPS if name in images),
        *(name for name in images if isinstance(features[name], tfds.features.LabeledImage)),
    ]
    labels = [name for name, kind in features.items() if isinstance(kind, tfds.features.ClassLabel)]
    pictures = [name for name in images if name not in maps]
    if not pictures:
        raise ConfigError(
            f"{setting}: {builder.name} has no image feature, but {', '.join(sorted(features))}"
        )
    if label_maps and not maps:
        raise ConfigError(
            f"{setting}: {builder.name} has no label maps: none of its images is called"
            f" {', '.join(MAPS)}, or is a LabeledImage, but it has {', '.join(sorted(features))}"
        )
    image = "image" if "image" in pictures else pictures[0]
    label = "label" if "label" in labels else (labels[0] if len(labels) == 1 else None)
    return image, label, maps[0] if label_maps else None


def _how_to_prepare(name: str, *, setting: str) -> str:
    """The error message for a data set that is not prepared."""
    folder = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    data_set = name.split("/")[0].split(":")[0]
    message = (
        f"{setting}: no prepared data set {shown(name)} in {folder} ($TFDS_DATA_DIR). Prepare it "
        f"once, on a machine with a CPU: `tfds build {data_set} --file_format=array_record "
        f"--data_dir={folder}`, copying it to gs:// afterwards if hosts share it there"
    )
    if data_set == "imagenet2012":
        message += (
            "; imagenet2012 needs ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar (from "
            f"image-net.org, with an account, unmodified) in {folder}/downloads/manual first"
        )
    return message
