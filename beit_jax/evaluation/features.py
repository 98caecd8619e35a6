"""Pooled features of a frozen encoder: from images to one vector per image and block.

    encoder = load_frozen_encoder("runs/quickstart/pretrain", image_size=64)
    spec = FeatureSpec(blocks=(6, 12), kind="mean", normalization=encoder.normalization)
    image_features(encoder.functions, encoder.params, images_uint8, spec=spec)  # [b, 2, d]

Shapes: b images, l blocks, n tokens, d encoder width, f feature width.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from beit_jax.config import ConfigError, ModelConfig, check, one_of
from beit_jax.models.functional import Functional, functional, unflatten
from beit_jax.models.vit import Encoder
from beit_jax.preprocessing import normalize
from beit_jax.training import sharding
from beit_jax.training.batch_augment import erase
from beit_jax.types import HostBatch, Params
from beit_jax.weights import convert
from beit_jax.weights.formats.format import Stated
from beit_jax.weights.report import log_remarks

F = TypeVar("F", bound=Callable[..., Any])

# Images per device whose block outputs are all held at once: 0.5 GB for base, 1.3 GB for large.
IMAGES_AT_ONCE = 64
# Features are stored on the hosts in this type: half the bytes; it rounds by 0.05 %.
STORED = np.float16


def _mean(tokens: jax.Array) -> jax.Array:
    """[b, 1 + grid², d] → [b, d]: the patch tokens' average."""
    return tokens[:, 1:].mean(axis=1)


def _cls_mean(tokens: jax.Array) -> jax.Array:
    """[b, 1 + grid², d] → [b, 2 d]: the class token, then the patch tokens' average."""
    return jnp.concatenate([tokens[:, 0], _mean(tokens)], axis=-1)


