"""Every implementation of attention against plain float64 NumPy."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from beit_jax.models import attention
from beit_jax.models.kernels.fused_attention import (
    HEAD_WIDTH,
    MAX_QUERY_ROWS,
    choose_layout,
    cost,
    fused_attention,
)
from beit_jax.training import sharding

# (images, tokens, heads): a token count under, at and over a tile of rows and of lanes; an odd
# number of heads leaves the last register half empty; more than 256 tokens take several tiles.
SHAPES = [(1, 3, 2), (2, 17, 1), (2, 128, 2), (2, 130, 3), (2, 197, 2), (1, 300, 2)]


def inputs(shape: tuple[int, int, int], *, dtype: str) -> tuple[np.ndarray, ...]:
    """Query (scaled), key, value, bias and the result's gradient, rounded to `dtype`."""
    images, tokens, heads = shape
    rng = np.random.default_rng(sum(shape))
    arrays = [rng.standard_normal((images, tokens, heads * HEAD_WIDTH)) for _ in range(4)]
    arrays[0] /= HEAD_WIDTH**0.5
    *flat, gradient = (np.asarray(jnp.asarray(array, dtype), np.float64) for array in arrays)
    bias = 2 * rng.standard_normal((heads, tokens, tokens)).astype(np.float32)
    return *flat, bias.astype(np.float64), gradient


def exact(query, key, value, bias, gradient):
    """The result and all four gradients, in float64, by the formulas."""

    def split(x):
        b, n, d = x.shape
        return x.reshape(b, n, d // HEAD_WIDTH, HEAD_WIDTH).transpose(0, 2, 1, 3)

    def join(x):
        b, h, n, k = x.shape
        return x.transpose(0, 2, 1, 3).reshape(b, n, h * k)

    q, k, v, g = (split(array) for array in (query, key, value, gradient))
    scores = q @ k.swapaxes(-1, -2) + bias
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    d_weights = g @ v.swapaxes(-1, -2)
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True))
    return (
        join(weights @ v),
        join(d_scores @ k),
        join(d_scores.swapaxes(-1, -2) @ q),
        join(weights.swapaxes(-1, -2) @ g),
        d_scores.sum(axis=0),
    )


def assert_close(results, references, *, relative: float) -> None:
    """Compares with the largest entry: a small difference of large numbers is no smaller."""
    for name, actual, expected in zip(
        ("mixed", "query", "key", "value", "bias"), results, references, strict=True
    ):
        off = np.abs(np.asarray(actual, np.float64) - expected).max() / np.abs(expected).max()
        assert off < relative, f"{name}: {off:.1e}"


def value_and_gradients(function, arrays, *, dtype: str):
    *flat, bias, gradient = arrays
    flat = [jnp.asarray(array, dtype) for array in flat]
    mixed, back = jax.vjp(function, *flat, jnp.asarray(bias, jnp.float32))
    return mixed, *back(jnp.asarray(gradient, mixed.dtype))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "dtype", "relative"),
    [(shape, "float32", 1e-5) for shape in SHAPES]
    + [(shape, "bfloat16", 1e-2) for shape in SHAPES[-2:]],
    ids=str,
)
def test_fused_equals_float64_with_the_padding_poisoned(shape, dtype, relative):
    arrays = inputs(shape, dtype=dtype)
    # The interpreter fills what lies beyond an array, and new scratch memory, with NaN.
    with pltpu.force_tpu_interpret_mode():
        found = value_and_gradients(fused_attention, arrays, dtype=dtype)
    assert_close(found, exact(*arrays), relative=relative)


def test_the_interpreter_poisons_the_padding():
    from jax.experimental import pallas as pl

    def kernel(x, out):
        out[...] = x[...]

    def copy(x):
        spec = pl.BlockSpec((16, 128), lambda: (0, 0))
        return pl.pallas_call(
            kernel, out_shape=jax.ShapeDtypeStruct((16, 128), x.dtype), in_specs=[spec]
        )(x)

    with pltpu.force_tpu_interpret_mode():
        assert np.isnan(copy(jnp.ones((5, 128)))[5:]).all()


