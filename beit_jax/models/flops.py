"""Counts the matmul FLOPs of a function from its jaxpr: what MFU is measured against.

Unlike XLA's count it is the same on every backend: convolutions at the padded border count in full
and elementwise work does not count.
"""

import math
from collections.abc import Callable
from typing import Any

import jax


def matmul_flops(function: Callable, *args: Any) -> float:
    """FLOPs of all matrix products and convolutions, two per multiply-add.

    Args:
      function: to be traced; nothing is computed.
      *args: arrays or `ShapeDtypeStruct`s, or trees of them.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        out = equation.outvars[0].aval
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2.0 * math.prod(out.shape) * depth
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            outputs = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
            # A transposed convolution multiplies by inserted zeros; they are not work.
            holes = math.prod(equation.params["lhs_dilation"])
            total += 2.0 * math.prod(out.shape) * math.prod(kernel) / outputs / holes
        elif name == "cond":  # one of them runs; `jax.lax.platform_dependent` is one, too
            total += max(_count(branch.jaxpr) for branch in equation.params["branches"])
        else:
            repeat = equation.params.get("length", 1) if name == "scan" else 1
            for value in equation.params.values():
                for each in value if isinstance(value, (list, tuple)) else [value]:
                    inner = getattr(each, "jaxpr", each)
                    if hasattr(inner, "eqns"):
                        total += repeat * _count(inner)
    return total
