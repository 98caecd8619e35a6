"""Which patches of an image are hidden from the encoder (BEiT paper §2.3, Algorithm 1).

The numbers a mask is made from are a hash of its image's key (seed, epoch, index) and a counter;
there is no generator state. So a mask does not depend on the batch it is drawn in, and a resumed
run draws the same ones. The whole batch is drawn by one `tf.while_loop` that adds one block to
every unfinished image per step. While it is drawn, a mask is a few 64-bit words with one bit per
patch, which makes "how many patches would this block add" an AND and a population count.

    config = MaskConfig(kind="block", count=75)
    keys = tf.stack([seeds, epochs, indices], axis=1)  # int64 [batch, 3]
    masks = draw_masks(keys, config=config, grid=14)  # bool [batch, 14, 14]

The kinds (`MaskConfig.kind`):

*   "block" follows the official `masking_generator.py`, which is not the paper's Algorithm 1: up
    to ten tries a block, log-uniform aspect, sides shorter than the grid, never more than `count`
    patches, and an early end when ten tries fail. Once less than `min_block` is left, the area is
    drawn from the inverted range [left, min_block], as there.
*   "block_exact" (BEiT v2) then hides random patches until there are `count`. The official code
    can also uncover a surplus; the generator above never leaves one, so there is no such step.
*   "block_paper" is Algorithm 1: every block is taken, until more than `ratio` of the grid is
    hidden. Where the paper is silent: sides are rounded and positions drawn as in the official
    code, sides are kept within 1 and the grid's side (a block may span the grid), and the area
    range inverts as above when less than `min_block` is left.
*   "random" hides `count` patches, every set of them equally likely (paper, table 4).
"""

import functools
import math

import numpy as np
import tensorflow as tf

from beit_jax.config import MaskConfig, check

_TRIES = 10  # per block; masking_generator.py, MaskingGenerator._mask
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: SplitMix64's increment
_FIRST_CELL = 1 << 40  # counters of `_cell_scores` start here, far above those of the blocks


def check_masks(config: MaskConfig, *, grid: int) -> None:
    """Raises unless masks of `config` can be drawn on a grid of `grid` × `grid` patches.

    Args:
      config: the mask settings.
      grid: patches along one side.

    Raises:
      ConfigError: there are fewer than `count` patches, or the settings are such that the first
        block's area range is empty or no block can ever be accepted.
    """
    check(grid >= 1, "grid", f"must be at least 1, got {grid}")
    cells = grid * grid
    if config.kind != "block_paper":
        check(
            config.count <= cells,
            "count",
            f"{config.count} patches cannot be hidden on a {grid} x {grid} grid of {cells}",
        )
    if config.kind == "random":
        return
    name, most = "count", config.count
    if config.kind == "block_paper":
        name, most = "ratio", config.ratio * cells
    check(
        config.min_block <= most,
        "min_block",
        f"{config.min_block} is more than the {most:g} patches that {name} hides on a "
        f"{grid} x {grid} grid",
    )
    if config.max_block is not None:
        check(
            config.max_block >= config.min_block,
            "max_block",
            f"{config.max_block} is less than min_block {config.min_block}",
        )
    if config.kind == "block_paper":
        return
    limit = _limit(float(most), config)
    sides = np.arange(1, grid)
    fits = _reachable(
        sides - 0.5, sides + 0.5, low=config.min_block, high=limit, aspect=config.min_aspect
    )
    check(
        bool((fits & (np.outer(sides, sides) <= limit)).any()),
        "min_block",
        f"no block of {config.min_block} to {limit:g} patches with an aspect between "
        f"{config.min_aspect:g} and {1 / config.min_aspect:g} is shorter and narrower than a "
        f"{grid} x {grid} grid",
    )


