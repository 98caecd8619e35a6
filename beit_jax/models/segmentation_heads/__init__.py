"""What turns outputs of some blocks into logits for pixels: the kinds of head, as a table."""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import jax
from flax import nnx

from beit_jax.config import ModelConfig, SegmentHeadConfig, check, one_of
from beit_jax.models.segmentation_heads.auxiliary import LEVEL, check_auxiliary
from beit_jax.models.segmentation_heads.linear import (
    LinearHead,
    check_linear,
    linear_side,
    linear_sides,
)
from beit_jax.models.segmentation_heads.pyramid import pyramid_sides
from beit_jax.models.segmentation_heads.setr_pup import (
    ProgressiveHead,
    check_setr_pup,
    setr_pup_side,
    setr_pup_sides,
)
from beit_jax.models.segmentation_heads.upernet import (
    UperHead,
    check_upernet,
    upernet_side,
    upernet_sides,
)


class SegmentHead(Protocol):
    """A head, called with `features`, maps `[b, h, w, d]` in the order of `head.blocks`."""

    def __call__(
        self, features: list[jax.Array], *, train: bool, dropout_key: jax.Array | None
    ) -> jax.Array:
        """Logits, float32 `[b, q, q, classes]`."""
        ...


class BuildHead(Protocol):
    """Makes a head's module."""

    def __call__(
        self, config: ModelConfig, *, head: SegmentHeadConfig, classes: int, rngs: nnx.Rngs
    ) -> SegmentHead:
        """A module, with its parameters drawn."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadKind:
    """A kind of head.

    Attributes:
      build: makes its module.
      pyramid: whether it takes maps of four sizes (`FeaturePyramid`), or the grid's.
      check: raises ConfigError where encoder and head do not fit.
      side: q, the side of its logits.
      sides: of the maps that each of its modules with a kernel makes, by the module's name.
    """

    build: BuildHead
    pyramid: bool
    check: Callable[[ModelConfig, SegmentHeadConfig], None]
    side: Callable[[ModelConfig], int]
    sides: Callable[[ModelConfig, SegmentHeadConfig], dict[str, int]]


HEADS: dict[str, HeadKind] = {
    "upernet": HeadKind(
        build=UperHead,
        pyramid=True,
        check=check_upernet,
        side=upernet_side,
        sides=upernet_sides,
    ),
    "setr_pup": HeadKind(
        build=ProgressiveHead,
        pyramid=False,
        check=check_setr_pup,
        side=setr_pup_side,
        sides=setr_pup_sides,
    ),
    "linear": HeadKind(
        build=LinearHead,
        pyramid=False,
        check=check_linear,
        side=linear_side,
        sides=linear_sides,
    ),
}


def check_head(config: ModelConfig, head: SegmentHeadConfig) -> None:
    """Checks that a head fits an encoder; for `__post_init__` of jobs.

    Args:
      config: the encoder's, which messages call `model`.
      head: the head's, which messages call `head`.

    Raises:
      ConfigError: an unknown kind, blocks that the encoder does not have, or what the kind refuses.
    """
    one_of(head.kind, "head.kind", *HEADS)
    check(
        max(head.blocks) <= config.layers,
        "head.blocks",
        f"{head.blocks} of an encoder that has {config.layers}",
    )
    HEADS[head.kind].check(config, head)
    check_auxiliary(config, head)


def logits_side(config: ModelConfig, head: SegmentHeadConfig) -> int:
    """The side q of a head's logits, `[b, q, q, classes]`, in pixels of its map."""
    return HEADS[head.kind].side(config)


def auxiliary_side(config: ModelConfig, head: SegmentHeadConfig) -> int:
    """The side of the auxiliary head's logits."""
    return pyramid_sides(config)[LEVEL] if HEADS[head.kind].pyramid else config.grid
