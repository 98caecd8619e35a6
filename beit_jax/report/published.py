"""What published runs of BEiT reached: points that a run of the same recipe can be held against."""

import dataclasses

from beit_jax.report.reading import Run

IMAGENET_IMAGES = 1_281_167
_NAMES = ("imagenet2012", "imagenet-1k", "imagenet1k", "ilsvrc2012")  # in a source, of ImageNet-1k
# How far a run may be off, ours to choose: each point is one run's, rounded as it was published.
LOSS_BAND, ACCURACY_BAND = 0.1, 0.1  # nats; a share of the accuracy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """A published point of a training curve, of masked images in training.

    Attributes:
      epochs: of the whole recipe, on which the learning rate depends.
      epoch: of the point.
      loss: nats per masked patch.
      accuracy: of masked tokens, 0..1.
      grad_norm: before clipping.
      source: where it stands.
    """

    epochs: int
    epoch: int
    loss: float
    accuracy: float
    grad_norm: float
    source: str


# Base model, ImageNet-1k, DALL-E's tokens, block masks.
POINTS = (
    Point(
        epochs=300,
        epoch=300,
        loss=6.299,
        accuracy=0.0496,
        grad_norm=0.42,
        source="https://github.com/microsoft/unilm/issues/383",
    ),
    Point(
        epochs=800,
        epoch=115,
        loss=6.59,
        accuracy=0.0345,
        grad_norm=0.39,
        source="https://github.com/microsoft/unilm/issues/598",
    ),
)


def points_for(run: Run) -> list[tuple[int, Point]]:
    """The points that hold for a run, with the steps at which the run is there.

    They hold for the base model at 224 pixels with DALL-E's tokens, trained on ImageNet-1k for as
    many epochs, within 5 %.
    """
    source = run.setting("data.source")
    alike = (
        run.task == "pretrain"
        and run.setting("tokenizer.kind") == "dalle"
        and run.setting("tokenizer.random_weights") is not True
        and run.setting("model.layers") == 12
        and run.setting("model.width") == 768
        and run.setting("model.image_size") == 224
        and run.setting("model.patch_size") == 16
        and run.setting("data.mask.kind") == "block"
        and isinstance(source, str)
        and any(name in source.lower() for name in _NAMES)
    )
    batch, steps = run.setting("run.batch_size"), run.setting("run.steps")
    if not (alike and isinstance(batch, int) and isinstance(steps, int) and batch > 0):
        return []
    per_epoch = IMAGENET_IMAGES / batch
    epochs = steps / per_epoch
    return [
        (round(point.epoch * per_epoch), point)
        for point in POINTS
        if abs(epochs - point.epochs) <= 0.05 * point.epochs
    ]
