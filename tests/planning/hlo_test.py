"""Small programs, as the TPU compiler writes them, with the sums done by hand."""

import pytest

from beit_jax.planning import hlo

# A loop of 12 with 100 + 20 cycles, 7 cycles around it, and one collective in each position.
LOOP = """\
HloModule jit_step, is_scheduled=true, num_partitions=8

%fused (a: bf16[8,16], b: bf16[16,4]) -> bf16[8,4] {
  %a = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[16,4]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %dot.1 = bf16[8,4]{1,0:T(8,128)(2,1)} dot(%a, %b), lhs_contracting_dims={1}
}

%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[4,8]{1,0:T(8,128)S(1)} get-tuple-element(%p), index=1
  %product = bf16[8,4]{1,0} fusion(%x, %x), kind=kOutput, calls=%fused, \
backend_config={"estimated_cycles":"100"}
  %add.1 = f32[4,8]{1,0} add(%x, %x), backend_config={"estimated_cycles":"20"}
  %gathered = f32[4,32]{1,0} all-gather(%x), channel_id=1, \
replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, dimensions={1}, \
metadata={op_name="jit(step)/while/body/gather"}
  ROOT %out = (s32[]{:T(128)}, f32[4,8]{1,0}) tuple(%i, /*index=1*/%add.1)
}

%condition (q: (s32[], f32[4,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
  %q = (s32[]{:T(128)}, f32[4,8]{1,0}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %lt = pred[]{:T(512)} compare(%j, %limit), direction=LT
}

ENTRY %main.1_spmd (arg: f32[4,8]) -> f32[] {
  %arg = f32[4,8]{1,0:T(8,128)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %init = (s32[]{:T(128)}, f32[4,8]{1,0}) tuple(%zero, %arg)
  %loop = (s32[]{:T(128)}, f32[4,8]{1,0}) while(%init), condition=%condition, body=%body
  %last = f32[4,8]{1,0} get-tuple-element(%loop), index=1
  %half = bf16[4,8]{1,0} convert(%last), backend_config={"estimated_cycles":"7"}
  %sum = (bf16[4,8]{1,0}, f32[4,8]{1,0}) all-reduce(%half, %last), channel_id=2, \
replica_groups=[1,8]<=[8], to_apply=%fused, metadata={op_name="jit(step)/sum"}
  %order = s32[4,8]{1,0} sort(%last), dimensions={1}, to_apply=%fused
  %part = f32[1,8]{1,0} slice(%last), slice={[0:1], [0:8]}
  %view = f32[8,8]{1,0} custom-call(%last, %last), custom_call_target="ConcatBitcast"
  %attention.3 = f32[4,8]{1,0} custom-call(%last), custom_call_target="tpu_custom_call"
  ROOT %result = f32[] constant(0)
}
"""


def test_a_loops_body_counts_once_per_iteration():
    program = hlo.read(LOOP)
    assert program.loops == (12,)
    assert program.cycles == 12 * (100 + 20) + 7
    assert program.matmul_cycles == 12 * 100
    assert program.partitions == 8


def test_collectives_have_bytes_groups_and_runs():
    gather, reduce = hlo.read(LOOP).collectives
    assert (gather.kind, gather.group, gather.runs) == ("all-gather", 4, 12)
    assert gather.bytes == 4 * (4 * 8 * 4)  # what every device holds afterwards
    assert gather.source == "jit(step)/while/body/gather"
    assert (reduce.kind, reduce.group, reduce.runs) == ("all-reduce", 8, 1)
    assert reduce.bytes_by_dtype == {"bf16": 64, "f32": 128}
    assert not gather.overlapped


def test_work_without_cycles_is_listed_and_operations_without_work_are_not():
    uncosted = {work.name: work for work in hlo.read(LOOP).uncosted}
    assert uncosted.keys() == {"order", "attention", "part"}
    assert uncosted["part"].bytes == 2 * 8 * 4
    assert uncosted["attention"].kernel
    assert not uncosted["attention"].declared
    assert not uncosted["order"].kernel
    assert uncosted["order"].bytes == 2 * 4 * 8 * 4


def test_a_kernels_declared_cost_is_read():
    text = LOOP.replace(
        'custom_call_target="tpu_custom_call"',
        'custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"x",'
        '"cost_estimate":{"flops":"1000","transcendentals":"5","bytes_accessed":"64"}}}',
    )
    kernel = {work.name: work for work in hlo.read(text).uncosted}["attention"]
    assert (kernel.declared, kernel.flops, kernel.bytes) == (True, 1000, 64)


def test_a_loop_with_an_unknown_trip_count_counts_once_and_is_marked():
    program = hlo.read(LOOP.replace("direction=LT", "direction=NE"))
    assert program.loops == (None,)
    assert program.cycles == 100 + 20 + 7


