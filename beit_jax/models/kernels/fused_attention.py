"""Attention for short sequences with a bias on the scores, as one TPU kernel (Pallas).

Scores `[n, n]` of one head and image fit on the chip, so they never go to memory: XLA's own program
writes and reads them several times, half of a block's time at 197 tokens. Stock flash kernels don't
fit here: key lengths must divide by 128 and a bias must be materialised for every image.

How the work is laid out:

- Queries, keys and values stay `[b, n, d]`, as the projections make them: no transposes outside,
  and no padding of 64-wide heads to the 128 lanes of a register in memory.
- 128 lanes of it, two heads, go through the kernel together. What belongs to one head is selected
  by zeroing the other's lanes of *one* factor: the matrix unit contracts 128 lanes anyway.
- Scores are `[keys, queries]`, 128 queries at a time: sums over keys run over registers and not
  inside them, and a part's scores (26 registers at 197 tokens) stay in registers.
- Token counts are padded inside the kernel only. What lies there is undefined, so it is zeroed in
  every factor, and the bias of a score that is not there is `MASKED`.
- The grid goes over heads, then tiles of queries, then images: a bias is read once per head, and
  its gradient, which is summed over images, stays on the chip until they are through.
- The forward pass keeps log Σ exp(scores) of each query; the backward pass makes the scores again.

    mixed = fused_attention(query, key, value, bias)
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

HEAD_WIDTH = 64
LANES = 128
PACK = LANES // HEAD_WIDTH  # heads side by side in the lanes of a register
SUBLANES = 16  # rows of a bfloat16 tile
MASKED = -1e30  # a score that is not there; finite, so that a row of them stays finite
# Sequences are cut into tiles of at most so many (query, key) pairs: bias, its gradient and scores
# of two heads must fit beside each other into 16 MB.
MAX_SCORES = 256 * 640
MAX_QUERY_ROWS = 256
BLOCK_BYTES = 6 * 2**20  # of queries, keys and values in flight: how many images go together


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How one call is cut up.

    Attributes:
      batch, tokens, heads: of the arrays.
      images: per grid step.
      query_rows: per grid step, padded to whole registers of lanes.
      key_rows: all keys, padded to whole tiles of rows.
    """

    batch: int
    tokens: int
    heads: int
    images: int
    query_rows: int
    key_rows: int

    @property
    def tiles(self) -> int:
        """Parts that the queries are cut into, one a grid step."""
        return pl.cdiv(self.tokens, self.query_rows)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Pairs of heads, tiles of queries, groups of images."""
        return (pl.cdiv(self.heads, PACK), self.tiles, self.batch // self.images)

    @property
    def parts(self) -> int:
        """128 queries each, of one grid step."""
        return self.query_rows // LANES


def layout(*, batch: int, tokens: int, heads: int) -> Layout:
    """Chooses the cut."""
    key_rows = _up(tokens, SUBLANES)
    fitting = min(MAX_QUERY_ROWS, max(MAX_SCORES // key_rows // LANES, 1) * LANES)
    query_rows = _up(pl.cdiv(tokens, pl.cdiv(tokens, fitting)), LANES)
    # Seven arrays in the backward pass, each twice: one is computed with, one on its way.
    image_bytes = 2 * 7 * max(query_rows, key_rows) * LANES * 2
    fits = max(1, BLOCK_BYTES // image_bytes)
    images = max(n for n in range(1, min(fits, batch) + 1) if batch % n == 0)
    return Layout(
        batch=batch,
        tokens=tokens,
        heads=heads,
        images=images,
        query_rows=query_rows,
        key_rows=key_rows,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What one call costs a chip, padding included.

    Attributes:
      flops: of the matrix unit, two per multiply-add.
      vector: operations of the vector unit on float32 numbers.
      transcendentals: exponentials.
      bytes: to and from memory.
    """

    flops: int
    vector: int
    transcendentals: int
    bytes: int


# On each score, in the kernels below. Forward: bias, maximum, subtract, scale for exp2, sum, times
# 1 / sum, and half a cast (two to a register). Backward: bias, subtract, scale for exp2, p · dp,
# its sum, subtract, multiply, the bias gradient's add, and two half casts.
FORWARD_OPERATIONS = 6.5
BACKWARD_OPERATIONS = 9


def cost(place: Layout, *, dtype: jnp.dtype, backward: bool) -> Cost:
    """The cost of a forward or a backward call."""
    pairs, tiles, _ = place.grid
    units = pairs * PACK * tiles * place.batch  # (head, tile, image)
    scores = place.query_rows * place.key_rows
    products = 5 if backward else 2
    tensors = 7 if backward else 4
    width = place.heads * HEAD_WIDTH
    moved = tensors * place.batch * place.tokens * width * jnp.dtype(dtype).itemsize
    if backward and tiles > 1:  # parts of two gradients in float32
        moved += 2 * tiles * place.batch * place.tokens * width * 4
    bias = (2 if backward else 1) * place.heads * place.tokens**2 * 4
    sums = place.batch * place.heads * place.tokens * 4
    return Cost(
        flops=2 * products * units * scores * LANES,
        vector=int((BACKWARD_OPERATIONS if backward else FORWARD_OPERATIONS) * units * scores),
        transcendentals=units * scores,
        bytes=moved + bias + sums,
    )


