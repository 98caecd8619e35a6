"""`--plan`: exact counts, an honest model of time, and the compiler's own numbers for memory.

What needs libtpu (`pip install libtpu`) is skipped without it.
"""

import dataclasses
import json
import pathlib
import types

import jax
import pytest

from beit_jax import jobs
from beit_jax.config import ConfigError
from beit_jax.planning import ahead_of_time, estimate, hlo, plan, report, slices, workloads
from beit_jax.tasks import pretrain
from beit_jax.tokenizers.loading import open_tokenizer
from beit_jax.training import sharding
from configs import beit_base, beit_large
from tests.tasks import tiny

needs_libtpu = pytest.mark.skipif(
    not ahead_of_time.have_compiler(), reason="libtpu, which holds the TPU compiler, isn't there"
)


def config_of(values, **settings):
    values.update_from_flattened_dict(settings)
    return jobs.parse_job(values.to_dict())


def tiny_config(**settings):
    return config_of(tiny.pretrain(), **settings)


@pytest.mark.parametrize(
    ("recipe", "parameters", "encoder", "student"),
    # Counted by hand from the paper's architecture: 2 FLOPs per multiply-add, 75 patches scored,
    # no gradient with respect to pixels.
    [
        (beit_base, 91_965_776, 35.13, 107.98),
        pytest.param(beit_large, 311_534_016, 123.11, 372.8, marks=pytest.mark.slow),
    ],
)
def test_parameters_and_flops_of_the_recipes(recipe, parameters, encoder, student):
    work = workloads.workload(config_of(recipe.get_config()))
    assert work.parameters["encoder"] + work.parameters["head"] == parameters
    assert work.flops["encoder"] / 1e9 == pytest.approx(encoder, abs=0.01)
    assert work.flops["student"] / 1e9 == pytest.approx(student, abs=0.05)
    assert work.flops["tokenizer"] / 1e9 == pytest.approx(52.12, abs=0.01)
    assert work.flops["step"] == work.flops["student"] + work.flops["tokenizer"]
    assert work.input_bytes == 224 * 224 * 3 + 112 * 112 * 3 + 14 * 14


def test_planned_flops_equal_those_of_the_runs_own_mfu():
    config = config_of(beit_base.get_config())
    tokenizer = open_tokenizer(config.tokenizer)
    logged = pretrain.flops_per_image(tokenizer, config=config, slots=75)
    assert workloads.workload(config).flops["step"] == logged


@pytest.mark.slow
def test_days_and_input_follow_from_the_speed():
    """BEiT-B's 500k steps at 45 % of peak on 32 v4 chips take 11.5 h without the tokenizer's..."""
    made = plan.make_plan(
        config_of(beit_base.get_config()), slices.parse_slice("v4-64"), program="none"
    )
    # ... work; with it, FLOPs / (chips × peak × share) seconds.
    low, high = made.images_per_second
    assert high == pytest.approx(0.55 * 32 * 275e12 / 160.1e9, rel=1e-3)
    assert made.days[0] == pytest.approx(500_000 * 2048 / high / 86400)
    assert made.days[1] == pytest.approx(500_000 * 2048 / low / 86400)
    assert made.host_images_per_second == pytest.approx(high / 8)
    assert made.host_bytes_per_second == pytest.approx(high / 8 * 188_356)
    assert made.time is None
    assert made.memory.needed is None
    assert "libtpu is not installed" in report.table(made)


def test_state_on_a_chip_follows_shapes_and_sharding_rules():
    """Float32 parameters and two moments; the fsdp axis splits the matrices."""
    config = config_of(beit_large.get_config())
    tpu_slice = slices.parse_slice("v4-128")
    whole = estimate.memory_of_state(config, tpu_slice)
    assert whole.parameters == 4 * 311_534_016
    assert whole.optimizer == pytest.approx(8 * 311_534_016, rel=1e-6)
    assert whole.tokenizer == 4 * 53_786_240
    assert whole.batch == 32 * 188_356
    split = estimate.memory_of_state(
        dataclasses.replace(config, run=dataclasses.replace(config.run, fsdp=8)), tpu_slice
    )
    assert whole.parameters / 8 < split.parameters < whole.parameters / 7


