"""Transformer blocks: attention and MLP, pre-norm, with LayerScale and drop path.

`stacked_blocks` makes all blocks of an encoder as one module whose parameters have a leading layer
axis, for `jax.lax.scan`. The shapes use the letters of `vit.py`.
"""

import functools
import math

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from beit_jax.config import ModelConfig, TokenizerConfig
from beit_jax.models.attention import flat_attention, plain_attention, resolve_implementation
from beit_jax.models.initialization import Initialization
from beit_jax.models.kernels.gelu import gelu
from beit_jax.models.kernels.matmul import matmul, matmul_heads_first
from beit_jax.models.kernels.residual import add_branch
from beit_jax.models.relative_positions import RelativePositionBias
from beit_jax.types import Params


def compute_dtype(config: ModelConfig | TokenizerConfig) -> jnp.dtype:
    """The dtype of matmuls and convolutions; "auto" is bfloat16 on accelerators, float32 on CPU."""
    if config.dtype != "auto":
        return jnp.dtype(config.dtype)
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


class Attention(nnx.Module):
    """Multi-head self-attention with biases on queries and values but not on keys.

    modeling_finetune.py:66-150.
    """

    def __init__(self, config: ModelConfig, *, init: Initialization, rngs: nnx.Rngs):
        self.heads = config.heads
        self.head_width = config.width // config.heads
        self.dtype = compute_dtype(config)
        self.implementation = resolve_implementation(
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
        """Lets every token attend to all tokens of its image.

        Args:
          x: `[b, n, d]`.
          shared_bias: float32 `[copies, h, n, n]`, added to the scores; None adds nothing.
          scale: `[d]`, multiplies the result (LayerScale); None leaves it as it is.

        Returns:
          `[b, n, d]`.
        """
        x = x.astype(self.dtype)
        bias = shared_bias
        if hasattr(self, "relative_position_bias"):
            block_bias = self.relative_position_bias(batch=x.shape[0])
            bias = block_bias if bias is None else block_bias + bias
        mix = self._heads_first if self.implementation == "xla" else self._flat
        # Softmax weights sum to one, so the value bias can be added after mixing; its gradient then
        # fuses with the projection's matmul.
        mixed = mix(x, bias) + bias_of(self.value).astype(self.dtype)
        return project(self.proj, mixed, dtype=self.dtype, scale=scale)

    def _heads_first(self, x: jax.Array, bias: jax.Array | None) -> jax.Array:
        """Mixes values with heads on an axis of their own, `[b, h, n, k]`, as XLA compiles best."""
        query, key, value = (
            matmul_heads_first(x, linear.kernel.astype(self.dtype), heads=self.heads)
            for linear in (self.query, self.key, self.value)
        )
        query_bias = rearrange(bias_of(self.query), "(h k) -> h 1 k", h=self.heads)
        query = (query + query_bias.astype(self.dtype)) * query.shape[-1] ** -0.5
        bias = None if bias is None else bias[0]
        mixed = plain_attention(query, key, value, bias)
        return rearrange(mixed, "b n h k -> b n (h k)")

    def _flat(self, x: jax.Array, bias: jax.Array | None) -> jax.Array:
        """Mixes values with heads side by side, `[b, n, h k]`, as the kernels take them."""
        query, key, value = (
            x @ linear.kernel.astype(self.dtype) for linear in (self.query, self.key, self.value)
        )
        query = (query + bias_of(self.query).astype(self.dtype)) * self.head_width**-0.5
        return flat_attention(
            query, key, value, bias, heads=self.heads, implementation=self.implementation
        )

    def weights(self, x: jax.Array, *, shared_bias: jax.Array | None) -> jax.Array:
        """How much every token attends to every token, whichever implementation mixes values.

        No implementation keeps these weights, so they are computed once more, from the same
        queries, keys and biases, for whoever looks at them.

        Args:
          x, shared_bias: as for `__call__`.

        Returns:
          float32 `[b, h, n, n]`, (query, key); rows sum to one.
        """
        x = x.astype(self.dtype)
        query, key = (x @ linear.kernel.astype(self.dtype) for linear in (self.query, self.key))
        query = (query + bias_of(self.query).astype(self.dtype)) * self.head_width**-0.5
        query, key = (rearrange(y, "b n (h k) -> b h n k", h=self.heads) for y in (query, key))
        scores = jnp.einsum("bhqk,bhnk->bhqn", query, key, preferred_element_type=jnp.float32)
        if shared_bias is not None:
            scores = scores + shared_bias[0]
        if hasattr(self, "relative_position_bias"):
            scores = scores + self.relative_position_bias(batch=x.shape[0])[0]
        return jax.nn.softmax(scores, axis=-1)


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

    The scale is multiplied into the weights, in float32, which costs a pass over one matrix.
    Multiplied into the result it would cost a pass over all activations, and its gradient would
    need them kept. With fewer rows than the matrix has (two images) the opposite is cheaper.

    Args:
      linear: has a kernel `[d, f]` and a bias.
      x: `[..., d]`.
      dtype: of the product.
      scale: `[f]`; None multiplies by nothing.

    Returns:
      `[..., f]`.
    """
    kernel, bias = linear.kernel[...], bias_of(linear)
    # Not compared without a scale: jax.export's symbolic batch sizes compare with no number.
    in_weights = scale is None or math.prod(x.shape[:-1]) >= kernel.shape[0]
    if scale is not None and in_weights:
        kernel, bias = kernel * scale, bias * scale
    y = matmul(x.astype(dtype), kernel.astype(dtype)) + bias.astype(dtype)
    return y if scale is None or in_weights else (y * scale).astype(dtype)


def layer_norm(config: ModelConfig, *, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm with float32 statistics; its result has the matmuls' dtype.

    E[x²] - E[x]² takes one pass over x where E[(x - E[x])²] takes two (6 % of a block's time on
    TPU), but where a token's mean is r standard deviations it is off by r² · 6e-8. Up to r = 200
    that is less than bfloat16's rounding.
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
    """Factors of the residual branches: 0 drops a sample's branch, 1 / (1 - p) keeps it.

    p grows linearly from 0 in the first block to `rate` in the last.

    Returns:
      float32 `[l, 2, b]`; a block's two branches are drawn independently.
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
        if config.layer_scale_init is not None:
            self.gamma_1 = nnx.Param(jnp.full((config.width,), config.layer_scale_init))
            self.gamma_2 = nnx.Param(jnp.full((config.width,), config.layer_scale_init))

    def __call__(
        self, x: jax.Array, *, shared_bias: jax.Array | None, factors: jax.Array | None
    ) -> jax.Array:
        """`[b, n, d]` → `[b, n, d]` in the dtype of `x` (the residual stream's).

        Args:
          x: the residual stream.
          shared_bias: float32 `[copies, h, n, n]`, added to attention scores.
          factors: `[2, b]`, of the two branches (`drop_path_factors`); None: all ones.
        """
        scales = (self.gamma_1[...], self.gamma_2[...]) if self.layer_scale else (None, None)
        attention_factor, mlp_factor = (None, None) if factors is None else factors
        y = self.attention(self.norm1(x), shared_bias=shared_bias, scale=scales[0])
        x = add_branch(x, y, factor=attention_factor)
        y = self.mlp(self.norm2(x), scale=scales[1])
        return add_branch(x, y, factor=mlp_factor)

    def attention_weights(self, x: jax.Array, *, shared_bias: jax.Array | None) -> jax.Array:
        """This block's attention weights, float32 `[b, h, n, n]`, of its input `[b, n, d]`."""
        return self.attention.weights(self.norm1(x), shared_bias=shared_bias)


def stacked_blocks(config: ModelConfig, *, init: Initialization, rngs: nnx.Rngs) -> Block:
    """A `Block` whose every parameter has a leading axis of `config.layers`.

    The projections back into the residual stream are divided by √(2l) in block l, counted from 1
    (paper §2.5; modeling_pretrain.py:89-97).
    """
    graphdef: nnx.GraphDef[Block] | None = None

    def block_params(key: jax.Array) -> Params:
        nonlocal graphdef
        graphdef, state = nnx.split(Block(config, init=init, rngs=nnx.Rngs(params=key)))
        return nnx.to_pure_dict(state)

    params = jax.vmap(block_params)(jax.random.split(rngs.params(), config.layers))
    depth = jnp.sqrt(2.0 * jnp.arange(1, config.layers + 1))[:, None, None]
    for linear in (params["attention"]["proj"], params["mlp"]["fc2"]):
        linear["kernel"] = linear["kernel"] / depth
    assert graphdef is not None
    return nnx.merge(graphdef, params)


def bias_of(linear: nnx.Linear) -> jax.Array:
    """The bias of a layer that was built with one, `[f]`."""
    assert linear.bias is not None
    return linear.bias[...]
