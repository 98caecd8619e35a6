"""Block masks: rectangles of random size and position, until enough of the grid is hidden.

Three kinds of mask are drawn here:

*   "block" follows the official `masking_generator.py`, which is not the paper's Algorithm 1: up
    to ten tries per block, log-uniform aspect, sides shorter than the grid, never more than `count`
    patches, and an early end when ten tries fail. Once less than `min_block` is left, the area is
    drawn from the inverted range [left, min_block], as in the official code.
*   "block_exact" (BEiT v2) then hides random patches until `count` are hidden. The official code
    can also uncover a surplus; the generator above never leaves one, so there is no such step.
*   "block_paper" is Algorithm 1: every block is taken, until more than `ratio` of the grid is
    hidden. Where the paper is silent: sides are rounded and positions drawn as in the official
    code, sides are kept within 1 and the grid's side (a block may span the grid), and the area
    range inverts as above when less than `min_block` is left.

One `tf.while_loop` draws a whole batch: each step adds a block to every unfinished image. While it
is drawn, a mask is a few 64-bit words with one bit per patch, so that "how many patches would this
block add" is an AND and a population count.
"""

import functools
import math

import numpy as np
import tensorflow as tf

from beit_jax.config import MaskConfig
from beit_jax.data.masking import uniform as uniform_patches
from beit_jax.data.masking.random_bits import GOLDEN, mix, shift_right, streams, uint64, uniform

TRIES = 10  # per block; masking_generator.py, MaskingGenerator._mask


def draw_official(keys: tf.Tensor, *, config: MaskConfig, grid: int) -> tf.Tensor:
    """Draws masks of the kind "block": int64 [batch, 3] → bool [batch, grid, grid]."""
    masks = _draw(keys, config=config, grid=grid, paper=False)
    return tf.reshape(masks, [-1, grid, grid])


def draw_exact(keys: tf.Tensor, *, config: MaskConfig, grid: int) -> tf.Tensor:
    """Draws masks of the kind "block_exact": int64 [batch, 3] → bool [batch, grid, grid]."""
    masks = _draw(keys, config=config, grid=grid, paper=False)
    masks = uniform_patches.fill_up(masks, keys, count=config.count, grid=grid)
    return tf.reshape(masks, [-1, grid, grid])


def draw_paper(keys: tf.Tensor, *, config: MaskConfig, grid: int) -> tf.Tensor:
    """Draws masks of the kind "block_paper": int64 [batch, 3] → bool [batch, grid, grid]."""
    masks = _draw(keys, config=config, grid=grid, paper=True)
    return tf.reshape(masks, [-1, grid, grid])