ASYNC = """\
HloModule jit_step, num_partitions=4

%part.1 (s: bf16[2,8]) -> bf16[8,8] {
  %s = bf16[2,8]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[8,8]{1,0} all-gather(%s), channel_id=9, replica_groups={{0,1,2,3}}
}

%part.2 (s2: bf16[2,8]) -> bf16[8,8] {
  %s2 = bf16[2,8]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[8,8]{1,0} all-gather(%s2), channel_id=9, replica_groups={{0,1,2,3}}
}

%wrapped (w: f32[16]) -> f32[4] {
  %w = f32[16]{0} parameter(0)
  ROOT %rs = f32[4]{0} reduce-scatter(%w), channel_id=5, replica_groups={{0,1},{2,3}}
}

ENTRY %main (x: bf16[2,8], y: f32[16]) -> bf16[8,8] {
  %x = bf16[2,8]{1,0} parameter(0)
  %y = f32[16]{0} parameter(1)
  %fusion.1 = bf16[8,8]{1,0} fusion(%x), kind=kCustom, calls=%part.1
  %fusion.2 = bf16[8,8]{1,0} fusion(%x), kind=kCustom, calls=%part.2
  %start = (f32[16]{0}, f32[16]{0}) all-reduce-start(%y), channel_id=6, replica_groups={}
  %done = f32[16]{0} all-reduce-done(%start)
  %scatter = ((f32[16]), f32[4]) async-start(%y), calls=%wrapped
  %scattered = f32[4]{0} async-done(%scatter), calls=%wrapped
  %move = (bf16[2,8], bf16[2,8]) collective-permute-start(%x), source_target_pairs={{0,1}}
  ROOT %moved = bf16[2,8] collective-permute-done(%move)
}
"""


def test_asynchronous_and_fused_collectives_count_once():
    found = {
        found.kind: (found.bytes, found.group, found.overlapped)
        for found in hlo.read(ASYNC).collectives
    }
    assert len(hlo.read(ASYNC).collectives) == 4
    assert found["all-gather"] == (4 * 2 * 8 * 2, 4, True)
    assert found["all-reduce"] == (64, 4, True)
    assert found["reduce-scatter"] == (64, 2, True)
    assert found["collective-permute"][0] == 32


# As libtpu 0.0.52 writes a gather on a v5p's SparseCores: started without its operands, which an
# async-update hands over; beside it a collective, which would be there as well.
SPARSE = """\
HloModule jit_step, num_partitions=4

%async_computation (table: bf16[8,16], rows: s32[4]) -> bf16[4,16] {
  %table = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  %rows = s32[4]{0:T(1024)} parameter(1)
  ROOT %custom-call.1 = bf16[4,16]{1,0} custom-call(%table, %rows), \
custom_call_target="TODO(b/1)", called_computations={%called_computation}
}, execution_thread="sparsecore"

%reduction (w: f32[16]) -> f32[16] {
  %w = f32[16]{0} parameter(0)
  ROOT %reduced = f32[16]{0} all-reduce(%w), channel_id=5, replica_groups={{0,1},{2,3}}
}, execution_thread="sparsecore"

%async_reduction (v: f32[16]) -> f32[16] {
  %v = f32[16]{0} parameter(0)
  ROOT %call.1 = f32[16]{0} call(%v), to_apply=%reduction
}, execution_thread="sparsecore"

ENTRY %main (x: bf16[8,16], y: s32[4], z: f32[16]) -> bf16[4,16] {
  %x = bf16[8,16]{1,0} parameter(0)
  %y = s32[4]{0} parameter(1)
  %z = f32[16]{0} parameter(2)
  %start = ((), (), (s32[32768]{0:T(1024)}, s32[25]{0:T(1)S(11)})) async-start(), \
async_execution_thread="sparsecore", calls=%async_computation, \
metadata={op_name="jit(step)/jvp(jit(take_along_axis))/gather" stack_frame_id=12}
  %work = bf16[8,16]{1,0} add(%x, %x), backend_config={"estimated_cycles":"9"}
  %update = ((bf16[8,16]{1,0}, s32[4]{0}), bf16[4,16]{1,0}, (s32[32768]{0:T(1024)}, \
/*index=1*/s32[25]{0:T(1)S(11)})) async-update(%start, %x, %y), \
output_to_operand_aliasing={{2,0}: (0, {2,0}), {2,1}: (0, {2,1})}
  %sums = ((f32[16]{0}), f32[16]{0}, u32[]{:S(8)}) async-start(%z), \
async_execution_thread="sparsecore", calls=%async_reduction
  %summed = f32[16]{0} async-done(%sums)
  ROOT %done = bf16[4,16]{1,0} async-done(%update)
}
"""


def test_asynchronous_work_is_counted_once_under_its_own_name():
    program = hlo.read(SPARSE)
    (gather,) = program.uncosted
    assert (gather.name, gather.runs, gather.kernel) == ("gather on sparsecore", 1, False)
    assert gather.bytes == 2 * 8 * 16 + 4 * 4 + 2 * 4 * 16
    (reduced,) = program.collectives
    assert (reduced.kind, reduced.bytes, reduced.group) == ("all-reduce", 64, 2)
    assert reduced.overlapped
    assert program.cycles == 9


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[2,3]{1,0:T(8,128)}", {"f32": 24}),
        ("(bf16[4]{0}, /*index=1*/s32[], pred[3]{0:T(512)})", {"bf16": 8, "s32": 4, "pred": 3}),
        ("token[]", {}),
    ],
)
def test_bytes_of_a_shape(shape, size):
    assert hlo.shape_bytes(shape) == size


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.read("something else")
