"""Where images come from: made by code, files, a prepared set, or a TFDS data set.

`open_source` turns `config.source` into a `Source`: a number of images, a name for each, and a
function that loads one inside a tf.data graph.

    source = open_source(DataConfig(source="folder:/data/photos", holdout=500), training=True)
    len(source), source.name(7)
    source.load(tf.constant(7, tf.int64))["image"]  # uint8 [h, w, 3]

Any image can be loaded by its index at any time, so that the order of the data can be computed
instead of stored. The exception is a TFDS data set prepared as TFRecord, which can only be read
from front to back; see `Source.sequence`.

Each kind is one file with one function from a `Request` to a `Source`, and one row of `KINDS` in
`data/source_kinds.py`.
"""

import tensorflow as tf

from beit_jax.config import SourceConfig
from beit_jax.data.decode import Window
from beit_jax.data.source_kinds import KINDS, Kind, split_source
from beit_jax.data.sources.source import Element, Request, Source, spread

__all__ = ["KINDS", "Element", "Kind", "Request", "Source", "Window", "open_source", "spread"]

# TensorFlow only feeds the run here: it must not take the accelerators' memory away from JAX. This
# has to be set before TensorFlow first runs anything, hence on import.
tf.config.set_visible_devices([], "GPU")


def open_source(config: SourceConfig, *, training: bool) -> Source:
    """Opens the training or the evaluation images.

    Evaluation images are `eval_source` where it is given. Otherwise they are `holdout` images of
    `source`: further indices of the embedded set, or images of a folder or prepared set that
    training never sees. Of a TFDS data set they are the split `eval_split`.

    Raises:
      ConfigError: the source is unknown, missing or empty, or nothing is left to train on or to
        evaluate on. The message names the setting.
    """
    setting, text = "config.data.source", config.source
    if not training and config.eval_source:
        setting, text = "config.data.eval_source", config.eval_source
    kind, value = split_source(text, setting=setting)
    return kind.open(Request(value=value, setting=setting, config=config, training=training))