@jax.custom_vjp
def fused_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array
) -> jax.Array:
    """softmax(query keyᵀ + bias) value, for every head; queries are scaled already.

    Products of bfloat16 inputs are summed in float32; bias, softmax and its sums are float32. Runs
    on TPUs; elsewhere under `pltpu.force_tpu_interpret_mode()`, which poisons the padding.

    Args:
      query, key, value: `[b, n, h * 64]`, heads side by side.
      bias: float32 `[h, n, n]`, of (head, query, key).

    Returns:
      `[b, n, h * 64]` in the dtype of `query`. All four inputs have gradients; the bias' is summed
      over the images.

    Raises:
      ValueError: shapes don't fit each other.
    """
    return _forward(query, key, value, bias)[0]


def _forward(query, key, value, bias):
    place = _place(query, bias)
    queries, keys, scores, sums = _specs(place)
    pairs, kept = place.grid[0], place.tiles * place.query_rows
    return pl.pallas_call(
        functools.partial(_forward_kernel, place=place),
        out_shape=[
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct((pairs, place.batch, PACK, kept), jnp.float32),
        ],
        grid=place.grid,
        in_specs=[queries, keys, keys, scores],
        out_specs=[queries, sums],
        scratch_shapes=_scratch(place, query.dtype, weights=1),
        name="attention_forward",
        **_settings(place, dtype=query.dtype, backward=False),
    )(query, key, value, bias.mT)


def _forward_kernel(query, key, value, bias, mixed, sums, masked_bias, weights, *, place: Layout):
    """One grid step: `images` images, `query_rows` queries, two heads."""
    _mask_bias(bias, masked_bias, place)

    def image(i, carry):
        q = _zero_padding(query[i], place, queries=True)
        k, v = (_zero_padding(each[i], place, queries=False) for each in (key, value))
        mixes = []
        for head in range(PACK):
            mine = _lanes(head)
            for part in _parts(place):
                scores = _dot(k, jnp.where(mine, q[part], 0), contract=(1, 1))
                scores = scores + masked_bias[head, :, part]
                most = scores.max(axis=0, keepdims=True)
                exponentials = jnp.exp(scores - most)
                total = exponentials.sum(axis=0, keepdims=True)
                weights[0, head, :, part] = (exponentials * (1 / total)).astype(q.dtype)
                sums[i, head, part] = (most + jnp.log(total))[0]
            mixes.append(_dot(weights[0, head], v, contract=(0, 0)))
        mixed[i] = jnp.where(_lanes(0), *mixes).astype(mixed.dtype)
        return carry

    jax.lax.fori_loop(0, place.images, image, 0)


def _forward_rule(query, key, value, bias):
    mixed, sums = _forward(query, key, value, bias)
    return mixed, (query, key, value, bias, sums)


def _backward_rule(residuals, gradient):
    query, key, value, bias, kept = residuals
    place = _place(query, bias)
    queries, keys, scores, sums = _specs(place)
    if place.tiles == 1:
        part, part_spec = jax.ShapeDtypeStruct(query.shape, query.dtype), keys
    else:  # every tile of queries has its part of the keys' and values' gradients
        part = jax.ShapeDtypeStruct((place.tiles, *query.shape), jnp.float32)
        part_spec = pl.BlockSpec(
            (None, place.images, place.key_rows, LANES), lambda h, t, b: (t, b, 0, h)
        )
    d_query, d_key, d_value, d_bias = pl.pallas_call(
        functools.partial(_backward_kernel, place=place),
        out_shape=[
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            part,
            part,
            jax.ShapeDtypeStruct(bias.shape, jnp.float32),
        ],
        grid=place.grid,
        in_specs=[queries, keys, keys, scores, sums, queries],
        out_specs=[queries, part_spec, part_spec, scores],
        scratch_shapes=_scratch(place, query.dtype, weights=2),
        name="attention_backward",
        **_settings(place, dtype=query.dtype, backward=True),
    )(query, key, value, bias.mT, kept, gradient)
    if place.tiles > 1:
        d_key, d_value = (each.sum(axis=0).astype(query.dtype) for each in (d_key, d_value))
    return d_query, d_key, d_value, d_bias.mT