@pytest.mark.parametrize("implementation", ["plain", "cudnn"])
def test_the_other_implementations_equal_float64(implementation):
    arrays = inputs((2, 17, 2), dtype="float32")

    def plain(query, key, value, bias):
        heads = (attention.rearrange(x, "b n (h k) -> b h n k", h=2) for x in (query, key, value))
        return attention.rearrange(attention.plain_attention(*heads, bias), "b n h k -> b n (h k)")

    def padded(*args):  # as for cuDNN, computed by XLA: layout and the pad to even counts
        return attention._cudnn(*args, heads=2, library="xla")

    function = {"plain": plain, "cudnn": padded}[implementation]
    found = value_and_gradients(function, arrays, dtype="float32")
    assert_close(found, exact(*arrays), relative=1e-5)


def test_extreme_scores_stay_finite():
    *flat, bias, gradient = inputs((1, 17, 2), dtype="float32")
    arrays = [*(30 * array for array in flat), 1e4 * bias, gradient]
    with pltpu.force_tpu_interpret_mode():
        found = value_and_gradients(fused_attention, arrays, dtype="float32")
    assert all(np.isfinite(array).all() for array in found)
    np.testing.assert_allclose(found[0], exact(*arrays)[0], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_eight_devices_equal_one():
    if jax.device_count() < 8:
        pytest.skip("needs 8 (simulated) devices")
    *flat, _, gradient = inputs((8, 5, 2), dtype="float32")
    table = np.random.default_rng(0).standard_normal((25, 2)).astype(np.float32)
    index = np.arange(25).reshape(5, 5)
    arrays = [*flat, table, gradient]

    def mix(query, key, value, table):
        bias = attention.split_over_devices(table, batch=8)[:, index].transpose(0, 3, 1, 2)
        return attention.flat_attention(query, key, value, bias, heads=2, implementation="fused")

    mesh = sharding.make_mesh(fsdp=2)
    batch = jax.NamedSharding(mesh, sharding.BATCH)
    with contextlib.ExitStack() as stack:
        stack.enter_context(pltpu.force_tpu_interpret_mode())
        one = value_and_gradients(mix, arrays, dtype="float32")

        def all_of_it(*arrays):
            return value_and_gradients(sharding.on_mesh(mix, mesh), arrays, dtype="float32")

        placed = [jax.device_put(array.astype(np.float32), batch) for array in flat]
        eight = jax.jit(all_of_it)(*placed, table, gradient.astype(np.float32))
    for actual, expected in zip(eight, one, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_auto_takes_the_kernel_on_tpus_where_it_fits():
    def chosen(**kwargs):
        return attention.resolve_implementation("auto", **kwargs)

    assert chosen(head_width=64, platform="tpu") == "fused"
    assert chosen(head_width=32, platform="tpu") == "xla"
    assert chosen(head_width=64, platform="cpu") == chosen(head_width=64, platform="gpu") == "xla"
    assert attention.resolve_implementation("cudnn", head_width=64, platform="gpu") == "cudnn"


def test_cost_counts_the_padding():
    layout = choose_layout(batch=64, tokens=197, heads=12)
    assert (layout.query_rows, layout.key_rows, layout.tiles) == (256, 208, 1)
    forward, backward = (
        cost(layout, dtype=jnp.bfloat16, backward=array) for array in (False, True)
    )
    assert forward.flops == 2 * 2 * 64 * 12 * 256 * 208 * 128  # two products, 64 wide in 128
    assert backward.flops * 2 == forward.flops * 5
    assert forward.bytes > 4 * 64 * 197 * 768 * 2
    # 577 and 1025 tokens (384 and 512 pixels) are cut up.
    for tokens in (577, 1025):
        cut = choose_layout(batch=8, tokens=tokens, heads=16)
        assert cut.query_rows <= MAX_QUERY_ROWS
        assert cut.tiles * cut.query_rows >= tokens


def test_shapes_that_do_not_fit_are_an_error():
    x = jnp.zeros((1, 5, 128))
    with pytest.raises(ValueError, match=r"need a bias of \[2, 5, 5\], got \[2, 5, 6\]"):
        fused_attention(x, x, x, jnp.zeros((2, 5, 6)))