@pytest.mark.parametrize(
    ("settings", "name", "message"),
    [
        ({"run.batch_size": 12}, "v5litepod-8", "config.run.batch_size: 12 does not divide"),
        ({"run.batch_size": 24, "optimizer.accumulate": 2}, "v5litepod-8", "accumulate = 2"),
        ({"run.batch_size": 64, "run.fsdp": 3}, "v5litepod-8", "config.run.fsdp: 3"),
    ],
)
def test_settings_that_do_not_divide_are_refused_at_once(settings, name, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        plan.run(tiny_config(**settings), slices=slices.parse_slices(name), workdir=str(tmp_path))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            tiny.tokenizer(),
            "config.task = 'tokenizer' can't be planned, only 'pretrain', 'classify'",
        ),
        (tiny.story(), "config.task = 'quickstart'"),
        (tiny.classify(), "config.classes: 0 means as many as the images have"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(values, message, tmp_path):
    config = jobs.parse_job(values.to_dict())
    with pytest.raises(ConfigError, match=message) as refused:
        plan.run(config, slices=slices.parse_slices("v4-8"), workdir=str(tmp_path))
    assert "\n" not in str(refused.value)


def test_without_libtpu_there_is_the_analytic_part_and_a_note(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan, "have_compiler", lambda: False)
    made = plan.run(
        tiny_config(**{"run.batch_size": 64}),
        slices=slices.parse_slices("v4-8,v6e-8"),
        workdir=str(tmp_path),
    )
    printed = capsys.readouterr().out
    assert "libtpu is not installed" in printed
    assert "A model, not a measurement" in printed
    assert printed.count("FLOPs per image") == 2
    assert printed.count("\nv4-8 ") == 1  # the comparison's line
    written = json.loads((tmp_path / "plan.json").read_text())
    assert [line["slice"] for line in written] == ["v4-8", "v6e-8"]
    assert written[0]["workload"]["parameters"] == made[0].workload.parameters
    assert written[0]["time"] is None


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total"
            " memory required for HLO temporaries (80.00G) exceeds available HBM (30.75G). HLO",
            80,
        ),
        ("INTERNAL: something else", None),
    ],
)
def test_needed_memory_is_read_from_the_compilers_message(message, gib):
    found = ahead_of_time.memory_exceeded(message)
    assert found == (None if gib is None else gib * 2**30)


def collective(kind, size, *, runs=1, group=64, overlapped=False):
    return hlo.Collective(
        kind=kind,
        bytes=size,
        bytes_by_dtype={"f32": size},
        group=group,
        runs=runs,
        overlapped=overlapped,
        source="",
    )


def program(**fields):
    defaults = dict(
        cycles=105e6, matmul_cycles=50e6, collectives=(), uncosted=(), loops=(), partitions=64
    )
    return hlo.Program(**(defaults | fields))


def test_time_is_cycles_over_the_clock_and_bytes_over_the_links():
    tpu_slice = slices.parse_slice("v4-128")  # 1050 MHz, 6 links of 45 GB/s
    gradients = collective("all-reduce", 368e6)
    assert estimate.collective_seconds(gradients, tpu_slice) == pytest.approx(
        2 * 368e6 * 63 / 64 / (6 * 45e9)
    )
    time = estimate.step_time(
        program(collectives=(gradients,)), tpu_slice, flops_per_chip=2.75e12, hbm_bytes=12e9
    )
    assert time.cycles == pytest.approx(0.1)
    assert time.compute_at_peak == pytest.approx(0.01)
    assert time.hbm == pytest.approx(0.01)
    assert time.seconds == pytest.approx(0.1 + 2.68e-3, rel=1e-3)
    assert time.likely[0] < time.seconds < time.likely[1]


def test_overlapped_collectives_cost_only_what_exceeds_the_computation():
    tpu_slice = slices.parse_slice("v4-128")

    def seconds(size):
        gather = collective("all-gather", size, overlapped=True)
        made = estimate.step_time(
            program(collectives=(gather,)), tpu_slice, flops_per_chip=1, hbm_bytes=None
        )
        return made.seconds

    assert seconds(1e9) == pytest.approx(0.1)
    assert seconds(1e12) == pytest.approx(1e12 * 63 / 64 / 270e9)