@functools.lru_cache(maxsize=64)
def max_masked(config: MaskConfig, *, grid: int) -> int:
    """The most patches one mask of `config` can hide: the static number of slots on the device.

    `count`, except for "block_paper". There a block that is begun while k <= ratio * N patches are
    hidden hides at most its own rounded area on top, so the bound is the maximum over k of k plus
    the largest rounded area the sizes allowed at k can reach.

    Args:
      config: the mask settings.
      grid: patches along one side.

    Returns:
      An upper bound on the number of `True` in every mask of `draw_masks`.

    Raises:
      ConfigError: see `check_masks`.
    """
    check_masks(config, grid=grid)
    if config.kind != "block_paper":
        return config.count
    cells = grid * grid
    sides = np.arange(1, grid + 1)
    # What rounds to, or is clipped to, each side.
    shortest = np.where(sides == 1, 1e-9, sides - 0.5)
    longest = np.where(sides == grid, 1e9, sides + 0.5)
    bound = 0
    for hidden in range(math.floor(config.ratio * cells) + 1):
        limit = _limit(config.ratio * cells - hidden, config)
        low, high = sorted((float(config.min_block), limit))
        fits = _reachable(
            shortest, longest, low=max(low, 1e-9), high=high, aspect=config.min_aspect
        )
        bound = max(bound, hidden + int(np.max(np.outer(sides, sides) * fits)))
    return min(bound, cells)


def draw_masks(keys: tf.Tensor, *, config: MaskConfig, grid: int) -> tf.Tensor:
    """Draws one mask per key; works eagerly and inside a `tf.data` map.

    Args:
      keys: int64 [batch, 3], the seed, epoch and image index of each image. A mask depends on its
        own row alone.
      config: the mask settings.
      grid: patches along one side.

    Returns:
      bool [batch, grid, grid], True where the patch is hidden.

    Raises:
      ConfigError: see `check_masks`.
      ValueError: `keys` is not int64 [batch, 3].
    """
    check_masks(config, grid=grid)
    keys = tf.convert_to_tensor(keys)
    if keys.dtype != tf.int64 or not keys.shape.is_compatible_with([None, 3]):
        raise ValueError(f"keys must be int64 [batch, 3], got {keys.dtype.name} {keys.shape}")
    streams = _streams(keys)
    if config.kind == "random":
        masks = _top(_cell_scores(streams, grid=grid), config.count)
    else:
        masks = _draw_blocks(streams, config=config, grid=grid)
        if config.kind == "block_exact":
            # Hidden patches score above every other, so only what is missing is chosen at random.
            scores = _cell_scores(streams, grid=grid)
            masks = _top(scores + tf.cast(masks, tf.int64) * (1 << 62), config.count)
    return tf.reshape(masks, [-1, grid, grid])


def _limit(left: float, config: MaskConfig) -> float:
    """The largest area that may be asked for while `left` patches may still be hidden."""
    return left if config.max_block is None else min(left, config.max_block)


def _reachable(
    shortest: np.ndarray, longest: np.ndarray, *, low: float, high: float, aspect: float
) -> np.ndarray:
    """Which pairs of sides blocks of certain areas and aspects can be rounded to.

    Seen in (log height, log width), the sides that round to a pair are a rectangle, and the sides
    of all blocks are another, turned by 45 degrees: two convex shapes, which meet unless one of
    their four edge directions separates them.

    Args:
      shortest: [n], the least length that becomes each candidate side; positive.
      longest: [n], the largest one.
      low: the least area of a block; positive.
      high: the largest area.
      aspect: the least aspect; the largest is its inverse.

    Returns:
      bool [n, n] over (height, width).
    """
    low, high, spread = math.log(low), math.log(high), -math.log(aspect)
    start, end = np.log(shortest), np.log(longest)
    tolerance = 1e-9  # shapes that touch count as meeting
    one = (start <= (high + spread) / 2 + tolerance) & (end >= (low - spread) / 2 - tolerance)
    return (
        (start[:, None] + start <= high + tolerance)
        & (end[:, None] + end >= low - tolerance)
        & (start[:, None] - end <= spread + tolerance)
        & (end[:, None] - start >= -spread - tolerance)
        & one[:, None]
        & one
    )


