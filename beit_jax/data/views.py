"""How each job turns an image into tensors: `Views` for the pipeline."""

import dataclasses

import tensorflow as tf

from beit_jax.config import DataConfig, LabelledDataConfig, SegmentDataConfig
from beit_jax.data import augment, classify_views, label_maps, masking, segment_views
from beit_jax.data.decode import Window
from beit_jax.data.pipeline import Views
from beit_jax.data.sources import Element


def pretraining_views(config: DataConfig, *, grid: int, keys: tuple[str, ...]) -> Views:
    """Views for pre-training and the tokenizer.

    Args:
      config: view sizes, augmentation, masks.
      grid: patches along one side of view 1.
      keys: the parts of a batch that are needed; nothing else is made.
        image: uint8 [image_size, image_size, 3], view 1.
        token_image: uint8 [token_image_size, token_image_size, 3], view 2.
        mask: bool [grid, grid], True where the patch is hidden.
        label: int32 scalar; segmentation: uint8 [image_size, image_size]. Of sources that have
          them.
        Training batches of the fast mode also have `factors` and `order`, from which the device
        makes the colour jitter (`training/device_jitter.py`).

    Raises:
      ConfigError: the masks don't fit the grid.
    """
    if "mask" in keys:
        masking.check_masks(config.mask, grid=grid)

    def masks(batch: Element) -> Element:
        if "mask" not in keys:
            return {}
        drawn = masking.draw_masks(batch["key"], config=config.mask, grid=grid)
        return {"mask": tf.ensure_shape(drawn, [batch["key"].shape[0], grid, grid])}

    views = _Pretraining(config=config, keys=keys)
    fast = config.augment.fidelity == "fast" and any(views.sizes.values())
    return Views(
        training=views.fast_training if fast else views.training,
        evaluation=views.evaluation,
        batch=masks,
        fields=tuple(key for key in keys if key in ("label", "segmentation")),
        window=views.window if fast else None,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Pretraining:
    """The views of one image; attributes as for `pretraining_views`."""

    config: DataConfig
    keys: tuple[str, ...]

    @property
    def sizes(self) -> dict[str, int | None]:
        """Sides of the two views in pixels; None for a view that is not needed."""
        return {
            "image_size": self.config.image_size if "image" in self.keys else None,
            "token_image_size": (
                self.config.token_image_size if "token_image" in self.keys else None
            ),
        }

    def training(self, loaded: Element, key: tf.Tensor) -> Element:
        """Views as Pillow makes them, jitter included."""
        parameters = self._draw(key, **_size(loaded["image"]))
        views = augment.apply_views(loaded["image"], parameters=parameters, **self.sizes)
        return views | self._extras(loaded, parameters)

    def fast_training(self, loaded: Element, key: tf.Tensor) -> Element:
        """Views of an image that is only the crop; a segmentation is still whole."""
        if "segmentation" in self.keys:
            parameters = self._draw(key, **_size(loaded["segmentation"]))
        else:
            parameters = augment.draw_jitter_and_flip(two_numbers(key), config=self.config.augment)
        views = augment.fast_views(loaded["image"], parameters=parameters, **self.sizes)
        return views | self._extras(loaded, parameters)

    def window(self, key: tf.Tensor) -> Window:
        """The crop that `fast_training` takes."""

        def box(height: tf.Tensor, width: tf.Tensor) -> tf.Tensor:
            parameters = self._draw(key, height=height, width=width)
            return augment.unflipped_box(parameters, width=width)

        return Window(box=box, side=max(side for side in self.sizes.values() if side))

    def evaluation(self, loaded: Element) -> Element:
        """Views without anything random."""
        image = loaded["image"]
        views = augment.eval_views(image, **self.sizes)
        return views | self._extras(loaded, augment.eval_parameters(**_size(image)))

    def _draw(self, key: tf.Tensor, *, height: tf.Tensor, width: tf.Tensor) -> augment.Parameters:
        return augment.draw_parameters(
            two_numbers(key), height=height, width=width, config=self.config.augment
        )

    def _extras(self, loaded: Element, parameters: augment.Parameters) -> Element:
        extras = {"label": loaded["label"]} if "label" in self.keys else {}
        if "segmentation" in self.keys:
            extras["segmentation"] = augment.apply_segmentation(
                loaded["segmentation"], parameters=parameters, size=self.config.image_size
            )
        return extras


def _size(image: tf.Tensor) -> dict[str, tf.Tensor]:
    height, width = tf.unstack(tf.shape(image)[:2])
    return {"height": height, "width": width}


def classification_views(config: LabelledDataConfig) -> Views:
    """Views for classification: image, uint8 [image_size, image_size, 3], and label, int32."""

    def training(loaded: Element, key: tf.Tensor) -> Element:
        image = classify_views.training_view(
            loaded["image"],
            two_numbers(key),
            config=config.augment,
            image_size=config.image_size,
            normalization=config.normalization,
        )
        return {"image": image, "label": loaded["label"]}

    def evaluation(loaded: Element) -> Element:
        image = classify_views.eval_view(
            loaded["image"], image_size=config.image_size, crop=config.augment.eval_crop
        )
        return {"image": image, "label": loaded["label"]}

    return Views(training=training, evaluation=evaluation, fields=("label",))


def segmentation_views(config: SegmentDataConfig, *, classes: int) -> Views:
    """Views for semantic segmentation.

    In training as `segment_views.training_view` makes them. In evaluation as they are: `image`
    uint8 [h, w, 3] and `segmentation` uint8 [h, w], of which only batches of one can be made. In
    maps 255 is what neither trains nor counts; of a grey image, which stands for one that can't be
    used, that is all of it.

    Args:
      config: crop, scales and ranges, and which label is ignored.
      classes: the number of classes; a map with another label makes a bad image.
    """

    def accept(loaded: Element) -> Element:
        return label_maps.with_classes(loaded, config=config, classes=classes)

    def training(loaded: Element, key: tf.Tensor) -> Element:
        return segment_views.training_view(
            loaded["image"], loaded["segmentation"], two_numbers(key), config=config
        )

    def evaluation(loaded: Element) -> Element:
        return {name: loaded[name] for name in ("image", "segmentation")}

    return Views(training=training, evaluation=evaluation, fields=("segmentation",), accept=accept)


def two_numbers(key: tf.Tensor) -> tf.Tensor:
    """Packs (seed, epoch, index) into the two numbers that seed TensorFlow's generator.

    Seed and epoch are under 2**31.
    """
    seed, epoch, index = tf.unstack(key)
    return tf.stack([tf.bitwise.left_shift(seed, 32) + epoch, index])