def test_a_kernel_costs_what_it_declares_or_is_reported():
    tpu_slice = slices.parse_slice("v4-8")
    kernel = hlo.Uncosted(
        name="attention", kernel=True, runs=12, bytes=1.2e9, flops=0, declared=True
    )
    time = estimate.step_time(
        program(uncosted=(kernel,)), tpu_slice, flops_per_chip=1, hbm_bytes=None
    )
    assert time.cycles == pytest.approx(0.1 + 1e-3 / estimate.KERNEL_EFFICIENCY)
    silent = dataclasses.replace(kernel, declared=False)
    config = tiny_config(**{"run.batch_size": 64})
    compiled = ahead_of_time.Compiled(needed=1e9, program=program(uncosted=(silent,)))
    made = plan.assemble(config, tpu_slice, compiled=compiled, described="")
    assert any("without a cost" in line and "attention" in line for line in made.advice)


@pytest.mark.parametrize(
    ("needed", "words"),
    [
        (40 * 2**30, ["does not fit", "9.25 GiB too much", "accumulate = 2", "remat"]),
        (100 * 2**30, ["69.25 GiB too much", "accumulate = 4"]),
        (1 * 2**30, ["3% of the memory"]),
        (20 * 2**30, []),
    ],
)
def test_advice_follows_from_the_memory(needed, words):
    config = tiny_config(**{"run.batch_size": 64})
    tpu_slice = slices.parse_slice("v4-8")
    compiled = ahead_of_time.Compiled(needed=needed, program=program())
    made = plan.assemble(config, tpu_slice, compiled=compiled, described="")
    advice = "\n".join(made.advice)
    for word in words:
        assert word in advice
    assert made.memory.fits is (needed < 30.75 * 2**30)
    assert ("DOES NOT FIT" in report.table(made)) is (needed > 30.75 * 2**30)


def shallow(monkeypatch, compiled, *, layers=12):
    """`compile_shallow` with `compiled(layers)` in place of the compiler."""

    def compile_step(config, tpu_slice):
        assert config.model.blocks_per_step == config.model.layers
        return compiled(config.model.layers)

    monkeypatch.setattr(ahead_of_time, "compile_step", compile_step)
    config = tiny_config(**{"model.layers": layers})
    return ahead_of_time.compile_shallow(config, slices.parse_slice("v4-8"))