def _mix(words: tf.Tensor) -> tf.Tensor:
    """SplitMix64's output function: a bijection of uint64 that avalanches every bit."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        words = tf.bitwise.bitwise_xor(words, _shift_right(words, shift)) * _uint64(factor)
    return tf.bitwise.bitwise_xor(words, _shift_right(words, 31))


def _uint64(values: np.typing.ArrayLike) -> tf.Tensor:
    """A uint64 constant; Python integers above 2**63 need the way through NumPy."""
    return tf.constant(np.asarray(values, np.uint64))


def _shift_right(words: tf.Tensor, bits: int) -> tf.Tensor:
    """Logical shift of uint64 words."""
    return tf.bitwise.right_shift(words, _uint64(bits))


def _streams(keys: tf.Tensor) -> tf.Tensor:
    """Where each key's counter-based random numbers start: int64 [batch, 3] → uint64 [batch].

    Keys that differ in one of their numbers never start at the same place, since `_mix` is a
    bijection.
    """
    keys = tf.bitcast(keys, tf.uint64)
    streams = _mix(keys[:, 0] + _uint64(_GOLDEN))
    streams = _mix(streams + keys[:, 1])
    return _mix(streams + keys[:, 2])


def _try_uniforms(
    streams: tf.Tensor, step: tf.Tensor, *, tries: int
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The random numbers of each image's `step`-th block: four 32-bit ones a try.

    Args:
      streams: uint64 [batch], from `_streams`.
      step: uint64 scalar, which block, from 0.
      tries: tries per block.

    Returns:
      area: float64 [tries, batch], uniform in [0, 1), for the block's area.
      aspect: float64 [tries, batch], for its aspect.
      corner: float64 [2, tries, batch], for its top and its left.
    """
    counters = np.arange(2)[:, None, None] + 2 * np.arange(tries)[:, None]
    counters = _uint64(counters) + step * _uint64(2 * tries)
    bits = _mix(streams + counters * _uint64(_GOLDEN))
    # By way of int64, which the processor can turn into a float in one instruction.
    high = tf.cast(tf.bitcast(_shift_right(bits, 32), tf.int64), tf.float64) * 2.0**-32
    low = tf.bitwise.bitwise_and(bits, _uint64(2**32 - 1))
    low = tf.cast(tf.bitcast(low, tf.int64), tf.float64) * 2.0**-32
    return low[0], low[1], high