def _draw(keys: tf.Tensor, *, config: MaskConfig, grid: int, paper: bool) -> tf.Tensor:
    """Draws block masks: int64 [batch, 3] → bool [batch, grid * grid].

    Each iteration adds a block to the images that want more. Finished images leave the loop's
    working set, which halves the work of a large batch.
    """
    budget = config.ratio * grid * grid if paper else config.count
    starts = streams(keys)
    batch = tf.shape(starts)[0]
    words = -(-(grid * grid) // 64)

    def wants_more(step: tf.Tensor, active: tf.Tensor, *state: tf.Tensor) -> tf.Tensor:
        return tf.size(active) > 0

    def add_blocks(
        step: tf.Tensor, active: tf.Tensor, masks: tf.Tensor, left: tf.Tensor, starts: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        grown, left = _add_block(
            tf.gather(masks, active), left, starts, step, config=config, grid=grid, paper=paper
        )
        masks = tf.tensor_scatter_nd_update(masks, active[:, None], grown)
        # The paper goes on until more than the budget is hidden, the official code until it is.
        keep = tf.where(left >= 0 if paper else left > 0)[:, 0]
        active, left, starts = (tf.gather(values, keep) for values in (active, left, starts))
        return step + uint64(1), active, masks, left, starts

    masks = tf.zeros([batch, words], tf.uint64)
    *_, masks, _, _ = tf.while_loop(
        wants_more,
        add_blocks,
        (
            tf.zeros([], tf.uint64),
            tf.range(batch),  # the images that want more
            masks,
            tf.fill([batch], tf.constant(budget, tf.float64)),  # what each may still hide
            starts,
        ),
        shape_invariants=tuple(
            tf.TensorShape(shape) for shape in ([], [None], masks.shape, [None], [None])
        ),
    )
    return _unpack(masks, grid=grid)


def _add_block(
    masks: tf.Tensor,
    left: tf.Tensor,
    starts: tf.Tensor,
    step: tf.Tensor,
    *,
    config: MaskConfig,
    grid: int,
    paper: bool,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Adds one block to every mask: all tries are made at once and the first good one is taken.

    Args:
      masks: uint64 [batch, words], bits in the order of `_bands`.
      left: float64 [batch], patches that may still be hidden; not negative.
      starts: uint64 [batch], of the images' random numbers.
      step: uint64 scalar, the number of blocks drawn so far.
      config: the mask settings.
      grid: patches along one side.
      paper: Algorithm 1 instead of the official code.

    Returns:
      The new `masks` and `left`; `left` is 0 where no try was good.
    """
    batch, words = tf.shape(masks)[0], masks.shape[1]
    limit = left
    if config.max_block is not None:
        limit = tf.minimum(left, tf.constant(config.max_block, tf.float64))
    blocks = _propose(limit, starts, step, config=config, grid=grid, paper=paper)
    fresh = tf.bitwise.bitwise_and(blocks, tf.bitwise.invert(masks))
    fresh = tf.cast(tf.raw_ops.PopulationCount(x=fresh), tf.float64)  # of each word
    fresh = tf.reduce_sum(fresh, axis=-1)
    good = fresh >= 0 if paper else (fresh > 0) & (fresh <= limit)
    found = tf.reduce_any(good, axis=0)
    first = tf.argmax(good, axis=0, output_type=tf.int32) * batch + tf.range(batch)
    block = tf.gather(tf.reshape(blocks, [-1, words]), first)
    masks = tf.where(found[:, None], tf.bitwise.bitwise_or(masks, block), masks)
    left = left - tf.gather(tf.reshape(fresh, [-1]), first)
    return masks, tf.where(found, left, tf.zeros([], tf.float64))


def _propose(
    limit: tf.Tensor,
    starts: tf.Tensor,
    step: tf.Tensor,
    *,
    config: MaskConfig,
    grid: int,
    paper: bool,
) -> tf.Tensor:
    """Draws the blocks of all tries.

    All arithmetic is float64. A vector unit's `exp` may differ in its last bit from the one used
    for the odd elements at the end of an array; in float32 a side would now and then be rounded
    differently depending on an image's position in the batch.

    Args:
      limit: float64 [batch], the largest area that may be drawn.
      starts, step, config, grid, paper: as for `_add_block`.

    Returns:
      uint64 [tries, batch, words], bits in the order of `_bands`; no bits for a refused block.
    """
    # Axes: [tries, batch], [tries, batch, words]; a leading 2 is (height or top, width or left).
    # `tries` comes first because broadcasting over the first axis is the fast case on a CPU.
    area, aspect, corner = try_uniforms(starts, step, tries=1 if paper else TRIES)
    area = config.min_block + area * (limit - config.min_block)
    smallest, largest = config.min_aspect, 1 / config.min_aspect
    if paper:
        aspect = smallest + aspect * (largest - smallest)
    else:
        aspect = tf.exp(math.log(smallest) + aspect * (math.log(largest) - math.log(smallest)))
    sides = tf.round(tf.sqrt(tf.stack([area * aspect, area / aspect])))  # half to even
    if paper:
        sides = tf.clip_by_value(sides, 1.0, float(grid))
    else:
        # A block as long as the grid is refused: an empty one, which adds nothing, replaces it.
        sides = tf.where(sides < grid, sides, tf.zeros([], tf.float64))
    corner = tf.floor(corner * (grid + 1 - sides))
    runs = tf.cast(sides * (grid + 1) + corner, tf.int32)
    rows, columns = (tf.constant(band) for band in _bands(grid))
    return tf.bitwise.bitwise_and(tf.gather(rows, runs[0]), tf.gather(columns, runs[1]))


def try_uniforms(
    starts: tf.Tensor, step: tf.Tensor, *, tries: int
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The random numbers of each image's `step`-th block: four 32-bit numbers per try.

    Args:
      starts: uint64 [batch], from `random_bits.streams`.
      step: uint64 scalar, which block, from 0.
      tries: tries per block.

    Returns:
      area: float64 [tries, batch], uniform in [0, 1), for the block's area.
      aspect: float64 [tries, batch], for its aspect.
      corner: float64 [2, tries, batch], for its top and its left.
    """
    counters = np.arange(2)[:, None, None] + 2 * np.arange(tries)[:, None]
    counters = uint64(counters) + step * uint64(2 * tries)
    bits = mix(starts + counters * uint64(GOLDEN))
    high = uniform(shift_right(bits, 32))
    low = uniform(tf.bitwise.bitwise_and(bits, uint64(2**32 - 1)))
    return low[0], low[1], high


@functools.lru_cache(maxsize=16)
def _bands(grid: int) -> tuple[np.ndarray, np.ndarray]:
    """Bit masks of all runs of whole rows and of whole columns.

    Patch i is bit i % 64 of word i // 64. A block is the AND of a run of rows and one of columns.

    Returns:
      Two uint64 [(grid + 1) ** 2, words], for rows and for columns; entry
      `length * (grid + 1) + start` holds the run of `length` rows (columns) from `start`.
    """
    cells = np.arange(-(-(grid * grid) // 64) * 64)
    length, start = np.divmod(np.arange((grid + 1) ** 2)[:, None], grid + 1)
    bands = []
    for line in (cells // grid, cells % grid):
        # A run beyond the far end is cut off; none is ever looked up.
        inside = (line >= start) & (line < start + length) & (cells < grid * grid)
        packed = np.packbits(inside, axis=1, bitorder="little")
        bands.append(packed.view("<u8").astype(np.uint64))
    return bands[0], bands[1]


def _unpack(words: tf.Tensor, *, grid: int) -> tf.Tensor:
    """Bits to booleans: uint64 [batch, words] → bool [batch, grid * grid]."""
    # A table look-up per byte is ten times faster than shifting by a broadcast `range`.
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    octets = tf.cast(tf.bitcast(words, tf.uint8), tf.int32)  # little-endian, as every host is
    cells = tf.gather(tf.constant(bits.astype(bool)), octets)
    return tf.reshape(cells, [-1, words.shape[1] * 64])[:, : grid * grid]