# Kinds of features: their width in units of the encoder's, and the pooling of a block's tokens.
KINDS = {"mean": (1, _mean), "cls_mean": (2, _cls_mean)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """Which features of an image are computed.

    Attributes:
      blocks: whose raw output is pooled, without the final norm; numbered from 1.
      kind: "mean", the average of the patch tokens (paper, appendix D), or "cls_mean", the class
        token followed by that average (official run_linear_eval.py).
      normalization: of the pixels, a key of `preprocessing.NORMALIZATIONS`.
      erase_probability: of random erasing, for features that are given a random key.
    """

    blocks: tuple[int, ...]
    kind: str = "mean"
    normalization: str = "half"
    erase_probability: float = 0.0

    def __post_init__(self) -> None:
        one_of(self.kind, "features", *KINDS)

    def width(self, model: ModelConfig) -> int:
        """f: how many numbers an image and block have."""
        units, _ = KINDS[self.kind]
        return units * model.width


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrozenEncoder:
    """A pre-trained encoder whose parameters are not trained.

    Attributes:
      functions: of an `Encoder` without mask token and final norm; raw block outputs depend on
        neither.
      params: its parameters.
      model: its sizes.
      normalization: of the pixels it is given.
    """

    functions: Functional
    params: Params
    model: ModelConfig
    normalization: str


def load_frozen_encoder(
    source: str,
    *,
    image_size: int | None = None,
    normalization: str = "",
    name: str = "config.run.init_from",
) -> FrozenEncoder:
    """Loads the encoder of a checkpoint in any format that `weights` reads, on the host.

    `beit_jax.load_encoder` is for calling an encoder on images; this one keeps the dtype and the
    attention that the checkpoint's own config names, and is placed on a mesh by whoever uses it.

    Args:
      source: a run's directory, a checkpoint, a Hugging Face folder, `.safetensors` of timm or
        `.pth` of unilm.
      image_size: resizes positions to it; None keeps the checkpoint's own.
      normalization: of the pixels, in place of what the checkpoint says; "" takes that.
      name: the setting that `source` came from, for messages.

    Raises:
      ConfigError: `source` does not exist or has no encoder, or the image size does not fit.
    """
    try:
        params, description, _, report = convert.read_any(
            source, stated=Stated(normalization=normalization)
        )
        size, patch = image_size or description.model.image_size, description.model.patch_size
        check(size % patch == 0, "image_size", f"{size} is not a multiple of its patches, {patch}")
        params, description, reshaped = convert.resized(params, description, image_size=size)
    except ConfigError as error:
        raise ConfigError(f"{name}: {source}: {error}") from None
    logging.info("probing %s (%s)", source, description.task)
    log_remarks(report, source=source)
    for line in reshaped:
        logging.info("resized %s", line)
    functions, encoder_params = frozen_encoder(
        description.model, unflatten(dict(params))["encoder"]
    )
    return FrozenEncoder(
        functions=functions,
        params=encoder_params,
        model=description.model,
        normalization=description.normalization,
    )


def frozen_encoder(model: ModelConfig, params: Params) -> tuple[Functional, Params]:
    """An encoder's functions and parameters, without those that raw block outputs do not need.

    Args:
      model: its sizes.
      params: its parameters: the subtree "encoder" of a whole model's.
    """
    return functional(functools.partial(_build_encoder, model=model)), needed_params(params)


def needed_params(params: Params) -> Params:
    """An encoder's parameters that raw block outputs depend on."""
    return {name: value for name, value in params.items() if name not in ("mask_token", "norm")}


def _build_encoder(rngs: nnx.Rngs, *, model: ModelConfig) -> Encoder:
    return Encoder(model, mask_token=False, final_norm=False, rngs=rngs)


def check_blocks(blocks: tuple[int, ...]) -> None:
    """Raises ConfigError for a block that is listed twice."""
    check(len(set(blocks)) == len(blocks), "blocks", f"one is there twice: {blocks}")


def chosen_blocks(blocks: tuple[int, ...], *, layers: int, name: str) -> tuple[int, ...]:
    """These blocks, or all of the encoder's where none is given.

    Args:
      blocks: numbered from 1.
      layers: blocks of the encoder.
      name: the setting that `blocks` came from, for messages.

    Raises:
      ConfigError: a block is beyond the last.
    """
    beyond = [block for block in blocks if block > layers]
    check(not beyond, name, f"there is no block {beyond}, the encoder has {layers}")
    return blocks or tuple(range(1, layers + 1))


def image_features(
    encoder: Functional,
    params: Params,
    images: jax.Array,
    *,
    spec: FeatureSpec,
    key: jax.Array | None = None,
) -> jax.Array:
    """Features of uint8 images; a pure function to be compiled.

    Args:
      encoder: `FrozenEncoder.functions`.
      params: its parameters.
      images: uint8 `[b, s, s, 3]`.
      spec: blocks, pooling, normalisation.
      key: randomness of random erasing; None erases nothing.

    Returns:
      float32 `[b, l, f]`.
    """
    pixels = normalize(images, kind=spec.normalization)
    if key is not None:
        pixels = erase(pixels, key=key, probability=spec.erase_probability)
    return block_features(encoder, params, pixels, blocks=spec.blocks, kind=spec.kind)


def block_features(
    encoder: Functional, params: Params, images: jax.Array, *, blocks: tuple[int, ...], kind: str
) -> jax.Array:
    """Pooled raw outputs of some blocks; no gradient, no drop path.

    Args:
      encoder: with the method `block_outputs`.
      params: its parameters.
      images: normalised, float `[b, s, s, 3]`.
      blocks: numbered from 1.
      kind: see `FeatureSpec`.

    Returns:
      float32 `[b, l, f]`, f = d or 2 d.
    """

    def pool(tokens: jax.Array) -> jax.Array:  # [b, n, d] → [b, f]
        _, pooled = KINDS[kind]
        return pooled(tokens.astype(jnp.float32))

    def features(part: jax.Array) -> jax.Array:
        outputs = encoder.apply(params, part, method="block_outputs", blocks=blocks)
        return jnp.stack([pool(outputs[i]) for i in range(len(blocks))], axis=1)

    # A batch's block outputs may not fit in memory together. Every k-th image goes into the same
    # part, so that no image leaves its device.
    b = images.shape[0]
    per_device = b // jax.device_count() if b % jax.device_count() == 0 else b
    parts = next(
        k for k in itertools.count(1) if per_device % k == 0 and per_device // k <= IMAGES_AT_ONCE
    )
    if parts == 1:
        return jax.lax.stop_gradient(features(images))
    split = jnp.moveaxis(images.reshape(b // parts, parts, *images.shape[1:]), 1, 0)
    whole = jnp.moveaxis(jax.lax.map(features, split), 0, 1)
    return jax.lax.stop_gradient(whole.reshape(b, *whole.shape[2:]))


def on_host(
    compute: Callable[..., jax.Array], params: Params, *, mesh: Mesh
) -> Callable[..., np.ndarray]:
    """Compiles a function of images and fetches the results of this host's images.

    Args:
      compute: `(params, images, *rest) -> rows`, a pure function; rows have the images' first axis.
      params: placed on every device, once.
      mesh: of all devices; images are split over it.

    Returns:
      `(batch, *rest) -> rows`: takes this host's part of a batch, whose "image" is uint8
      `[b, s, s, 3]`, and returns this host's rows `[b, ...]`. Every process must call it together.
    """
    return functools.partial(row_function(compute, mesh=mesh), sharding.replicate(params, mesh))


def row_function(compute: Callable[..., jax.Array], *, mesh: Mesh) -> Callable[..., np.ndarray]:
    """`on_host` of parameters that change: compiled once, whatever they are.

    Args:
      compute, mesh: as for `on_host`.

    Returns:
      `(params, batch, *rest) -> rows`; the parameters are on the mesh's devices, whole or split.
    """
    compiled = jax.jit(
        with_whole_params(compute, mesh), out_shardings=NamedSharding(mesh, sharding.BATCH)
    )

    def call(params: Params, batch: HostBatch, *rest: np.ndarray | np.generic | None) -> np.ndarray:
        images = sharding.to_devices({"image": batch["image"]}, mesh)["image"]
        return host_rows(compiled(params, images, *rest))

    return call


def with_whole_params(compute: F, mesh: Mesh) -> F:
    """A pure function of parameters and more, which gathers split parameters first."""
    whole, on_mesh = NamedSharding(mesh, sharding.REPLICATED), sharding.on_mesh(compute, mesh)

    @functools.wraps(compute)
    def gathered(params: Params, *rest: Any) -> Any:
        return on_mesh(jax.lax.with_sharding_constraint(params, whole), *rest)

    return cast(F, gathered)


def host_rows(array: jax.Array) -> np.ndarray:
    """The rows of this host's devices, of an array split over all devices along the first axis."""
    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in shards])
