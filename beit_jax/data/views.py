"""What each job makes of an image: `Views` for the pipeline."""

import tensorflow as tf

from beit_jax.config import DataConfig, LabelledDataConfig
from beit_jax.data import augment, classify_views, masking
from beit_jax.data.pipeline import Views
from beit_jax.data.sources import Element, Window


def pretraining_views(config: DataConfig, *, grid: int, keys: tuple[str, ...]) -> Views:
    """Views for pre-training and the tokenizer.

    Args:
      config: view sizes, augmentation, masks.
      grid: patches along one side of view 1.
      keys: what is wanted, nothing else is made:
        image: uint8 [image_size, image_size, 3], view 1.
        token_image: uint8 [token_image_size, token_image_size, 3], view 2.
        mask: bool [grid, grid], True where the patch is hidden.
        label: int32 scalar; segmentation: uint8 [image_size, image_size]. Of sources that have
          them.
        Training batches of the fast mode also have `factors` and `order`, the jitter that the
        device is to do (`training/device_jitter.py`).

    Raises:
      ConfigError: the masks don't fit the grid.
    """
    if "mask" in keys:
        masking.check_masks(config.mask, grid=grid)

    def extras(loaded: Element, parameters: augment.Parameters) -> Element:
        result = {"label": loaded["label"]} if "label" in keys else {}
        if "segmentation" in keys:
            result["segmentation"] = augment.apply_segmentation(
                loaded["segmentation"], parameters=parameters, size=config.image_size
            )
        return result

    def size(image: tf.Tensor) -> dict[str, tf.Tensor]:
        height, width = tf.unstack(tf.shape(image)[:2])
        return {"height": height, "width": width}

    sizes = {
        "image_size": config.image_size if "image" in keys else None,
        "token_image_size": config.token_image_size if "token_image" in keys else None,
    }

    def draw(key: tf.Tensor, **full_size: tf.Tensor) -> augment.Parameters:
        return augment.draw_parameters(two_numbers(key), **full_size, config=config.augment)

    def training(loaded: Element, key: tf.Tensor) -> Element:
        parameters = draw(key, **size(loaded["image"]))
        views = augment.apply_views(loaded["image"], parameters=parameters, **sizes)
        return views | extras(loaded, parameters)

    def fast_training(loaded: Element, key: tf.Tensor) -> Element:
        # The image is the crop already; a segmentation is still whole.
        if "segmentation" in keys:
            parameters = draw(key, **size(loaded["segmentation"]))
        else:
            parameters = augment.draw_jitter_and_flip(two_numbers(key), config=config.augment)
        views = augment.fast_views(loaded["image"], parameters=parameters, **sizes)
        return views | extras(loaded, parameters)

    def window(key: tf.Tensor) -> Window:
        def box(height: tf.Tensor, width: tf.Tensor) -> tf.Tensor:
            parameters = draw(key, height=height, width=width)
            return augment.unflipped_box(parameters, width=width)

        return Window(box=box, side=max(side for side in sizes.values() if side))

    def evaluation(loaded: Element) -> Element:
        image = loaded["image"]
        views = augment.eval_views(image, **sizes)
        return views | extras(loaded, augment.eval_parameters(**size(image)))

    def masks(batch: Element) -> Element:
        if "mask" not in keys:
            return {}
        drawn = masking.draw_masks(batch["key"], config=config.mask, grid=grid)
        return {"mask": tf.ensure_shape(drawn, [batch["key"].shape[0], grid, grid])}

    fields = tuple(key for key in keys if key in ("label", "segmentation"))
    if config.augment.fidelity == "fast" and any(sizes.values()):
        return Views(
            training=fast_training,
            evaluation=evaluation,
            batch=masks,
            fields=fields,
            window=window,
        )
    return Views(training=training, evaluation=evaluation, batch=masks, fields=fields)


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


def two_numbers(key: tf.Tensor) -> tf.Tensor:
    """(seed, epoch, index) as the two numbers that seed TensorFlow's generator.

    Seed and epoch are under 2**31.
    """
    seed, epoch, index = tf.unstack(key)
    return tf.stack([tf.bitwise.left_shift(seed, 32) + epoch, index])
