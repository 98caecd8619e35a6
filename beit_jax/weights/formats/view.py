"""How an image becomes a model's input in evaluation: what formats say of it besides mean and std.

Kept with an imported checkpoint as plain JSON, so that any format can be written from any other.
"""

import dataclasses

from beit_jax.config import ConfigError, check, one_of
from beit_jax.config.facts import value_of
from beit_jax.preprocessing import official_crop
from beit_jax.types import JsonObject

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """The view that a model is evaluated on.

    Attributes:
      interpolation: one of `INTERPOLATIONS`.
      crop: the side of the central square over the length that the image is resized to, in (0, 1].
      squash: the image is resized to a square, whatever its shape; else its shorter side is.
    """

    interpolation: str = "bicubic"
    crop: float = 1.0
    squash: bool = False

    def __post_init__(self) -> None:
        one_of(self.interpolation, "interpolation", *INTERPOLATIONS)
        check(0 < self.crop <= 1, "crop", f"must be in (0, 1], got {self.crop}")


def view_of(config: JsonObject, *, image_size: int) -> View:
    """The view of the checkpoint that `config` was saved with.

    Args:
      config: of a run, or of an imported checkpoint with what its file said.
      image_size: side of the model's input in pixels.
    """
    kept = kept_of(config).get("view")
    try:
        if kept:
            return View(**kept)
        crop = value_of(config, "data.augment.eval_crop")
        return View(crop=crop or official_crop(image_size))
    except TypeError:  # a config of somebody else's
        raise ConfigError("view: must be a section of interpolation, crop and squash") from None


def kept_of(config: JsonObject) -> JsonObject:
    """What the file said that a checkpoint was imported from; {} for a run's checkpoint."""
    return config.get("imported_from", {}).get("kept", {})
