"""The pictures of pre-training: the first batch, and what the model fills in."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from beit_jax.drawing import sheets
from beit_jax.evaluation.reconstruction import fill_in
from beit_jax.models.functional import Functional
from beit_jax.preprocessing import normalize
from beit_jax.tokenizers.tokenizer import Tokenizer
from beit_jax.training import device_jitter
from beit_jax.types import HostBatch, Params

PICTURES = 8  # images in a picture


def first_batch_picture(batch: HostBatch) -> np.ndarray:
    """Draws both views and the masks as the model is given them, jitter included.

    Args:
      batch: `image`, `token_image` and `mask`, and the jitter where it is left to the device.

    Returns:
      uint8 `[h, w, 3]`.
    """
    device_batch = {name: jnp.asarray(values[:PICTURES]) for name, values in batch.items()}
    views = {n: np.asarray(v) for n, v in device_jitter.jitter_batch(device_batch).items()}
    side = views["image"].shape[1]
    columns = {
        "view 1": views["image"],
        "masked": sheets.hide_patches(views["image"], views["mask"]),
        "view 2": sheets.to_uint8(views["token_image"] / 255.0, side=side),
    }
    return sheets.columns_sheet(columns)


def reconstructions(
    params: Params,
    *,
    model: Functional,
    tokenizer: Tokenizer,
    tokenizer_params: Params,
    sample: HostBatch,
    normalization: str,
) -> np.ndarray:
    """Draws originals, masked images, and both decoded: predicted tokens, then true tokens.

    In the third column the tokens of visible patches are the true ones. Both decoded columns are
    left out where the tokenizer has no decoder.

    Args:
      params: the model's, on this host.
      model: from `masked_image_model`.
      tokenizer: the frozen tokenizer.
      tokenizer_params: its parameters, the decoder's included where there is one.
      sample: `image`, `token_image` and `mask` of some held-out images.
      normalization: of the model's pixels.

    Returns:
      uint8 `[h, w, 3]`.
    """
    side = sample["image"].shape[1]
    encoding_params = tokenizer.encoding_params(tokenizer_params)
    ids = _encode(encoding_params, sample["token_image"], tokenizer=tokenizer)
    images = normalize(jnp.asarray(sample["image"]), kind=normalization)
    logits = _predict(params, images, sample["mask"], model=model)
    filled = fill_in(logits, ids, jnp.asarray(sample["mask"]))
    columns = {
        "original": sample["image"],
        "masked": sheets.hide_patches(sample["image"], sample["mask"]),
    }
    if tokenizer.paints(tokenizer_params):
        for name, shown in (("predicted", filled), ("tokenizer", ids)):
            decoded = _decode(tokenizer_params, shown, tokenizer=tokenizer)
            columns[name] = sheets.to_uint8(decoded, side=side)
    return sheets.columns_sheet(columns)


# Compiled once for all the pictures of a run; `jax.jit(tokenizer.encode)` would be every time.
@functools.partial(jax.jit, static_argnames="tokenizer")
def _encode(params: Params, images: jax.Array, *, tokenizer: Tokenizer) -> jax.Array:
    return tokenizer.encode(params, images)


@functools.partial(jax.jit, static_argnames="tokenizer")
def _decode(params: Params, ids: jax.Array, *, tokenizer: Tokenizer) -> jax.Array:
    return tokenizer.decode(params, ids)


@functools.partial(jax.jit, static_argnames="model")
def _predict(params: Params, images: jax.Array, mask: jax.Array, *, model: Functional) -> jax.Array:
    return model.apply(params, images, mask=mask)
