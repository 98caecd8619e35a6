"""The segmenter: an encoder whose blocks are read, and a head that scores every pixel.

Paper §3.2, appendix G; unilm `beit/semantic_segmentation` on mmseg 0.11. Parameters:

    encoder/...      without mask token and final norm
    neck/...         of "upernet": models/segmentation_heads/pyramid.py
    head/...         by kind, models/segmentation_heads/
    auxiliary/...    unless `auxiliary_channels` is 0

BatchNorm's running statistics are variables of the same paths.
"""

import functools

import jax
from einops import rearrange
from flax import nnx

from beit_jax.config import ModelConfig, SegmentHeadConfig, check
from beit_jax.models.functional import Functional, functional
from beit_jax.models.initialization import FINE_TUNING
from beit_jax.models.segmentation_heads import HEADS, check_head
from beit_jax.models.segmentation_heads.auxiliary import AuxiliaryHead
from beit_jax.models.segmentation_heads.pyramid import FeaturePyramid
from beit_jax.models.vit import Encoder


class Segmenter(nnx.Module):
    """Encoder, neck where the head needs one, head, and auxiliary head where there is one.

    From scratch the encoder is drawn as for classification. The official code draws the projections
    back into the residual stream √(2l) times larger; nobody trains it from scratch.
    """

    def __init__(
        self, config: ModelConfig, *, head: SegmentHeadConfig, classes: int, rngs: nnx.Rngs
    ):
        kind = HEADS[head.kind]
        self.config, self.blocks = config, head.blocks
        self.encoder = Encoder(
            config, mask_token=False, final_norm=False, init=FINE_TUNING, rngs=rngs
        )
        if kind.pyramid:
            self.neck = FeaturePyramid(config, rngs=rngs)
        self.head = kind.build(config, head=head, classes=classes, rngs=rngs)
        if head.auxiliary_channels:
            self.auxiliary = AuxiliaryHead(config, head=head, classes=classes, rngs=rngs)

    def __call__(
        self,
        images: jax.Array,
        *,
        train: bool = False,
        drop_path_key: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array | tuple[jax.Array, jax.Array | None]:
        """Scores pixels.

        Args:
          images: normalised, float `[b, s, s, 3]`.
          train: whether BatchNorm uses this batch's statistics and the auxiliary head is computed.
          drop_path_key: randomness for drop path; None runs every branch.
          dropout_key: randomness for the heads' dropout; None drops nothing.

        Returns:
          Logits, float32 `[b, q, q, classes]`, with q from `logits_side`; in training these and the
          auxiliary head's, float32 `[b, q', q', classes]`, or None where there is no such head.
        """
        features = self._features(images, train=train, drop_path_key=drop_path_key)
        if train:
            return self._both(features, train=True, dropout_key=dropout_key)
        return self.head(features, train=False, dropout_key=None)

    def with_auxiliary(self, images: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Both heads' logits as for training, but with running statistics and without dropout."""
        return self._both(self._features(images, train=False), train=False, dropout_key=None)

    def _features(
        self, images: jax.Array, *, train: bool, drop_path_key: jax.Array | None = None
    ) -> list[jax.Array]:
        """The maps that both heads are given; a block's are `[b, g, g, d]`."""
        outputs = self.encoder.block_outputs(
            images, blocks=self.blocks, drop_path_key=drop_path_key
        )
        maps = rearrange(outputs[:, :, 1:], "k b (g h) d -> k b g h d", g=self.config.grid)
        return self.neck(list(maps), train=train) if hasattr(self, "neck") else list(maps)

    def _both(
        self, features: list[jax.Array], *, train: bool, dropout_key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        logits = self.head(features, train=train, dropout_key=keys[0])
        if not hasattr(self, "auxiliary"):
            return logits, None
        return logits, self.auxiliary(features, train=train, dropout_key=keys[1])


def segmenter(config: ModelConfig, *, head: SegmentHeadConfig, classes: int) -> Functional:
    """`Segmenter` as pure functions; it has variables.

        model = segmenter(config, head=SegmentHeadConfig(), classes=150)
        (logits, auxiliary), variables = model.apply_and_update(
            params, variables, images, train=True, drop_path_key=key, dropout_key=other
        )
        logits = model.apply(params, images, variables=variables)

    Args:
      config: the encoder's.
      head: the head's.
      classes: number of logits.

    Raises:
      ConfigError: the head does not fit the encoder, or there is no class.
    """
    check_head(config, head)
    check(classes > 0, "classes", f"must be at least 1, got {classes}")
    return functional(functools.partial(_build, config=config, head=head, classes=classes))


def _build(
    rngs: nnx.Rngs, *, config: ModelConfig, head: SegmentHeadConfig, classes: int
) -> Segmenter:
    return Segmenter(config, head=head, classes=classes, rngs=rngs)
