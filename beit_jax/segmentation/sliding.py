"""The device's part of segmenting whole images: from windows to a class for every pixel.

    batch = windows.pack(...)                                                 # NumPy, on the host
    classes = predict(logits, batch, normalization="imagenet", passes=1)      # under jax.jit
    sums = confusion(logits, batch, normalization="imagenet", passes=1)       # or this

What mmseg does: the logits of a window are interpolated to its pixels, those of overlapping windows
are averaged, the result is interpolated to the original image, and the class probabilities of
several passes are averaged. Each of these is linear along rows and along columns, so a window's
part of a tile of the original image is one product, rows · logits · columnsᵀ, and nothing of an
image's size in pixels times classes is ever held: a tile is.

Shapes: b images, K windows, s side of a window, q side of its logits, c classes, T tiles.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from beit_jax.models.convolution import interpolation_weights
from beit_jax.preprocessing import normalize
from beit_jax.segmentation import confusion as counting
from beit_jax.types import Batch, Sums

# Normalised float32 images `[b, s, s, 3]` → float32 logits `[b, q, q, c]`.
Logits = Callable[[jax.Array], jax.Array]
# What is done with a tile: (carry, its index t, scores float32 `[b, c, tile, tile]`) → carry.
# Scores are logits after one pass, probabilities summed over passes after several.
_Visit = Callable[[Sums, jax.Array, jax.Array], Sums]


def predict(
    logits: Logits, batch: Batch, *, normalization: str, passes: int, tile: int
) -> jax.Array:
    """The most probable class of every pixel.

    Args:
      logits: the model.
      batch: of `windows.pack`, on devices.
      normalization: of pixels, a key of `preprocessing.NORMALIZATIONS`.
      passes: `windows.passes` of the settings.
      tile: side of a tile in pixels, as the batch was packed.

    Returns:
      uint8 `[b, T, tile, tile]`, for `windows.assemble`; of no meaning outside the image.
    """
    b, tiles = batch["tile_corner"].shape[:2]
    start = {"classes": jnp.zeros((b, tiles, tile, tile), jnp.uint8)}

    def visit(carry: Sums, t: jax.Array, scores: jax.Array) -> Sums:
        _, classes = counting.strongest(scores)
        return {"classes": lax.dynamic_update_index_in_dim(carry["classes"], classes, t, axis=1)}

    seen = _window_logits(logits, batch, normalization=normalization)
    return _visit_tiles(seen, batch, start, visit, passes=passes, tile=tile)["classes"]


def confusion(logits: Logits, batch: Batch, *, normalization: str, passes: int) -> Sums:
    """Compares the most probable class of every pixel with its label, without leaving the device.

    Args:
      logits: the model.
      batch: of `windows.pack` with labels, on devices.
      normalization: of pixels, a key of `preprocessing.NORMALIZATIONS`.
      passes: `windows.passes` of the settings.

    Returns:
      Sums of `confusion.empty`, to be added up over batches; `confusion.scores` reads them.
    """
    labels = batch["labels"]
    tile = labels.shape[-1]

    def visit(carry: Sums, t: jax.Array, scores: jax.Array) -> Sums:
        labelled = lax.dynamic_index_in_dim(labels, t, axis=1, keepdims=False)
        return counting.add(carry, scores, labelled, passes=passes)

    seen = _window_logits(logits, batch, normalization=normalization)
    start = counting.empty(seen.shape[2])
    return _visit_tiles(seen, batch, start, visit, passes=passes, tile=tile)


def _visit_tiles(
    seen: jax.Array, batch: Batch, start: Sums, visit: _Visit, *, passes: int, tile: int
) -> Sums:
    """Computes the scores of one tile of every image after the other and hands them to `visit`."""

    def body(t: jax.Array, carry: Sums) -> Sums:
        return visit(carry, t, _tile_scores(seen, batch, t, passes=passes, tile=tile))

    return lax.fori_loop(0, batch["tile_count"].max(), body, start)


def _window_logits(logits: Logits, batch: Batch, *, normalization: str) -> jax.Array:
    """The logits of all windows: float32 `[b, K, c, q, q]`; zero where there is no window.

    Classes come before rows and columns, so that the products of `_tile_scores` are over whole
    tiles of a TPU's memory; classes last would be padded to 128.
    """
    b, slots, s, _, channels = batch["windows"].shape
    window = jax.ShapeDtypeStruct((b, s, s, channels), jnp.float32)
    q, c = jax.eval_shape(logits, window).shape[-2:]

    def body(k: jax.Array, seen: jax.Array) -> jax.Array:
        images, shares = (
            lax.dynamic_index_in_dim(batch[name], k, axis=1, keepdims=False)
            for name in ("windows", "shares")
        )
        pixels = normalize(images, kind=normalization)
        inside = (shares[:, 0, :, None] > 0) & (shares[:, 1, None, :] > 0)
        found = logits(jnp.where(inside[..., None], pixels, 0.0)).astype(jnp.float32)
        return lax.dynamic_update_index_in_dim(seen, jnp.moveaxis(found, -1, 1), k, axis=1)

    empty = jnp.zeros((b, slots, c, q, q), jnp.float32)
    return lax.fori_loop(0, batch["window_count"].max(), body, empty)


def _tile_scores(
    seen: jax.Array, batch: Batch, t: jax.Array, *, passes: int, tile: int
) -> jax.Array:
    """Scores of tile `t` of every image: float32 `[b, c, tile, tile]`."""
    b, _, c = seen.shape[:3]
    corner, reaching, closes, count = (
        lax.dynamic_index_in_dim(batch[name], t, axis=1, keepdims=False)
        for name in ("tile_corner", "reaching", "closes", "reaching_count")
    )

    def body(j: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        total, of_pass = carry
        index = lax.dynamic_index_in_dim(reaching, j, axis=1, keepdims=False)
        part = jax.vmap(_contribution, in_axes=(0, 0, 0, 0, None))(
            seen, _of_window(batch, index), corner, batch["size"], jnp.arange(tile)
        )
        of_pass += jnp.where((j < count)[:, None, None, None], part, 0.0)
        if passes == 1:
            return total, of_pass
        last = lax.dynamic_index_in_dim(closes, j, axis=1, keepdims=False)[:, None, None, None]
        # No image but the one at the end of a pass needs its probabilities now; the others' are
        # dropped, which costs less than another loop over the passes.
        norm = counting.log_sum_exp(of_pass, counting.strongest(of_pass)[0])
        total += jnp.where(last, jnp.exp(of_pass - norm[:, None]), 0.0)
        return total, jnp.where(last, 0.0, of_pass)

    nothing = jnp.zeros((b, c, tile, tile), jnp.float32)
    start = (nothing if passes > 1 else jnp.zeros((b,)), nothing)
    total, of_pass = lax.fori_loop(0, count.max(), body, start)
    return of_pass if passes == 1 else total


def _of_window(batch: Batch, index: jax.Array) -> Batch:
    """What is known of window `index[i]` of every image `i`, without its pixels."""
    found = {
        name: jax.vmap(lambda values, i: values[i])(batch[name], index)
        for name in ("shares", "resized", "corner", "mirrored")
    }
    return found | {"index": index}


def _contribution(
    seen: jax.Array, window: Batch, corner: jax.Array, size: jax.Array, pixels: jax.Array
) -> jax.Array:
    """One window's part of one tile of one image.

    Args:
      seen: float32 `[K, c, q, q]`, logits of the image's windows.
      window: its entries in the batch, and its index.
      corner: int32 `[2]`, top and left of the tile.
      size: int32 `[2]`, of the original image.
      pixels: 0, 1, … up to the tile's side.

    Returns:
      float32 `[c, tile, tile]`.
    """
    sides = []
    for axis in (0, 1):
        original = corner[axis] + pixels
        if axis == 1:
            original = jnp.where(window["mirrored"], size[1] - 1 - original, original)
        sides.append(
            _interpolation(
                original,
                side=size[axis],
                resized=window["resized"][axis],
                begin=window["corner"][axis],
                shares=window["shares"][axis],
                q=seen.shape[-1],
            )
        )
    rows, columns = sides
    # A TPU would round the factors to bfloat16, and with them where a pixel lies.
    exact = lax.Precision.HIGHEST
    tall = jnp.einsum("cij,yi->cyj", seen[window["index"]], rows, precision=exact)
    return jnp.einsum("cyj,xj->cyx", tall, columns, precision=exact)


def _interpolation(
    original: jax.Array,
    *,
    side: jax.Array,
    resized: jax.Array,
    begin: jax.Array,
    shares: jax.Array,
    q: int,
) -> jax.Array:
    """The matrix from a window's logits along one axis to pixels of the original image.

    Args:
      original: int32 `[n]`, the pixels.
      side: of the original image.
      resized: of the resized image.
      begin: of the window in the resized image.
      shares: float32 `[s]`, what the window's pixels count.
      q: logits along the axis.

    Returns:
      float32 `[n, q]`.
    """
    s = shares.shape[0]
    # A pixel's place in the resized image is the fraction ((2x + 1) · resized - side) / (2 · side),
    # clamped to the image; integers keep it exact.
    numerator = jnp.clip((2 * original + 1) * resized - side, 0, 2 * side * (resized - 1))
    whole, rest = numerator // (2 * side), numerator % (2 * side)
    later = (rest / (2 * side)).astype(jnp.float32)[:, None]
    place = whole[:, None] - begin - jnp.arange(s)
    to_resized = jnp.where(place == 0, 1.0 - later, 0.0) + jnp.where(place == -1, later, 0.0)
    exact = lax.Precision.HIGHEST
    return jnp.matmul(
        to_resized * shares, jnp.asarray(interpolation_weights(q, s)), precision=exact
    )
