"""Products with weights: on every platform the same values and gradients as the plain ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from beit_jax.models.flops import matmul_flops
from beit_jax.models.kernels.matmul import matmul, matmul_heads_first

HEADS = 2


def plain(x, kernel):
    return jnp.einsum("bnd,df->bnf", x, kernel)


def plain_heads_first(x, kernel):
    y = plain(x, kernel)
    return y.reshape(*y.shape[:2], HEADS, -1).transpose(0, 2, 1, 3)


def heads_first(x, kernel):
    return matmul_heads_first(x, kernel, heads=HEADS)


PAIRS = [(matmul, plain), (heads_first, plain_heads_first)]


@pytest.mark.parametrize(("function", "expected"), PAIRS)
@pytest.mark.parametrize("width", [4, 12])  # narrower than the input, and wider
def test_values_and_gradients_equal_plain_products(function, expected, width):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 5, 6)).astype(np.float32)
    kernel = rng.normal(size=(6, width)).astype(np.float32)
    value, pull = jax.vjp(function, x, kernel)
    wanted, wanted_pull = jax.vjp(expected, x, kernel)
    np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-5)
    gradient = rng.normal(size=value.shape).astype(np.float32)
    for part, wanted_part in zip(pull(gradient), wanted_pull(gradient), strict=True):
        np.testing.assert_allclose(part, wanted_part, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("function", "expected"), PAIRS)
def test_work_is_counted_once(function, expected):
    arguments = jnp.ones((3, 5, 6)), jnp.ones((6, 4))
    assert matmul_flops(function, *arguments) == matmul_flops(expected, *arguments)


def test_the_form_follows_the_platform_compiled_for():
    """Lowered here for both platforms: the weight is split by head for a TPU, not for a CPU."""
    arguments = jnp.ones((3, 5, 6)), jnp.ones((6, 4))
    products = {}
    for platform in ("cpu", "tpu"):
        lowered = export.export(jax.jit(heads_first), platforms=[platform])(*arguments)
        lines = lowered.mlir_module().splitlines()
        (products[platform],) = [
            line for line in lines if "dot_general" in line and "tensor" in line
        ]
    assert "tensor<6x4xf32>" in products["cpu"]
    assert "tensor<6x2x2xf32>" in products["tpu"]
