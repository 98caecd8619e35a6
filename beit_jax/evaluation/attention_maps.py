"""Maps of attention weights over an image's patches, for people to look at and to measure.

    weights = encoder.attention(images, blocks=range(1, 13))  # [l, b, h, n, n]
    query_map(weights[-1].mean(axis=1), query=(3, 5))  # [b, grid, grid]
    query_map(rollout(weights), query=None)  # of the class token, through all blocks

Shapes: l blocks, b images, h heads, n tokens (the class token, then grid² patches row by row), d
width. All functions are NumPy and float32.
"""

import math

import numpy as np

# The share of attention that a threshold mask keeps, as DINO's figures do (Caron et al. 2021).
SHARE = 0.6


def rollout(weights: np.ndarray) -> np.ndarray:
    """Attention rollout: how much of each input token reaches each output (Abnar & Zuidema 2020).

    The heads are averaged, the residual branch counts as an identity of the same weight, and the
    matrices of the blocks are multiplied, the last one leftmost.

    Args:
      weights: `[l, b, h, n, n]`, of successive blocks from the first.

    Returns:
      float32 `[b, n, n]`, (output, input); rows sum to one.
    """
    mixed = np.asarray(weights, np.float32).mean(axis=2)
    mixed = mixed + np.eye(mixed.shape[-1], dtype=np.float32)
    mixed /= mixed.sum(axis=-1, keepdims=True)
    reached = mixed[0]
    for block in mixed[1:]:
        reached = block @ reached
    return reached


def query_map(weights: np.ndarray, *, query: tuple[int, int] | None) -> np.ndarray:
    """What one token attends to, as a map over the patches.

    Args:
      weights: `[..., n, n]`, of a block or a rollout.
      query: a patch's (row, column); None is the class token.

    Returns:
      float32 `[..., grid, grid]`, unscaled: a map sums to one less what the class token gets.

    Raises:
      ValueError: the query is no patch, or n is not 1 + grid².
    """
    weights = np.asarray(weights, np.float32)
    grid = grid_of(weights)
    token = 0
    if query is not None:
        row, column = query
        if not (0 <= row < grid and 0 <= column < grid):
            raise ValueError(f"query: there is no patch {query} among {grid} × {grid}")
        token = 1 + row * grid + column
    return weights[..., token, 1:].reshape(*weights.shape[:-2], grid, grid)


def grid_of(weights: np.ndarray) -> int:
    """The patches along a side of an image, of weights `[..., n, n]`.

    Raises:
      ValueError: n is not 1 + grid².
    """
    n = weights.shape[-1]
    grid = math.isqrt(n - 1)
    if grid * grid + 1 != n or weights.shape[-2] != n:
        raise ValueError(f"weights are of {weights.shape[-2:]} tokens, not of 1 + grid² twice")
    return grid


def threshold_mask(attention: np.ndarray, *, share: float = SHARE) -> np.ndarray:
    """The fewest patches that together hold a share of the attention.

    Args:
      attention: `[..., grid, grid]`, not negative.
      share: 0..1, of each map's sum.

    Returns:
      bool `[..., grid, grid]`; at least one patch of each map is true.
    """
    attention = np.asarray(attention, np.float64)
    flat = attention.reshape(*attention.shape[:-2], -1)
    order = np.argsort(-flat, axis=-1, kind="stable")
    falling = np.take_along_axis(flat, order, axis=-1)
    # A patch is kept while those before it hold less than the share.
    before = falling.cumsum(axis=-1) - falling
    kept = before < share * flat.sum(axis=-1, keepdims=True)
    kept[..., 0] = True
    mask = np.zeros(flat.shape, bool)
    np.put_along_axis(mask, order, kept, axis=-1)
    return mask.reshape(attention.shape)


def pca_colours(patches: np.ndarray) -> np.ndarray:
    """Patch features as colours: like patches look alike, within an image and between images.

    The first three principal components over all patches of all images are red, green and blue,
    each stretched from its 1st to its 99th percentile. A component's sign is arbitrary; the one is
    chosen that makes its largest loading positive, so that equal features give equal pictures.

    Args:
      patches: `[b, grid, grid, d]`.

    Returns:
      uint8 `[b, grid, grid, 3]`; a component that does not vary is 128.
    """
    rows = np.asarray(patches, np.float64).reshape(-1, patches.shape[-1])
    centred = rows - rows.mean(axis=0)
    _, vectors = np.linalg.eigh(centred.T @ centred)
    axes = np.zeros((rows.shape[1], 3))
    count = min(3, rows.shape[1])
    axes[:, :count] = vectors[:, ::-1][:, :count]
    signs = np.take_along_axis(axes, np.abs(axes).argmax(axis=0)[None], axis=0)
    scores = centred @ (axes * np.where(signs < 0, -1.0, 1.0))
    low, high = np.percentile(scores, (1, 99), axis=0)
    varies = high - low > 1e-6 * max(float(np.abs(rows).max()), 1e-30)
    scaled = (scores - low) / np.where(varies, high - low, 1.0)
    levels = np.where(varies, np.clip(scaled, 0, 1) * 255, 128)
    return np.rint(levels).astype(np.uint8).reshape(*patches.shape[:-1], 3)


def to_pixels(patch_map: np.ndarray, *, image_size: int) -> np.ndarray:
    """A map over patches as a map over pixels; every pixel has the value of its patch.

    Args:
      patch_map: `[..., grid, grid]`.
      image_size: s, a multiple of grid.

    Returns:
      `[..., s, s]`.
    """
    side = image_size // patch_map.shape[-1]
    return patch_map.repeat(side, axis=-2).repeat(side, axis=-1)
