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

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from beit_jax.config import ModelConfig
from beit_jax.models.blocks import compute_dtype, drop_path_factors, layer_norm, stacked_blocks
from beit_jax.models.initialization import PRETRAINING, Initialization
from beit_jax.models.kernels.matmul import matmul
from beit_jax.models.relative_positions import RelativePositionBias
from beit_jax.types import PyTree


class PatchEmbed(nnx.Module):
    """Cuts an image into patches, row by row, and projects them: a convolution, stride = kernel."""

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


class Encoder(nnx.Module):
    """Vision transformer over patches, with masking.

    Args:
      config: sizes and variant.
      mask_token: whether there is a token that replaces masked patches (pre-training).
      final_norm: whether tokens are normalised at the end. Fine-tuning with mean pooling has no
        final norm: its `fc_norm` comes after the pooling.
      init: how parameters are drawn.
      rngs: its stream `params` draws them.
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
          mask: bool `[b, grid²]` or `[b, grid, grid]`; the mask token replaces true patches.
          drop_path_key: randomness for drop path; None runs every branch (inference).

        Returns:
          Tokens `[b, 1 + grid², d]`, the class token first; normalised where there is a final norm.
        """
        x = self.embed(images, mask=mask)
        x, _ = self._run_blocks(x, drop_path_key=drop_path_key)
        return self.final_norm(x)

    def final_norm(self, tokens: jax.Array) -> jax.Array:
        """Normalises the last block's output; returns it unchanged where there is no final norm."""
        return self.norm(tokens) if hasattr(self, "norm") else tokens

    def block_outputs(
        self,
        images: jax.Array,
        *,
        blocks: Sequence[int],
        mask: jax.Array | None = None,
        drop_path_key: jax.Array | None = None,
    ) -> jax.Array:
        """Raw outputs of some blocks. Blocks after the last asked for do not run.

        Args:
          images: normalised, float `[b, s, s, 3]`.
          blocks: numbers from 1 to l; 0 stands for the embeddings, the first block's input. Any
            order, repeats allowed. Only these outputs are kept in memory.
          mask, drop_path_key: as for `__call__`.

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
        _, kept = self._run_blocks(
            embedded, drop_path_key=drop_path_key, kept=[block for block in wanted if block]
        )
        assert kept is not None
        if wanted[0] == 0:
            kept = jnp.concatenate([embedded[None], kept])
        if list(blocks) == wanted:
            return kept
        return kept[np.array([wanted.index(block) for block in blocks])]

    def hidden_states(self, images: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Embeddings and the raw output of every block, `[l + 1, b, n, d]`; no final norm."""
        return self.block_outputs(images, blocks=range(self.config.layers + 1), mask=mask)

    def attention_weights(
        self, images: jax.Array, *, blocks: Sequence[int], mask: jax.Array | None = None
    ) -> jax.Array:
        """Attention weights of some blocks. The blocks themselves run as they always do.

        Args:
          images: normalised, float `[b, s, s, 3]`.
          blocks: numbers from 1 to l, in any order. The last block asked for does not run.
          mask: as for `__call__`.

        Returns:
          float32 `[len(blocks), b, h, n, n]`, (query, key), in the order of `blocks`; rows sum to
          one. A block of base has 1.9 MB for each image.

        Raises:
          ValueError: no block is asked for, or one that does not exist.
        """
        layers = self.config.layers
        if not blocks or not all(1 <= block <= layers for block in blocks):
            raise ValueError(f"blocks must be numbers from 1 to {layers}, got {list(blocks)}")
        inputs = self.block_outputs(images, blocks=[block - 1 for block in blocks], mask=mask)
        shared_bias = self._shared_bias(batch=images.shape[0])
        graphdef, state = nnx.split(self.blocks)
        chosen = np.array(blocks) - 1
        params = jax.tree.map(lambda stacked: stacked[chosen], nnx.to_pure_dict(state))

        def weigh(layer: PyTree) -> jax.Array:
            params, x = layer
            return nnx.merge(graphdef, params).attention_weights(x, shared_bias=shared_bias)

        return jax.lax.map(weigh, (params, inputs))

    def _shared_bias(self, *, batch: int) -> jax.Array | None:
        """The bias of all blocks' scores, float32 `[copies, h, n, n]`; None where there is none."""
        if not hasattr(self, "relative_position_bias"):
            return None
        return self.relative_position_bias(batch=batch)

    def embed(self, images: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """The class token and the masked patch tokens: `[b, n, d]` in the residual dtype.

        Raises:
          ValueError: the images are not of the configured size.
        """
        config = self.config
        b, height, width, _ = images.shape
        if (height, width) != (config.image_size, config.image_size):
            raise ValueError(
                f"images are {height} × {width}; this encoder's image_size is {config.image_size}"
            )
        dtype = jnp.dtype(config.residual_dtype)
        x = self.patch_embed(images).astype(dtype)
        if mask is not None:
            masked = mask.reshape(b, config.tokens, 1).astype(bool)
            x = jnp.where(masked, self.mask_token.astype(dtype), x)
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
        shared_bias = self._shared_bias(batch=x.shape[0])
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
            params, factors = jax.tree.map(lambda stacked: stacked[:depth], (params, factors))
            # The index of every block's output among the kept ones; out of range: not kept.
            numbers = np.arange(1, depth + 1)
            slots = np.where(np.isin(numbers, kept), np.searchsorted(kept, numbers), len(kept))
            outputs = jnp.zeros((len(kept), *x.shape), x.dtype)
        if depth == 0:
            return x, outputs

        def run(x: jax.Array, params: PyTree, factors: jax.Array | None) -> jax.Array:
            return nnx.merge(graphdef, params)(x, shared_bias=shared_bias, factors=factors)

        run = _rematerialized(run, kind=config.remat)

        def body(carry: PyTree, layer: PyTree) -> tuple[PyTree, None]:
            x, outputs = carry
            params, factors, slot = layer
            x = run(x, params, factors)
            if outputs is not None:  # outside `run`, whose inputs are kept for every block
                outputs = outputs.at[slot].set(x, mode="drop")
            return (x, outputs), None

        unroll = min(config.blocks_per_step, depth)
        (x, outputs), _ = jax.lax.scan(body, (x, outputs), (params, factors, slots), unroll=unroll)
        return x, outputs


def _rematerialized(function: Callable, *, kind: str) -> Callable:
    """The function with its activations recomputed in the backward pass, by `ModelConfig.remat`."""
    if kind == "full":
        return jax.checkpoint(function)
    if kind == "dots":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        return jax.checkpoint(function, policy=policy)
    return function