def test_shallow_programs_are_extrapolated_linearly(monkeypatch):
    def compiled(n):
        return ahead_of_time.Compiled(
            needed=10 + 4 * n,
            arguments=10 + n,
            temporary=2 * n,
            code=n,
            hbm_bytes=7 * n,
            program=program(
                cycles=100 + 30 * n,
                matmul_cycles=5 * n,
                collectives=(
                    *[collective("all-reduce", 4 * n)] * (n // 2),
                    collective("all-gather", 3, group=8),
                ),
            ),
        )

    made = shallow(monkeypatch, compiled)
    assert (made.needed, made.arguments, made.temporary, made.hbm_bytes) == (58, 22, 24, 84)
    assert made.program.cycles == 100 + 30 * 12
    total = {}
    for moved in made.program.collectives:
        total[moved.kind] = total.get(moved.kind, 0) + moved.bytes * moved.runs
    assert total == {"all-reduce": pytest.approx(8 + 5 * (32 - 8)), "all-gather": 3}


def test_extrapolated_sizes_never_shrink_with_depth(monkeypatch):
    """The compiler made less code of four layers than of two (BEiT-L on v4-8)."""
    made = shallow(
        monkeypatch,
        lambda n: ahead_of_time.Compiled(
            needed=100 + n + 70 / n, arguments=100, temporary=n, code=70 / n, program=program()
        ),
    )
    assert made.code == 70 / 4
    assert made.needed == 100 + 12 + 70 / 4


def test_collectives_that_are_combined_differently_keep_their_sum(monkeypatch):
    def compiled(n):
        apart = (collective("all-reduce", 30 * n, overlapped=True),) if n > 2 else ()
        rest = collective("all-reduce", 100 + 50 * n - 30 * n * len(apart))
        return ahead_of_time.Compiled(needed=1, program=program(collectives=(rest, *apart)))

    found = shallow(monkeypatch, compiled).program.collectives
    assert sum(moved.bytes * moved.runs for moved in found) == pytest.approx(100 + 50 * 12)
    assert [moved.overlapped for moved in found] == [False, True]


class Unreadable:
    """An executable whose text JAX cannot parse, as libtpu 0.0.52 makes for v5p and v6e."""

    def as_text(self):
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure async-update\nstack trace")

    def memory_analysis(self):
        return types.SimpleNamespace(
            argument_size_in_bytes=3 * 2**30,
            output_size_in_bytes=2 * 2**30,
            alias_size_in_bytes=2 * 2**30,
            temp_size_in_bytes=4 * 2**30,
            generated_code_size_in_bytes=2**30,
        )

    def cost_analysis(self):
        return {"bytes accessed": 5e9}


class Lowered:
    """Compiles to `Unreadable`; writes `dumped` when asked for a dump, or refuses that option."""

    def __init__(self, dumped, *, dumps=True):
        self.dumped, self.dumps = dumped, dumps

    def compile(self, compiler_options=None):
        if compiler_options and not self.dumps:
            raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: No such option: 'xla_dump_to'")
        for name, text in self.dumped.items():
            folder = pathlib.Path(compiler_options["xla_dump_to"])
            assert folder.is_dir()
            (folder / name).write_text(text)
            self.folder = folder
        return Unreadable()


def compiles_to(monkeypatch, lowered):
    monkeypatch.setattr(ahead_of_time, "devices", lambda tpu_slice: jax.devices()[:4])
    monkeypatch.setattr(ahead_of_time, "lower_step", lambda config, mesh: lowered)


def test_the_compilers_dump_is_read_where_jax_cannot_parse_the_program(monkeypatch):
    instruction = "  ROOT %a = f32[] constant(0)"
    text = f"HloModule step\n\nENTRY %main () -> f32[] {{\n{instruction}\n}}\n"
    costed = text.replace("constant(0)", 'add(), backend_config={"estimated_cycles":"105"}')
    lowered = Lowered({"1.before.txt": text, "1.after.txt": costed, "1.memory.txt": "table"})
    compiles_to(monkeypatch, lowered)
    made = ahead_of_time.compile_step(tiny_config(), slices.parse_slice("v5p-8"))
    assert made.program.cycles == 105
    assert made.missing == ""
    assert (made.needed, made.hbm_bytes) == (8 * 2**30, 5e9)
    assert not lowered.folder.exists()


@pytest.mark.parametrize("lowered", [Lowered({}), Lowered({}, dumps=False)])
@pytest.mark.parametrize("program", ["full", "shallow"])
def test_memory_is_known_even_without_the_programs_text(monkeypatch, lowered, program):
    compiles_to(monkeypatch, lowered)
    config = tiny_config(**{"run.batch_size": 64, "model.layers": 6})
    made = plan.make_plan(config, slices.parse_slice("v5p-8"), program=program)
    assert made.memory.needed == 8 * 2**30
    assert made.memory.fits
    assert made.time is None
    assert made.images_per_second[0] < made.images_per_second[1]
    printed = report.table(made)
    assert "4.00 GiB  activations" in printed
    assert "no cycles, no collectives: the compiled program's text can't be had" in printed
    assert "RET_CHECK failure async-update" in printed
    assert "stack trace" not in printed
    assert "v5p-8" in report.comparison([made])


@needs_libtpu
@pytest.mark.slow
def test_memory_and_collectives_equal_the_compilers():
    config = tiny_config(**{"run.batch_size": 64, "model.dtype": "bfloat16"})
    tpu_slice = slices.parse_slice("v4-16")
    made = plan.make_plan(config, tpu_slice, program="full")
    mesh = sharding.make_mesh(fsdp=1, devices=ahead_of_time.devices(tpu_slice))
    size = ahead_of_time.lower_step(config, mesh).compile().memory_analysis()
    assert made.memory.temporary == size.temp_size_in_bytes
    assert made.memory.needed == (
        size.argument_size_in_bytes
        + size.output_size_in_bytes
        - size.alias_size_in_bytes
        + size.temp_size_in_bytes
        + size.generated_code_size_in_bytes
    )
    parameters = sum(made.workload.parameters[name] for name in ("encoder", "head"))
    held = made.memory.parameters + made.memory.optimizer + made.memory.tokenizer
    assert held < made.memory.arguments  # and the batch, and padding to whole tiles
    # Data parallelism sums the gradients, in bfloat16 or float32, and a few scalars: no more.
    (reduced,) = made.collectives
    assert reduced.kind == "all-reduce"
    assert 2 * parameters < reduced.bytes < 4.1 * parameters


@needs_libtpu
@pytest.mark.slow
def test_fsdp_gathers_parameters_and_moves_no_activations():
    config = tiny_config(
        **{"run.batch_size": 64, "run.fsdp": 8, "model.dtype": "bfloat16", "model.scan_unroll": 2}
    )
    made = plan.make_plan(config, slices.parse_slice("v5litepod-8"), program="full")
    parameters = sum(made.workload.parameters[name] for name in ("encoder", "head"))
    moved = {traffic.kind: traffic.bytes for traffic in made.collectives}
    assert moved.keys() <= {"all-gather", "all-reduce", "reduce-scatter"}
    assert moved["all-gather"] <= 4 * parameters
    assert sum(moved.values()) - moved["all-gather"] <= 4.1 * parameters


@needs_libtpu
@pytest.mark.parametrize("name", ["v4-128", "v5litepod-16", "v5p-256", "v6e-8"])
@pytest.mark.parametrize("fsdp", [1, 2, 8])
def test_every_fsdp_that_divides_has_a_mesh_on_the_slice(name, fsdp):
    """Also where it is not a whole axis of the torus: 8 on 4 × 4 × 4."""
    tpu_slice = slices.parse_slice(name)
    devices = ahead_of_time.devices(tpu_slice)
    mesh = sharding.make_mesh(fsdp=fsdp, devices=devices)
    assert dict(mesh.shape) == {"data": tpu_slice.chips // fsdp, "fsdp": fsdp}
    assert len({device.process_index for device in devices}) == tpu_slice.hosts


@needs_libtpu
@pytest.mark.parametrize("fsdp", [1, 8])
def test_fsdp_groups_stay_inside_one_of_two_slices(fsdp):
    """Also where a group is not a whole axis of the slice's torus."""
    from jax.experimental import topologies

    ahead_of_time.devices(slices.parse_slice("v4-8"))  # for its settings of the environment
    described = topologies.get_topology_desc(
        "v4:4x4x4",
        "tpu",
        chip_config_name="megacore",
        chips_per_host_bounds=(2, 2, 1),
        num_slices=2,
    )
    mesh = sharding.make_mesh(fsdp=fsdp, devices=list(described.devices))
    assert dict(mesh.shape) == {"data": 128 // fsdp, "fsdp": fsdp}
    assert all(len({device.slice_index for device in row}) == 1 for row in mesh.devices)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("name", ["v4-8", "v5litepod-8", "v5p-8", "v6e-8"])
def test_every_chips_program_can_be_read(name):
    """On v5p and v6e gathers run on SparseCores, in a form that JAX cannot parse."""
    # Large enough that the compiler moves gathers to the SparseCores.
    settings = {"run.batch_size": 256, "model.dtype": "bfloat16", "model.width": 128}
    made = plan.make_plan(tiny_config(**settings), slices.parse_slice(name), program="full")
    assert made.missing == ""
    assert made.time.cycles > 0
    assert {traffic.kind for traffic in made.collectives} == {"all-reduce"}


@needs_libtpu
@pytest.mark.slow
def test_a_run_that_does_not_fit_is_told_by_how_much():
    # 32 × 2²⁵ weights twice, four bytes, three times with Adam's moments: 24 GiB.
    config = tiny_config(**{"run.batch_size": 1, "model.layers": 1, "model.mlp_width": 2**25})
    made = plan.make_plan(config, slices.parse_slice("v5litepod-1"), program="full")
    assert made.memory.fits is False
    assert made.memory.needed > made.memory.available
    assert "too much" in made.advice[0]
    assert made.bound.startswith("memory")


def test_auto_is_resolved_for_the_slice_and_not_for_this_machine():
    assert jax.default_backend() == "cpu"
    config = ahead_of_time.for_tpu(tiny_config())
    assert config.model.dtype == "bfloat16"
    assert config.tokenizer.dtype == "bfloat16"
    assert ahead_of_time.for_tpu(config_of(tiny.classify())).model.dtype == "bfloat16"
    settings = {"model.dtype": "float32", "tokenizer.dtype": "float32"}
    config = ahead_of_time.for_tpu(tiny_config(**settings))
    assert config.model.dtype == config.tokenizer.dtype == "float32"
