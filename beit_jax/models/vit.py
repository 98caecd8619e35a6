"""The BEiT encoder: patches in, contextual tokens out (paper §2; official modeling_pretrain.py).

Shapes use one alphabet: b images, n tokens (1 class token + grid² patches), d width, h heads,
k head width, l layers. Blocks are stacked: every parameter under `blocks` has a leading layer axis
and `lax.scan` runs over it, so that init rescaling, drop-path rates and layer-wise learning rates
are broadcasts over that axis.

Parameters, as a plain nested dict:

    patch_embed/{kernel [p, p, 3, d], bias [d]}
    cls_token [1, 1, d]        mask_token [1, 1, d]*        pos_embed [1, n, d]*
    relative_position_bias/table [t, h]*                    (shared by all blocks)
    blocks/norm1/{scale, bias}  blocks/norm2/{scale, bias}  blocks/{gamma_1, gamma_2} [l, d]*
    blocks/attention/{query, value, proj}/{kernel, bias}    blocks/attention/key/kernel
    blocks/attention/relative_position_bias/table [l, t, h]*
    blocks/mlp/{fc1, fc2}/{kernel, bias}
    norm/{scale, bias}*
    (* where the configuration has it)
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from beit_jax.config import ModelConfig, TokenizerConfig
from beit_jax.models.attention import (
    flat_attention,
    plain_attention,
    resolve_implementation,
    split_over_devices,
)
from beit_jax.models.kernels.gelu import gelu
from beit_jax.models.kernels.matmul import matmul, matmul_heads_first
from beit_jax.models.kernels.residual import add_branch
from beit_jax.types import PyTree

# Rows of a relative-position table after the (2g-1)² patch offsets: class token to patch, patch to
# class token, class token to itself (modeling_finetune.py:91-93).
EXTRA_TABLE_ROWS = 3


def compute_dtype(config: ModelConfig | TokenizerConfig) -> jnp.dtype:
    """Of matmuls and convolutions: bfloat16 on accelerators, float32 on CPU, or what it says."""
    if config.dtype != "auto":
        return jnp.dtype(config.dtype)
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def pretraining_init(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Normal with standard deviation 0.02, cut at ±0.02, i.e. at ±1σ (modeling_pretrain.py:21)."""
    return 0.02 * jax.random.truncated_normal(key, -1.0, 1.0, shape, dtype)