@functools.lru_cache(maxsize=16)
def _bands(grid: int) -> tuple[np.ndarray, np.ndarray]:
    """Bit masks of all runs of whole rows and of whole columns.

    Patch i is bit i % 64 of word i // 64. A block is the AND of a run of rows and one of columns.

    Returns:
      Two uint64 [(grid + 1) ** 2, words], for rows and for columns; line
      `length * (grid + 1) + start` has the run of `length` rows (columns) from `start`.
    """
    cells = np.arange(-(-(grid * grid) // 64) * 64)
    length, start = np.divmod(np.arange((grid + 1) ** 2)[:, None], grid + 1)
    bands = []
    for line in (cells // grid, cells % grid):
        # A run that sticks out at the far end is cut off; none is ever asked for.
        inside = (line >= start) & (line < start + length) & (cells < grid * grid)
        packed = np.packbits(inside, axis=1, bitorder="little")
        bands.append(packed.view("<u8").astype(np.uint64))
    return bands[0], bands[1]


def _unpack(words: tf.Tensor, *, grid: int) -> tf.Tensor:
    """Bits to booleans: uint64 [batch, words] → bool [batch, grid * grid]."""
    # A look-up per byte is an order of magnitude faster than shifting by a broadcast `range`.
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    octets = tf.cast(tf.bitcast(words, tf.uint8), tf.int32)  # little-endian, as every host is
    cells = tf.gather(tf.constant(bits.astype(bool)), octets)
    return tf.reshape(cells, [-1, words.shape[1] * 64])[:, : grid * grid]


def _draw_blocks(streams: tf.Tensor, *, config: MaskConfig, grid: int) -> tf.Tensor:
    """Draws block masks: uint64 [batch] → bool [batch, grid * grid].

    Every step of the loop adds a block to each image that wants more, and to no other: images
    that are done leave the loop's working set, which halves the work of a large batch.
    """
    paper = config.kind == "block_paper"
    budget = config.ratio * grid * grid if paper else config.count
    batch = tf.shape(streams)[0]
    words = -(-(grid * grid) // 64)

    def wants_more(step, active, masks, left, streams):
        return tf.size(active) > 0

    def add_blocks(step, active, masks, left, streams):
        grown, left = _add_block(
            tf.gather(masks, active), left, streams, step, config=config, grid=grid
        )
        masks = tf.tensor_scatter_nd_update(masks, active[:, None], grown)
        # The paper goes on until more than the budget is hidden, the official code until it is.
        keep = tf.where(left >= 0 if paper else left > 0)[:, 0]
        active, left, streams = (tf.gather(each, keep) for each in (active, left, streams))
        return step + _uint64(1), active, masks, left, streams

    masks = tf.zeros([batch, words], tf.uint64)
    *_, masks, _, _ = tf.while_loop(
        wants_more,
        add_blocks,
        (
            tf.zeros([], tf.uint64),
            tf.range(batch),  # the images that want more
            masks,
            tf.fill([batch], tf.constant(budget, tf.float64)),  # what each may still hide
            streams,
        ),
        shape_invariants=tuple(
            tf.TensorShape(shape) for shape in ([], [None], masks.shape, [None], [None])
        ),
    )
    return _unpack(masks, grid=grid)


def _add_block(
    masks: tf.Tensor,
    left: tf.Tensor,
    streams: tf.Tensor,
    step: tf.Tensor,
    *,
    config: MaskConfig,
    grid: int,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Adds one block to every mask: all tries are made at once and the first good one is taken.

    All arithmetic is float64: a vector unit's `exp` may differ in its last bit from the one used
    for the odd elements at the end of an array, and in float32 that would now and then round a
    side differently depending on an image's place in the batch.

    Args:
      masks: uint64 [batch, words], bits in the order `_bands` gives.
      left: float64 [batch], patches that may still be hidden; not negative.
      streams: uint64 [batch].
      step: uint64 scalar, the number of blocks drawn so far.
      config: the mask settings.
      grid: patches along one side.

    Returns:
      The new `masks` and `left`; `left` is 0 where no try was good.
    """
    paper = config.kind == "block_paper"
    tries = 1 if paper else _TRIES
    batch, words = tf.shape(masks)[0], masks.shape[1]
    # Axes: [tries, batch], [tries, batch, words]; a leading 2 is (height or top, width or left).
    # `tries` comes first because broadcasting over the first axis is the fast case on a CPU.
    area, aspect, corner = _try_uniforms(streams, step, tries=tries)
    limit = left
    if config.max_block is not None:
        limit = tf.minimum(left, tf.constant(config.max_block, tf.float64))
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
        # A block as long as the grid is refused: an empty one, which adds nothing, stands for it.
        sides = tf.where(sides < grid, sides, tf.zeros([], tf.float64))
    corner = tf.floor(corner * (grid + 1 - sides))
    lines = tf.cast(sides * (grid + 1) + corner, tf.int32)
    rows, columns = (tf.constant(band) for band in _bands(grid))
    blocks = tf.bitwise.bitwise_and(tf.gather(rows, lines[0]), tf.gather(columns, lines[1]))

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


def _cell_scores(streams: tf.Tensor, *, grid: int) -> tf.Tensor:
    """A random order of the patches of each image: uint64 [batch] → int64 [batch, grid * grid].

    The scores are in [0, 2**62) and no two of an image are equal: the lowest bits, which hold the
    patch's number, break the ties.
    """
    cells = np.arange(grid * grid, dtype=np.uint64)
    bits = _mix(streams[:, None] + _uint64(cells + np.uint64(_FIRST_CELL)) * _uint64(_GOLDEN))
    number = (grid * grid - 1).bit_length()
    bits = tf.bitwise.left_shift(_shift_right(bits, 2 + number), _uint64(number))
    return tf.bitcast(bits + _uint64(cells), tf.int64)


def _top(scores: tf.Tensor, count: int) -> tf.Tensor:
    """The `count` patches of largest score: int64 [batch, cells] → bool [batch, cells]."""
    return scores >= tf.math.top_k(scores, count).values[:, -1:]
