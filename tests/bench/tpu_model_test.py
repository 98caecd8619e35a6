"""bench/tpu_model.py: the time that a kernel counts with."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from beit_jax.models.kernels import fused_attention
from beit_jax.planning import hlo
from beit_jax.planning.ahead_of_time import have_compiler

BENCH = Path(__file__).parent.parent.parent / "bench"

TEXT = """HloModule jit_f, num_partitions=1

ENTRY %main (x: bf16[4,8]) -> bf16[4,8] {
  %x = bf16[4,8]{1,0} parameter(0)
  %y = bf16[4,8]{1,0} add(%x, %x), backend_config={"estimated_cycles":"1050000"}
  ROOT %NAME = bf16[4,8]{1,0} custom-call(%y), custom_call_target="tpu_custom_call"COST
}
"""
COST = ', backend_config={"cost_estimate":{"flops":"8","bytes_accessed":"64"}}'


@pytest.fixture
def tpu_model(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import tpu_model

    yield tpu_model
    sys.modules.pop("tpu_model")


def test_kernels_count_with_the_larger_of_bound_and_schedule(tpu_model, monkeypatch):
    sizes = {"batch": 64, "tokens": 197, "heads": 12}
    for scheduled in (0.0, 1.0):
        tpu_model.kernel_seconds.cache_clear()
        names = ("attention_forward", "attention_backward")
        schedule = dict.fromkeys(names, scheduled)
        monkeypatch.setattr(tpu_model, "schedule", lambda *_, s=schedule, **__: s)
        text = TEXT.replace("%NAME", "%jvp_attention_forward.1").replace("COST", COST)
        seconds = tpu_model.program_seconds("v4", hlo.read(text), **sizes)
        assert seconds["compiler"] == pytest.approx(1e-3)  # 1,050,000 cycles at 1050 MHz
        cut = fused_attention.choose_layout(**sizes)
        flops = fused_attention.cost(cut, dtype=jnp.bfloat16, backward=False).flops
        assert seconds["kernels"] == pytest.approx(scheduled or flops / 275e12 / 0.6)
    tpu_model.kernel_seconds.cache_clear()


@pytest.mark.parametrize(("name", "cost"), [("%attention_forward.1", ""), ("%other.1", COST)])
def test_a_kernel_without_a_cost_ends_the_bench(tpu_model, name, cost):
    text = TEXT.replace("%NAME", name).replace("COST", cost)
    with pytest.raises(SystemExit, match="has no cost"):
        tpu_model.program_seconds("v4", hlo.read(text), batch=64, tokens=197, heads=12)


def test_the_other_block_computes_a_block(tpu_model):
    config = tpu_model.recipe("base").model
    function, shapes = tpu_model.deit3_blocks(config, layers=1, batch=2)
    result, (d_params, d_x) = jax.eval_shape(function, *shapes)
    assert result.shape == d_x.shape == (2, 197, 768)
    assert d_params["up"].shape == (1, 768, 3072)


@pytest.mark.slow
@pytest.mark.skipif(not have_compiler(), reason="libtpu is not installed")
@pytest.mark.parametrize("tokens", [197, 577, 1025])
@pytest.mark.parametrize("chip", ["v4", "v5e", "v5p", "v6e"])
def test_the_kernel_compiles_for_every_chip(tpu_model, chip, tokens):
    x = jax.ShapeDtypeStruct((4, tokens, 128), jnp.bfloat16)
    bias = jax.ShapeDtypeStruct((2, tokens, tokens), jnp.float32)
    function = tpu_model._with_gradients(fused_attention.fused_attention)
    _, text = tpu_model.compile_on(chip, function, x, x, x, x, bias)
    assert text.count('custom_call_target="tpu_custom_call"') == 2