def _fine_tuning_weights(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Normal with standard deviation 0.02; the official cut at ±2 is at ±100σ, none."""
    return 0.02 * jax.random.normal(key, shape, dtype)


def _uniform_patches(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """PyTorch's default for a convolution's weight and bias: uniform within ±1/√fan_in."""
    fan_in = 3 * shape[0] * shape[1]
    return jax.random.uniform(key, shape, dtype, -1, 1) / fan_in**0.5


@dataclasses.dataclass(frozen=True)
class Initialization:
    """How parameters are drawn: functions of `(key, shape)`.

    Attributes:
      weights: of linear layers, class and mask token and absolute positions.
      patches: of the patch projection.
      patch_bias: whether the patch projection's bias is drawn too (like its weight) or 0.
    """

    weights: Callable[..., jax.Array]
    patches: Callable[..., jax.Array]
    patch_bias: bool


PRETRAINING = Initialization(pretraining_init, pretraining_init, patch_bias=False)
# The official fine-tuning class cuts elsewhere and leaves the patch projection as PyTorch makes it
# (modeling_finetune.py:289-317).
FINE_TUNING = Initialization(_fine_tuning_weights, _uniform_patches, patch_bias=True)


def table_rows(grid: int) -> int:
    """Rows of a relative-position table for a `grid` × `grid` image: 732 for 14."""
    return (2 * grid - 1) ** 2 + EXTRA_TABLE_ROWS


@functools.cache
def relative_position_index(grid: int) -> np.ndarray:
    """Which table row the bias of (query, key) is: int32 `[n, n]`, n = 1 + grid².

    modeling_finetune.py:75-93.
    """
    row, column = np.divmod(np.arange(grid * grid), grid)
    rows = table_rows(grid)
    n = grid * grid + 1
    index = np.empty((n, n), np.int32)
    delta_row = row[:, None] - row[None, :] + grid - 1
    delta_column = column[:, None] - column[None, :] + grid - 1
    index[1:, 1:] = delta_row * (2 * grid - 1) + delta_column
    index[0, :] = rows - 3  # query is the class token
    index[:, 0] = rows - 2  # key is the class token
    index[0, 0] = rows - 1
    return index


class RelativePositionBias(nnx.Module):
    """A learned bias of attention scores per head and relative position."""

    def __init__(self, config: ModelConfig):
        self.grid = config.grid
        self.table = nnx.Param(jnp.zeros((table_rows(config.grid), config.heads)))

    def __call__(self, *, batch: int) -> jax.Array:
        """Bias, float32 `[copies, h, n, n]`: a copy for every device that images are split over."""
        tables = split_over_devices(self.table[...], batch=batch)
        bias = tables[:, relative_position_index(self.grid)]
        return rearrange(bias, "copies q k h -> copies h q k")


class PatchEmbed(nnx.Module):
    """Cuts an image into patches, row by row, and projects each: a conv of stride = kernel."""

    def __init__(self, config: ModelConfig, *, init: Initialization, rngs: nnx.Rngs):
        p = config.patch_size
        self.patch_size = p
        self.dtype = compute_dtype(config)
        shape = (p, p, 3, config.width)
        self.kernel = nnx.Param(init.patches(rngs.params(), shape))
        bias = init.patches(rngs.params(), shape)[0, 0, 0] if init.patch_bias else None
        self.bias = nnx.Param(jnp.zeros((config.width,)) if bias is None else bias)

    def __call__(self, images: jax.Array) -> jax.Array:
        """`[b, s, s, 3]` → `[b, grid², d]`."""
        p = self.patch_size
        patches = rearrange(images, "b (r p) (c q) i -> b (r c) (p q i)", p=p, q=p)
        kernel = rearrange(self.kernel[...], "p q i d -> (p q i) d")
        patches, kernel = patches.astype(self.dtype), kernel.astype(self.dtype)
        return matmul(patches, kernel) + self.bias.astype(self.dtype)


class Attention(nnx.Module):
    """Multi-head self-attention with bias on queries and values, none on keys.

    modeling_finetune.py:66-150.
    """

    def __init__(self, config: ModelConfig, *, init: Initialization, rngs: nnx.Rngs):
        self.heads = config.heads
        self.head_width = config.width // config.heads
        self.dtype = compute_dtype(config)
        self.way = resolve_implementation(
            config.attention, head_width=self.head_width, platform=jax.default_backend()
        )
        linear = functools.partial(
            nnx.Linear,
            config.width,
            config.width,
            dtype=self.dtype,
            kernel_init=init.weights,
            rngs=rngs,
        )
        self.query, self.value, self.proj = linear(), linear(), linear()
        self.key = linear(use_bias=False)
        if config.positions == "relative_per_block":
            self.relative_position_bias = RelativePositionBias(config)

    def __call__(
        self, x: jax.Array, *, shared_bias: jax.Array | None, scale: jax.Array | None
    ) -> jax.Array:
        """Attends.

        Args:
          x: `[b, n, d]`.
          shared_bias: added to the scores, `[copies, h, n, n]`.
          scale: LayerScale, `[d]`: the result is multiplied by it.

        Returns:
          `[b, n, d]`.
        """
        x = x.astype(self.dtype)
        bias = shared_bias
        if hasattr(self, "relative_position_bias"):
            own = self.relative_position_bias(batch=x.shape[0])
            bias = own if bias is None else own + bias
        way = self._heads_first if self.way == "xla" else self._side_by_side
        # Weights sum to one: a bias of the values is one of the result, and its gradient then comes
        # with a matrix product's instead of reading the values' gradient again.
        mixed = way(x, bias) + self.value.bias.astype(self.dtype)
        return project(self.proj, mixed, dtype=self.dtype, scale=scale)

    def _heads_first(self, x: jax.Array, bias: jax.Array | None) -> jax.Array:
        def heads(linear: nnx.Linear) -> jax.Array:
            return matmul_heads_first(x, linear.kernel.astype(self.dtype), heads=self.heads)

        query, key, value = (heads(each) for each in (self.query, self.key, self.value))
        query_bias = rearrange(self.query.bias[...], "(h k) -> h 1 k", h=self.heads)
        query = (query + query_bias.astype(self.dtype)) * query.shape[-1] ** -0.5
        bias = None if bias is None else bias[0]
        mixed = plain_attention(query, key, value, bias)
        return rearrange(mixed, "b n h k -> b n (h k)")

    def _side_by_side(self, x: jax.Array, bias: jax.Array | None) -> jax.Array:
        query, key, value = (
            x @ each.kernel.astype(self.dtype) for each in (self.query, self.key, self.value)
        )
        query = (query + self.query.bias.astype(self.dtype)) * self.head_width**-0.5
        return flat_attention(query, key, value, bias, heads=self.heads, implementation=self.way)


class Mlp(nnx.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, config: ModelConfig, *, init: Initialization, rngs: nnx.Rngs):
        self.dtype = compute_dtype(config)
        linear = functools.partial(
            nnx.Linear, dtype=self.dtype, kernel_init=init.weights, rngs=rngs
        )
        self.fc1 = linear(config.width, config.mlp_width)
        self.fc2 = linear(config.mlp_width, config.width)

    def __call__(self, x: jax.Array, *, scale: jax.Array | None) -> jax.Array:
        """`[b, n, d]` → `[b, n, d]`; the result is multiplied by `scale`, `[d]` (LayerScale)."""
        hidden = project(self.fc1, x, dtype=self.dtype, scale=None)
        return project(self.fc2, gelu(hidden), dtype=self.dtype, scale=scale)


def project(
    linear: nnx.Linear, x: jax.Array, *, dtype: jnp.dtype, scale: jax.Array | None
) -> jax.Array:
    """`(x kernel + bias) · scale` in `dtype`.

    The scale goes into the weights, in float32: there it costs a pass over a matrix. On the result
    it would cost one over all activations, and its gradient would need them kept. Fewer rows than
    the matrix has (two images) are the other way round.
    """
    kernel, bias = linear.kernel[...], linear.bias[...]
    in_weights = math.prod(x.shape[:-1]) >= kernel.shape[0]
    if scale is not None and in_weights:
        kernel, bias = kernel * scale, bias * scale
    y = matmul(x.astype(dtype), kernel.astype(dtype)) + bias.astype(dtype)
    return y if scale is None or in_weights else (y * scale).astype(dtype)


def layer_norm(config: ModelConfig, *, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm with float32 statistics, giving the matmuls' dtype.

    E[x²] - E[x]² takes one pass over x where E[(x - E[x])²] takes two (6 % of a block's time on
    TPU), but where a token's mean is r standard deviations it is off by r² · 6e-8. That is less
    than bfloat16 rounds up to r = 200.
    """
    dtype = compute_dtype(config)
    return nnx.LayerNorm(
        config.width,
        epsilon=config.layer_norm_epsilon,
        dtype=dtype,
        use_fast_variance=dtype == jnp.bfloat16,
        rngs=rngs,
    )


def drop_path_factors(key: jax.Array, *, rate: float, layers: int, batch: int) -> jax.Array:
    """What residual branches are multiplied by: 0 where a sample's is dropped, else 1 / (1 - p).

    p grows linearly from 0 in the first block to `rate` in the last.

    Returns:
      float32 `[l, 2, b]`, a block's two branches drawn independently.
    """
    kept = 1.0 - jnp.linspace(0.0, rate, layers)[:, None, None]
    return jax.random.bernoulli(key, kept, (layers, 2, batch)) / kept


class Block(nnx.Module):
    """A pre-norm transformer block with LayerScale and drop path (modeling_finetune.py:153-182)."""

    def __init__(self, config: ModelConfig, *, init: Initialization, rngs: nnx.Rngs):
        self.norm1 = layer_norm(config, rngs=rngs)
        self.attention = Attention(config, init=init, rngs=rngs)
        self.norm2 = layer_norm(config, rngs=rngs)
        self.mlp = Mlp(config, init=init, rngs=rngs)
        self.layer_scale = config.layer_scale_init is not None
        if self.layer_scale:
            self.gamma_1 = nnx.Param(jnp.full((config.width,), config.layer_scale_init))
            self.gamma_2 = nnx.Param(jnp.full((config.width,), config.layer_scale_init))

    def __call__(
        self, x: jax.Array, *, shared_bias: jax.Array | None, factors: jax.Array | None
    ) -> jax.Array:
        """`[b, n, d]` → `[b, n, d]` in the dtype of `x` (the residual stream's).

        Args:
          x: `[b, n, d]`.
          shared_bias: of attention scores, `[copies, h, n, n]`.
          factors: of the two branches, `[2, b]` (`drop_path_factors`); None: all ones.
        """
        scales = (self.gamma_1[...], self.gamma_2[...]) if self.layer_scale else (None, None)
        of_attention, of_mlp = (None, None) if factors is None else factors
        y = self.attention(self.norm1(x), shared_bias=shared_bias, scale=scales[0])
        x = add_branch(x, y, factor=of_attention)
        y = self.mlp(self.norm2(x), scale=scales[1])
        return add_branch(x, y, factor=of_mlp)


def stacked_blocks(config: ModelConfig, *, init: Initialization, rngs: nnx.Rngs) -> Block:
    """A `Block` whose every parameter has a leading axis of `config.layers`.

    The projections back into the residual stream are divided by √(2l) in block l, counted from 1
    (paper §2.5; modeling_pretrain.py:89-97).
    """
    graphdef = None

    def one(key: jax.Array) -> dict:
        nonlocal graphdef
        graphdef, state = nnx.split(Block(config, init=init, rngs=nnx.Rngs(params=key)))
        return nnx.to_pure_dict(state)

    params = jax.vmap(one)(jax.random.split(rngs.params(), config.layers))
    depth = jnp.sqrt(2.0 * jnp.arange(1, config.layers + 1))[:, None, None]
    for linear in (params["attention"]["proj"], params["mlp"]["fc2"]):
        linear["kernel"] = linear["kernel"] / depth
    return nnx.merge(graphdef, params)


class Encoder(nnx.Module):
    """Vision transformer over patches, with masking.

    Args:
      config: sizes and variant.
      mask_token: whether masked patches can be replaced (pre-training).
      final_norm: whether tokens are normalised at the end. Fine-tuning with mean pooling has no
        final norm: its `fc_norm` comes after the pooling.
      init: how parameters are drawn.
      rngs: `params` is drawn from.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        mask_token: bool,
        final_norm: bool,
        init: Initialization = PRETRAINING,
        rngs: nnx.Rngs,
    ):
        d = config.width
        self.config = config
        self.patch_embed = PatchEmbed(config, init=init, rngs=rngs)
        self.cls_token = nnx.Param(init.weights(rngs.params(), (1, 1, d)))
        if mask_token:
            self.mask_token = nnx.Param(init.weights(rngs.params(), (1, 1, d)))
        if config.positions == "absolute":
            self.pos_embed = nnx.Param(init.weights(rngs.params(), (1, config.tokens + 1, d)))
        if config.positions == "relative_shared":
            self.relative_position_bias = RelativePositionBias(config)
        self.blocks = stacked_blocks(config, init=init, rngs=rngs)
        if final_norm:
            self.norm = layer_norm(config, rngs=rngs)

    def __call__(
        self,
        images: jax.Array,
        *,
        mask: jax.Array | None = None,
        drop_path_key: jax.Array | None = None,
    ) -> jax.Array:
        """Encodes images.

        Args:
          images: normalised, float `[b, s, s, 3]`.
          mask: bool `[b, grid²]` or `[b, grid, grid]`; true patches are replaced by the mask
            token.
          drop_path_key: randomness for drop path; None runs every branch (inference).

        Returns:
          Tokens `[b, 1 + grid², d]`, the class token first; normalised where there is a final norm.
        """
        x = self.embed(images, mask=mask)
        x, _ = self._run_blocks(x, drop_path_key=drop_path_key)
        return self.final_norm(x)

    def final_norm(self, tokens: jax.Array) -> jax.Array:
        """The last block's output → what `__call__` returns; as it is without a final norm."""
        return self.norm(tokens) if hasattr(self, "norm") else tokens

    def block_outputs(
        self, images: jax.Array, *, blocks: Sequence[int], mask: jax.Array | None = None
    ) -> jax.Array:
        """Raw outputs of some blocks, at inference. Blocks after the last asked for do not run.

        Args:
          images: normalised, float `[b, s, s, 3]`.
          blocks: numbers from 1 to l; 0 stands for the embeddings, the first block's input. Any
            order, repeats allowed. Only these outputs are kept in memory.
          mask: as for `__call__`.

        Returns:
          `[len(blocks), b, n, d]` in the residual dtype and in the order of `blocks`; no final norm
          (`final_norm` applies it).

        Raises:
          ValueError: no block is asked for, or one that does not exist.
        """
        layers = self.config.layers
        if not blocks or not all(0 <= block <= layers for block in blocks):
            raise ValueError(f"blocks must be numbers from 0 to {layers}, got {list(blocks)}")
        embedded = self.embed(images, mask=mask)
        wanted = sorted(set(blocks))
        _, kept = self._run_blocks(embedded, kept=[block for block in wanted if block])
        if wanted[0] == 0:
            kept = jnp.concatenate([embedded[None], kept])
        if list(blocks) == wanted:
            return kept
        return kept[np.array([wanted.index(block) for block in blocks])]

    def hidden_states(self, images: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Embeddings and the raw output of every block, `[l + 1, b, n, d]`; no final norm."""
        return self.block_outputs(images, blocks=range(self.config.layers + 1), mask=mask)

    def embed(self, images: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Patch tokens, masked, behind the class token: `[b, n, d]` in the residual dtype."""
        config = self.config
        b, height, width, _ = images.shape
        if (height, width) != (config.image_size, config.image_size):
            raise ValueError(
                f"images are {height} × {width}; this encoder's image_size is {config.image_size}"
            )
        dtype = jnp.dtype(config.residual_dtype)
        x = self.patch_embed(images).astype(dtype)
        if mask is not None:
            hidden = mask.reshape(b, config.tokens, 1).astype(bool)
            x = jnp.where(hidden, self.mask_token.astype(dtype), x)
        cls_token = jnp.broadcast_to(self.cls_token.astype(dtype), (b, 1, config.width))
        x = jnp.concatenate([cls_token, x], axis=1)
        if hasattr(self, "pos_embed"):  # after masking: masked patches keep their position
            x = x + self.pos_embed.astype(dtype)
        return x

    def _run_blocks(
        self,
        x: jax.Array,
        *,
        drop_path_key: jax.Array | None = None,
        kept: Sequence[int] | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Runs the blocks one after the other in a scan.

        Args:
          x: the embeddings, `[b, n, d]`.
          drop_path_key: None runs every branch.
          kept: numbers of the blocks, from 1 and ascending, whose outputs are returned; blocks
            after the last of them do not run. None runs all and keeps none.

        Returns:
          The output of the last block that ran, and the kept ones, `[len(kept), b, n, d]`;
          None for those where `kept` is None.
        """
        config = self.config
        shared_bias = (
            self.relative_position_bias(batch=x.shape[0])
            if hasattr(self, "relative_position_bias")
            else None
        )
        graphdef, state = nnx.split(self.blocks)
        params = nnx.to_pure_dict(state)
        factors = slots = outputs = None
        if drop_path_key is not None and config.drop_path_rate > 0:
            factors = drop_path_factors(
                drop_path_key, rate=config.drop_path_rate, layers=config.layers, batch=x.shape[0]
            )
        depth = config.layers
        if kept is not None:
            depth = kept[-1] if kept else 0
            params = jax.tree.map(lambda stacked: stacked[:depth], params)
            # Where each block's output goes; out of range means that it is not kept.
            numbers = np.arange(1, depth + 1)
            slots = np.where(np.isin(numbers, kept), np.searchsorted(kept, numbers), len(kept))
            outputs = jnp.zeros((len(kept), *x.shape), x.dtype)
        if depth == 0:
            return x, outputs

        def body(carry: PyTree, layer: PyTree) -> tuple[PyTree, None]:
            x, outputs = carry
            params, factors, slot = layer
            block = nnx.merge(graphdef, params)
            x = block(x, shared_bias=shared_bias, factors=factors)
            if outputs is not None:
                outputs = outputs.at[slot].set(x, mode="drop")
            return (x, outputs), None

        if config.remat == "full":
            body = jax.checkpoint(body)
        elif config.remat == "dots":
            body = jax.checkpoint(
                body, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            )
        unroll = min(config.scan_unroll, depth)
        (x, outputs), _ = jax.lax.scan(body, (x, outputs), (params, factors, slots), unroll=unroll)
        return x, outputs