def _backward_kernel(
    query,
    key,
    value,
    bias,
    sums,
    gradient,
    d_query,
    d_key,
    d_value,
    d_bias,
    masked_bias,
    scratch,
    *,
    place: Layout,
):
    """As `_forward_kernel`."""
    _mask_bias(bias, masked_bias, place)

    @pl.when(pl.program_id(2) == 0)
    def _():
        d_bias[...] = jnp.zeros_like(d_bias)

    def image(i, carry):
        q, g = (_zero_padding(each[i], place, queries=True) for each in (query, gradient))
        k, v = (_zero_padding(each[i], place, queries=False) for each in (key, value))
        results = []
        for head in range(PACK):
            mine = _lanes(head)
            for part in _parts(place):
                scores = _dot(k, jnp.where(mine, q[part], 0), contract=(1, 1))
                scores = scores + masked_bias[head, :, part]
                weights = jnp.exp(scores - sums[i, head, part][None])
                d_weights = _dot(v, jnp.where(mine, g[part], 0), contract=(1, 1))
                along = (weights * d_weights).sum(axis=0, keepdims=True)
                d_scores = weights * (d_weights - along)
                d_bias[head, :, part] += d_scores
                scratch[0, head, :, part] = weights.astype(q.dtype)
                scratch[1, head, :, part] = d_scores.astype(q.dtype)
            weights, d_scores = scratch[0, head], scratch[1, head]
            results.append(
                (
                    _dot(d_scores, k, contract=(0, 0)),
                    _dot(d_scores, q, contract=(1, 0)),
                    _dot(weights, g, contract=(1, 0)),
                )
            )
        for target, *both in zip((d_query, d_key, d_value), *results, strict=False):
            target[i] = jnp.where(_lanes(0), *both).astype(target.dtype)
        return carry

    jax.lax.fori_loop(0, place.images, image, 0)


fused_attention.defvjp(_forward_rule, _backward_rule)


def _place(query: jax.Array, bias: jax.Array) -> Layout:
    batch, tokens, width = query.shape
    if bias.shape != (width // HEAD_WIDTH, tokens, tokens) or width % HEAD_WIDTH:
        raise ValueError(
            f"queries {list(query.shape)} in heads of {HEAD_WIDTH} need a bias of "
            f"[{width // HEAD_WIDTH}, {tokens}, {tokens}], got {list(bias.shape)}"
        )
    return layout(batch=batch, tokens=tokens, heads=bias.shape[0])


def _specs(place: Layout) -> tuple[pl.BlockSpec, ...]:
    """Blocks of queries, of keys or values, of a bias `[h, keys, queries]`, of the kept sums."""
    tokens = (place.images, place.query_rows, LANES)
    return (
        pl.BlockSpec(tokens, lambda h, t, b: (b, t, h)),
        pl.BlockSpec((place.images, place.key_rows, LANES), lambda h, t, b: (b, 0, h)),
        pl.BlockSpec((PACK, place.key_rows, place.query_rows), lambda h, t, b: (h, 0, t)),
        pl.BlockSpec((None, place.images, PACK, place.query_rows), lambda h, t, b: (h, b, 0, t)),
    )


def _scratch(place: Layout, dtype: jnp.dtype, *, weights: int) -> list:
    shape = (PACK, place.key_rows, place.query_rows)
    return [pltpu.VMEM(shape, jnp.float32), pltpu.VMEM((weights, *shape), dtype)]


def _settings(place: Layout, *, dtype: jnp.dtype, backward: bool) -> dict:
    spent = cost(place, dtype=dtype, backward=backward)
    return dict(
        cost_estimate=pl.CostEstimate(
            flops=spent.flops,
            transcendentals=spent.transcendentals,
            bytes_accessed=spent.bytes,
        ),
        # Heads may go to different cores; images of a head must follow each other.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary")
        ),
    )


def _mask_bias(bias, masked_bias, place: Layout) -> None:
    """Once per tile: the bias, and `MASKED` where there is no such score."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        shape = (place.key_rows, place.query_rows)
        keys = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        queries = pl.program_id(1) * place.query_rows
        queries = queries + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        there = (keys < place.tokens) & (queries < place.tokens)
        for head in range(PACK):
            masked_bias[head] = jnp.where(there, bias[head], MASKED)


def _zero_padding(block, place: Layout, *, queries: bool):
    """A block's image `[rows, 128]` with zeros where there is no token."""
    shape = block.shape
    first = pl.program_id(1) * place.query_rows if queries else 0
    # Rows before are tokens in every tile. A select costs bfloat16 four operations.
    certain = place.tokens - (place.tiles - 1) * place.query_rows if queries else place.tokens
    certain = certain // SUBLANES * SUBLANES
    if place.heads % PACK:  # the last register is half full
        certain = 0
    row = certain + jax.lax.broadcasted_iota(jnp.int32, (shape[0] - certain, LANES), 0)
    exist = first + row < place.tokens
    if place.heads % PACK:
        lane = jax.lax.broadcasted_iota(jnp.int32, exist.shape, 1)
        exist &= pl.program_id(0) * LANES + lane < place.heads * HEAD_WIDTH
    rest = jnp.where(exist, block[certain:], 0)
    return jnp.concatenate([block[:certain], rest]) if certain else rest


def _parts(place: Layout) -> list[slice]:
    return [slice(n * LANES, (n + 1) * LANES) for n in range(place.parts)]


def _lanes(head: int):
    """The lanes of one of two heads, `[1, 128]`."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    return (lane >= head * HEAD_WIDTH) & (lane < (head + 1) * HEAD_WIDTH)


def _dot(a, b, *, contract: tuple[int, int]):
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _up(value: int, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple
