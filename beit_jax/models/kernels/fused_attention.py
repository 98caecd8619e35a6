"""Attention for short sequences with a bias on the scores, as one TPU kernel (Pallas).

The scores `[n, n]` of one head and image fit on the chip, so they never go to memory. XLA's own
program writes and reads them several times, which is half of a block's time at 197 tokens. Stock
flash kernels do not serve here: key lengths must divide by 128, and a bias must be materialised for
every image.

How the work is laid out:

- Queries, keys and values stay `[b, n, d]`, as the projections make them: no transposes outside,
  and no padding of 64-wide heads to the 128 lanes of a register in memory.
- 128 lanes, two heads, go through the kernel together. One head is selected by zeroing the other's
  lanes of *one* factor: the matrix unit contracts 128 lanes anyway.
- Scores are `[keys, queries]`, 128 queries at a time: sums over keys run over registers and not
  inside them, and the scores of one part (26 registers at 197 tokens) stay in registers.
- Token counts are padded inside the kernel only. The padding's contents are undefined, so they are
  zeroed in every factor, and the bias of a padded score is `MASKED`.
- The grid runs over heads, then tiles of queries, then images: a bias is read once per head, and
  its gradient, which is summed over images, stays on the chip until all images are done.
- The forward pass keeps log Σ exp(scores) of every query; the backward pass recomputes the scores.

    mixed = fused_attention(query, key, value, bias)
"""

import dataclasses
import functools
import math
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# A block in the chip's memory that a kernel reads and writes; Pallas has no public type for it.
_Ref: TypeAlias = Any
# Query, key, value, bias, and log Σ exp(scores) of every query.
_Residuals: TypeAlias = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]

HEAD_WIDTH = 64
LANES = 128
PACK = LANES // HEAD_WIDTH  # heads side by side in the lanes of a register
SUBLANES = 16  # rows of a bfloat16 tile
MASKED = -1e30  # the bias of a padded score; finite, so that a row of them stays finite
# The largest number of (query, key) pairs in a tile: bias, its gradient and scores of two heads
# must fit into 16 MB together.
MAX_SCORES = 256 * 640
MAX_QUERY_ROWS = 256
BLOCK_BYTES = 6 * 2**20  # of queries, keys and values in flight; limits the images of a grid step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How one call is divided into grid steps.

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
        """Tiles that the queries are divided into; a grid step computes one."""
        return pl.cdiv(self.tokens, self.query_rows)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Pairs of heads, tiles of queries, groups of images."""
        return (pl.cdiv(self.heads, PACK), self.tiles, self.batch // self.images)

    @property
    def parts(self) -> int:
        """Parts of 128 queries in a grid step."""
        return self.query_rows // LANES


def choose_layout(*, batch: int, tokens: int, heads: int) -> Layout:
    """Chooses tiles and images per grid step that fit into the chip's memory."""
    key_rows = _round_up(tokens, SUBLANES)
    fitting = min(MAX_QUERY_ROWS, max(MAX_SCORES // key_rows // LANES, 1) * LANES)
    query_rows = _round_up(pl.cdiv(tokens, pl.cdiv(tokens, fitting)), LANES)
    # Seven arrays in the backward pass, double-buffered.
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
    """The work of one call on a chip, padding included.

    Attributes:
      flops: matrix unit, two per multiply-add.
      vector: operations of the vector unit on float32 numbers.
      transcendentals: exponentials.
      bytes: moved to and from memory.
    """

    flops: int
    vector: int
    transcendentals: int
    bytes: int


# Vector operations per score in the kernels below. Forward: bias, maximum, subtract, scale for
# exp2, sum, times 1 / sum, half a cast (two to a register). Backward: bias, subtract, scale for
# exp2, p · dp, its sum, subtract, multiply, the bias gradient's add, and two half casts.
FORWARD_OPERATIONS = 6.5
BACKWARD_OPERATIONS = 9


def cost(layout: Layout, *, dtype: jnp.dtype, backward: bool) -> Cost:
    """The cost of a forward or a backward call."""
    pairs, tiles, _ = layout.grid
    units = pairs * PACK * tiles * layout.batch  # (head, tile, image)
    scores = layout.query_rows * layout.key_rows
    products = 5 if backward else 2
    tensors = 7 if backward else 4
    width = layout.heads * HEAD_WIDTH
    moved = tensors * layout.batch * layout.tokens * width * jnp.dtype(dtype).itemsize
    if backward and tiles > 1:  # partial sums of two gradients in float32
        moved += 2 * tiles * layout.batch * layout.tokens * width * 4
    bias = (2 if backward else 1) * layout.heads * layout.tokens**2 * 4
    sums = layout.batch * layout.heads * layout.tokens * 4
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
    """softmax(query keyᵀ + bias) value, for every head; expects scaled queries.

    Products of bfloat16 inputs are summed in float32; bias, softmax and its sums are float32. Runs
    on TPUs, and elsewhere under `pltpu.force_tpu_interpret_mode()`, which poisons the padding.

    Args:
      query, key, value: `[b, n, h * 64]`, heads side by side.
      bias: float32 `[h, n, n]`, of (head, query, key).

    Returns:
      `[b, n, h * 64]` in the dtype of `query`. All four inputs have gradients; the bias' is summed
      over the images.

    Raises:
      ValueError: the shapes do not fit each other.
    """
    return _forward(query, key, value, bias)[0]


def _forward(
    query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The result, and log Σ exp(scores) of every query, which the backward pass needs."""
    layout = _layout_of(query, bias)
    queries, keys, scores, sums = _specs(layout)
    pairs, kept = layout.grid[0], layout.tiles * layout.query_rows
    return pl.pallas_call(
        functools.partial(_forward_kernel, layout=layout),
        out_shape=[
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct((pairs, layout.batch, PACK, kept), jnp.float32),
        ],
        grid=layout.grid,
        in_specs=[queries, keys, keys, scores],
        out_specs=[queries, sums],
        scratch_shapes=_scratch(layout, query.dtype, weights=1),
        name="attention_forward",
        **_settings(layout, dtype=query.dtype, backward=False),
    )(query, key, value, bias.mT)


def _forward_kernel(
    query: _Ref,
    key: _Ref,
    value: _Ref,
    bias: _Ref,
    mixed: _Ref,
    sums: _Ref,
    masked_bias: _Ref,
    weights: _Ref,
    *,
    layout: Layout,
) -> None:
    """One grid step: `images` images, `query_rows` queries, two heads."""
    _mask_bias(bias, masked_bias, layout)

    def image(i: jax.Array, carry: int) -> int:
        q = _zero_padding(query[i], layout, queries=True)
        k, v = (_zero_padding(block[i], layout, queries=False) for block in (key, value))
        mixes = []
        for head in range(PACK):
            lanes = _lanes(head)
            for part in _parts(layout):
                scores = _dot(k, jnp.where(lanes, q[part], 0), contract=(1, 1))
                scores = scores + masked_bias[head, :, part]
                largest = scores.max(axis=0, keepdims=True)
                exponentials = jnp.exp(scores - largest)
                total = exponentials.sum(axis=0, keepdims=True)
                weights[0, head, :, part] = (exponentials * (1 / total)).astype(q.dtype)
                sums[i, head, part] = (largest + jnp.log(total))[0]
            mixes.append(_dot(weights[0, head], v, contract=(0, 0)))
        mixed[i] = jnp.where(_lanes(0), mixes[0], mixes[1]).astype(mixed.dtype)
        return carry

    jax.lax.fori_loop(0, layout.images, image, 0)


def _forward_rule(
    query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array
) -> tuple[jax.Array, _Residuals]:
    mixed, sums = _forward(query, key, value, bias)
    return mixed, (query, key, value, bias, sums)


def _backward_rule(
    residuals: _Residuals, gradient: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    query, key, value, bias, kept = residuals
    layout = _layout_of(query, bias)
    queries, keys, scores, sums = _specs(layout)
    if layout.tiles == 1:
        part, part_spec = jax.ShapeDtypeStruct(query.shape, query.dtype), keys
    else:  # every tile of queries adds to the keys' and values' gradients
        part = jax.ShapeDtypeStruct((layout.tiles, *query.shape), jnp.float32)
        part_spec = pl.BlockSpec(
            (None, layout.images, layout.key_rows, LANES), lambda h, t, b: (t, b, 0, h)
        )
    d_query, d_key, d_value, d_bias = pl.pallas_call(
        functools.partial(_backward_kernel, layout=layout),
        out_shape=[
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            part,
            part,
            jax.ShapeDtypeStruct(bias.shape, jnp.float32),
        ],
        grid=layout.grid,
        in_specs=[queries, keys, keys, scores, sums, queries],
        out_specs=[queries, part_spec, part_spec, scores],
        scratch_shapes=_scratch(layout, query.dtype, weights=2),
        name="attention_backward",
        **_settings(layout, dtype=query.dtype, backward=True),
    )(query, key, value, bias.mT, kept, gradient)
    if layout.tiles > 1:
        d_key, d_value = (parts.sum(axis=0).astype(query.dtype) for parts in (d_key, d_value))
    return d_query, d_key, d_value, d_bias.mT


def _backward_kernel(
    query: _Ref,
    key: _Ref,
    value: _Ref,
    bias: _Ref,
    sums: _Ref,
    gradient: _Ref,
    d_query: _Ref,
    d_key: _Ref,
    d_value: _Ref,
    d_bias: _Ref,
    masked_bias: _Ref,
    scratch: _Ref,
    *,
    layout: Layout,
) -> None:
    """One grid step, as in `_forward_kernel`; recomputes the scores."""
    _mask_bias(bias, masked_bias, layout)

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        d_bias[...] = jnp.zeros_like(d_bias)

    def image(i: jax.Array, carry: int) -> int:
        q, g = (_zero_padding(block[i], layout, queries=True) for block in (query, gradient))
        k, v = (_zero_padding(block[i], layout, queries=False) for block in (key, value))
        results = []
        for head in range(PACK):
            lanes = _lanes(head)
            for part in _parts(layout):
                scores = _dot(k, jnp.where(lanes, q[part], 0), contract=(1, 1))
                scores = scores + masked_bias[head, :, part]
                weights = jnp.exp(scores - sums[i, head, part][None])
                d_weights = _dot(v, jnp.where(lanes, g[part], 0), contract=(1, 1))
                projected = (weights * d_weights).sum(axis=0, keepdims=True)
                d_scores = weights * (d_weights - projected)
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
        for target, first, second in zip((d_query, d_key, d_value), *results, strict=True):
            target[i] = jnp.where(_lanes(0), first, second).astype(target.dtype)
        return carry

    jax.lax.fori_loop(0, layout.images, image, 0)


fused_attention.defvjp(_forward_rule, _backward_rule)


def _layout_of(query: jax.Array, bias: jax.Array) -> Layout:
    batch, tokens, width = query.shape
    if bias.shape != (width // HEAD_WIDTH, tokens, tokens) or width % HEAD_WIDTH:
        raise ValueError(
            f"queries {list(query.shape)} in heads of {HEAD_WIDTH} need a bias of "
            f"[{width // HEAD_WIDTH}, {tokens}, {tokens}], got {list(bias.shape)}"
        )
    return choose_layout(batch=batch, tokens=tokens, heads=bias.shape[0])


def _specs(layout: Layout) -> tuple[pl.BlockSpec, ...]:
    """Blocks of queries, of keys and values, of a bias `[h, keys, queries]`, of the kept sums."""
    tokens = (layout.images, layout.query_rows, LANES)
    return (
        pl.BlockSpec(tokens, lambda h, t, b: (b, t, h)),
        pl.BlockSpec((layout.images, layout.key_rows, LANES), lambda h, t, b: (b, 0, h)),
        pl.BlockSpec((PACK, layout.key_rows, layout.query_rows), lambda h, t, b: (h, 0, t)),
        pl.BlockSpec((None, layout.images, PACK, layout.query_rows), lambda h, t, b: (h, b, 0, t)),
    )


def _scratch(layout: Layout, dtype: jnp.dtype, *, weights: int) -> list[Any]:
    shape = (PACK, layout.key_rows, layout.query_rows)
    return [pltpu.VMEM(shape, jnp.float32), pltpu.VMEM((weights, *shape), dtype)]


def _settings(layout: Layout, *, dtype: jnp.dtype, backward: bool) -> dict[str, Any]:
    spent = cost(layout, dtype=dtype, backward=backward)
    return dict(
        cost_estimate=pl.CostEstimate(
            flops=spent.flops,
            transcendentals=spent.transcendentals,
            bytes_accessed=spent.bytes,
        ),
        # Heads may run on different cores; the images of a head must run one after the other.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary")
        ),
    )


def _mask_bias(bias: _Ref, masked_bias: _Ref, layout: Layout) -> None:
    """Copies the bias once per tile, with `MASKED` where the score is padding."""

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        shape = (layout.key_rows, layout.query_rows)
        keys = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        queries = pl.program_id(1) * layout.query_rows
        queries = queries + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        valid = (keys < layout.tokens) & (queries < layout.tokens)
        for head in range(PACK):
            masked_bias[head] = jnp.where(valid, bias[head], MASKED)


def _zero_padding(block: jax.Array, layout: Layout, *, queries: bool) -> jax.Array:
    """One image of a block, `[rows, 128]`, with zeros where there is no token."""
    shape = block.shape
    first = pl.program_id(1) * layout.query_rows if queries else 0
    # Rows before `certain` are tokens in every tile: a select costs bfloat16 four operations.
    certain = layout.tokens - (layout.tiles - 1) * layout.query_rows if queries else layout.tokens
    certain = certain // SUBLANES * SUBLANES
    if layout.heads % PACK:  # the last register is half full
        certain = 0
    row = certain + jax.lax.broadcasted_iota(jnp.int32, (shape[0] - certain, LANES), 0)
    valid = first + row < layout.tokens
    if layout.heads % PACK:
        lane = jax.lax.broadcasted_iota(jnp.int32, valid.shape, 1)
        valid &= pl.program_id(0) * LANES + lane < layout.heads * HEAD_WIDTH
    rest = jnp.where(valid, block[certain:], 0)
    return jnp.concatenate([block[:certain], rest]) if certain else rest


def _parts(layout: Layout) -> list[slice]:
    return [slice(n * LANES, (n + 1) * LANES) for n in range(layout.parts)]


def _lanes(head: int) -> jax.Array:
    """The lanes of one of two heads, `[1, 128]`."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    return (lane >= head * HEAD_WIDTH) & (lane < (head + 1) * HEAD_WIDTH)


def _dot(a: jax.Array, b: jax.Array, *, contract: tuple[int, int]) -> jax.Array:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _round_up(value: int, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple
