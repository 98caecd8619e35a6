"""The scaling bench: its arithmetic on times, programs and a compiler's answers."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest

from beit_jax.planning import hlo, workloads
from beit_jax.planning.ahead_of_time import Compiled

FOLDER = Path(__file__).parent.parent.parent / "bench"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("scaling_bench", FOLDER / "scaling.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    sys.path.insert(0, str(FOLDER))
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(FOLDER))
    del sys.modules[spec.name]


def test_growth_is_against_the_smallest_of_its_kind(bench):
    rows = bench.growth(
        [
            {"vary": "batch", "seconds": 1.0, "gflops": 2.0},
            {"vary": "batch", "seconds": 1.5, "gflops": 4.0},
            {"vary": "image", "seconds": 3.0, "gflops": 1.0},
        ]
    )
    assert [row["times"] for row in rows] == [1, 1.5, 1]
    assert [row["ratio"] for row in rows] == [1, 0.75, 1]
    rows = bench.against_first([{"what": "a", "ms_per_image": value} for value in (2.0, 3.0)])
    assert [row["times"] for row in rows] == [1, 1.5]


def test_processes_are_added_up_step_by_step(bench):
    answer = {
        "collectives": {"all-reduce": {"calls": 2.0, "bytes": 30.0}},
        "gradient_bytes": 20,
    }
    answers = [answer | {"seconds": [1.0, 2.0, 9.0]}, answer | {"seconds": [1.0, 1.0, 0.0]}]
    row = bench._per_image(answers, 4)
    assert row["ms_per_image"] == 750  # 3 s, the median of 2, 3 and 9
    assert row["bytes_per_gradient_byte"] == 1.5


def test_collectives_of_a_program(bench):
    text = """HloModule m, num_partitions=4

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

ENTRY %main (a: f32[10], b: f32[4]) -> f32[10] {
  %a = f32[10]{0} parameter(0)
  %b = f32[4]{0} parameter(1)
  %c = f32[4]{0} all-reduce(%b), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %d = f32[10]{0} all-reduce(%a), replica_groups={{0,1,2,3}}, to_apply=%add
}
"""
    assert bench.collectives(text) == {"all-reduce": {"calls": 2.0, "bytes": 56.0}}


def test_weak_scaling_compares_slices(bench):
    """A compiler that says 2 % more cycles on the larger slice; gradients summed in the open."""

    def compile_program(config, tpu_slice):
        work = workloads.workload(config)
        gradients = 4.0 * (work.parameters["encoder"] + work.parameters["head"])
        reduce = hlo.Collective(
            kind="all-reduce",
            bytes=gradients,
            bytes_by_dtype={"f32": gradients},
            group=tpu_slice.chips,
            runs=1.0,
            overlapped=False,
            source="",
        )
        cycles = 1e8 * (1 if tpu_slice.chips == 4 else 1.02)
        program = hlo.Program(
            cycles=cycles,
            matmul_cycles=cycles,
            collectives=(reduce,),
            uncosted=(),
            loops=(),
            partitions=tpu_slice.chips,
        )
        assert config.model.dtype == "bfloat16"
        assert config.run.batch_size == 128 * tpu_slice.chips
        return Compiled(
            needed=3.0, program=program, arguments=1.0, temporary=2.0, code=0.0, flops=5.0
        )

    tables = bench.weak_scaling(
        models=["base"], slices=["v4-8", "v4-128"], compile_program=compile_program
    )
    (rows,) = tables.values()
    assert [row["shape"] for row in rows] == ["2x2x1", "4x4x4"]
    assert [row["cycles_times"] for row in rows] == [1, pytest.approx(1.02)]
    assert [row["temporary_times"] for row in rows] == [1, 1]
    for row in rows:
        assert row["bytes_per_gradient_byte"] == pytest.approx(1)
        shown = row["ms_collectives"]
        assert row["exposed"] == pytest.approx(shown / row["ms_step"])
        assert row["ms_step"] == pytest.approx(1e3 * row["cycles"] / 1050e6 + shown)
    assert "all-reduce 1x 3" in bench.table(rows)  # 368 MB

    def does_not_fit(config, tpu_slice):
        full = compile_program(config, tpu_slice)
        return dataclasses.replace(full, program=None, missing="it does not fit")

    with pytest.raises(RuntimeError, match="v4-8: it does not fit"):
        bench.weak_scaling(models=["base"], slices=["v4-8"], compile_program=does_not_fit)
