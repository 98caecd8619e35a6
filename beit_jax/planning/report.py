"""Plans as text: a table for a slice, and a table that compares slices."""

from collections.abc import Sequence

from beit_jax.planning.estimate import PUBLISHED_MFU, Plan, StepTime
from beit_jax.planning.slices import GIB
from beit_jax.planning.workloads import FROZEN, Workload
from beit_jax.text_table import text_table

_Rows = list[tuple[str, str, str]]  # name, value, explanation
_NOT_FORWARD = {FROZEN, "student", "step"}  # FLOPs that are not of a trained part, forward
_WIDTHS = (17, 13)  # of names and values, so that tables of several slices are aligned


def table(plan: Plan) -> str:
    """The plan of one slice: a line per number, with its meaning."""
    rows = [
        *_run_rows(plan),
        *_memory_rows(plan),
        *(_unknown_time_rows(plan) if plan.time is None else _time_rows(plan, plan.time)),
        *_outlook_rows(plan),
        *[("" if i else "advice", "", line) for i, line in enumerate(plan.advice)],
    ]
    note = "A model, not a measurement: see beit_jax/planning/plan.py for method and error."
    return f"{text_table(rows, align='lrl', gaps=('', '  '), widths=_WIDTHS)}\n{note}"


def _run_rows(plan: Plan) -> _Rows:
    """The slice, the run, and the numbers that need no compiler."""
    work = plan.workload
    mesh = " × ".join(f"{name} {size}" for name, size in plan.mesh.items())
    return [
        (
            "slice",
            plan.slice,
            f"{plan.chips} × {plan.device}, {'×'.join(map(str, plan.shape))},"
            f" {plan.hosts} host{'s' if plan.hosts > 1 else ''}, mesh {mesh}",
        ),
        (
            "batch",
            f"{work.batch_size}",
            f"{plan.images_per_chip} per chip"
            + (f" in {work.micro_batches} parts" if work.micro_batches > 1 else ""),
        ),
        ("program", "", plan.program),
        (
            "parameters",
            f"{sum(work.trained.values()) / 1e6:.2f} M",
            _parameters(work),
        ),
        (
            "FLOPs per image",
            f"{work.flops['step'] / 1e9:.2f} G",
            _flops(work),
        ),
    ]


def _parameters(work: Workload) -> str:
    trained = ", ".join(f"{part} {count:,}" for part, count in work.trained.items())
    if FROZEN not in work.parameters:
        return trained
    return f"{trained}; {FROZEN} {work.parameters[FROZEN]:,}, frozen"


def _flops(work: Workload) -> str:
    parts = {name: flops for name, flops in work.flops.items() if name not in _NOT_FORWARD}
    forward = ", ".join(f"{name} {flops / 1e9:.2f}" for name, flops in parts.items())
    trained = work.flops.get("student", work.flops["step"])
    backward = (trained - sum(parts.values())) / 1e9
    if FROZEN not in work.flops:
        return f"forward: {forward}; backward {backward:.2f}"
    return (
        f"student {trained / 1e9:.2f} (forward: {forward}; backward {backward:.2f}), {FROZEN}"
        f" {work.flops[FROZEN] / 1e9:.2f}"
    )


def _memory_rows(plan: Plan) -> _Rows:
    memory = plan.memory
    rows = [
        ("memory per chip", "", ""),
        ("  parameters", gib(memory.parameters), "float32"),
        (
            "  optimizer",
            gib(memory.optimizer),
            "Adam's moments and the rest of the train state, float32",
        ),
        *([("  tokenizer", gib(memory.tokenizer), "float32")] if memory.tokenizer else []),
        ("  batch", gib(memory.batch), f"uint8, {plan.workload.input_bytes / 1e3:.0f} kB an image"),
    ]
    if None not in (memory.arguments, memory.temporary, memory.code):
        held = memory.parameters + memory.optimizer + memory.tokenizer + memory.batch
        padding = (memory.arguments or 0.0) - held
        rows += [
            ("  padding", gib(padding), "of these, as the compiler lays them out"),
            (
                "  temporary",
                gib(memory.temporary or 0.0),
                "activations, gradients, the rest of a step",
            ),
            ("  program", gib(memory.code or 0.0), ""),
        ]
    if memory.needed is None:
        explained = f"without the compiler; of {gib(memory.available)}"
        return [*rows, ("  temporary", "unknown", explained)]
    verdict = "fits" if memory.needed <= memory.available else "DOES NOT FIT"
    share = memory.needed / memory.available
    explained = f"of {gib(memory.available)} ({share:.0%}): {verdict}"
    rows.append(("  all", gib(memory.needed), explained))
    if memory.evaluation is not None:
        fits = "fits" if memory.evaluation <= memory.available else "DOES NOT FIT"
        share = memory.evaluation / memory.available
        explained = f"all during an evaluation, of photographs of 4 : 3 ({share:.0%}): {fits}"
        rows.append(("  evaluation", gib(memory.evaluation), explained))
    return rows


def _unknown_time_rows(plan: Plan) -> _Rows:
    low, high = PUBLISHED_MFU
    return [
        ("step", "unknown", f"no cycles, no collectives: {plan.missing}"),
        (
            "images/s",
            "–".join(_whole(speed) for speed in plan.images_per_second),
            f"not estimated: {low:.0%} to {high:.0%} of peak, as published ViT runs",
        ),
    ]


def _time_rows(plan: Plan, time: StepTime) -> _Rows:
    low, high = time.likely
    if time.hbm is None:
        hbm = ("  HBM", "unknown", "the compiler counts a loop's body once")
    else:
        explained = "at most: all operands and results, on-chip ones too, at full bandwidth"
        hbm = ("  HBM", _ms(time.hbm), explained)
    speed = plan.images_per_second[0]
    return [
        (
            "step",
            _ms(time.seconds),
            f"estimate, likely {_ms(low)} to {_ms(high)}: the compiler's cycles + collectives"
            " not hidden",
        ),
        ("  compute at peak", _ms(time.compute_at_peak), "matrix products alone"),
        (
            "  cycles",
            _ms(time.cycles),
            f"compiler's estimate; {_ms(time.matmul_cycles)} in matrix products and what is"
            " fused to them",
        ),
        hbm,
        ("  collectives", _ms(time.collectives), _collectives(plan)),
        *_uncosted_rows(plan),
        ("bound", "", plan.bound),
        ("images/s", _whole(speed), f"{speed / plan.chips:.0f} per chip, MFU {plan.mfu:.1%}"),
    ]


def _uncosted_rows(plan: Plan) -> _Rows:
    """Kernels and sizable instructions that the compiler gives no cycles for."""
    sizable = [work for work in plan.uncosted if work.bytes > 1e6 or work.kernel]
    if not sizable:
        return []
    names = ", ".join(
        f"{work.name} {work.runs:.0f} ×" + (" (declared)" if work.declared else "")
        for work in sizable
    )
    size = f"{sum(work.bytes for work in sizable) / 1e6:.0f} MB"
    return [("  uncosted", size, f"no cycles from the compiler: {names}")]


def _outlook_rows(plan: Plan) -> _Rows:
    """How long the run takes, and the input it needs."""
    return [
        (
            "days",
            _range([f"{days:.2f}" for days in plan.days]),
            f"for {plan.workload.steps:,} steps, {_chip_hours(plan)} chip-hours",
        ),
        (
            "input per host",
            f"{_whole(plan.host_images_per_second)}/s",
            f"images; {plan.host_bytes_per_second / 1e6:.0f} MB/s to the chips,"
            f" {plan.host_images_per_vcpu:.1f} images/s of each vCPU",
        ),
    ]


def comparison(plans: Sequence[Plan]) -> str:
    """One line per slice."""
    head = ("slice", "chips", "hosts", "batch", "memory", "of", "step", "images/s", "MFU", "days")
    rows = [(*head, "chip-hours", "input/host", "bound")]
    for plan in plans:
        memory, time = plan.memory, plan.time
        rows.append(
            (
                plan.slice,
                f"{plan.chips}",
                f"{plan.hosts}",
                f"{plan.images_per_chip}/chip",
                "?" if memory.needed is None else gib(memory.needed),
                gib(memory.available),
                "?" if time is None else _ms(time.seconds),
                _range([_whole(speed) for speed in plan.images_per_second]),
                "?" if plan.mfu is None else f"{plan.mfu:.1%}",
                _range([f"{days:.1f}" for days in plan.days]),
                _chip_hours(plan),
                f"{_whole(plan.host_images_per_second)}/s",
                plan.bound,
            )
        )
    return text_table(rows, align="l" + "r" * (len(rows[0]) - 2) + "l")


def gib(size: float) -> str:
    """Bytes as "1.50 GiB"; small sizes as "1.50 MiB"."""
    return f"{size / GIB:.2f} GiB" if size > 0.01 * GIB else f"{size / 2**20:.2f} MiB"


def _collectives(plan: Plan) -> str:
    if not plan.collectives:
        return "none"
    return "; ".join(
        f"{traffic.kind} {traffic.count:.0f} ×, {traffic.bytes / 1e6:.1f} MB ("
        + ", ".join(f"{dtype} {size / 1e6:.1f}" for dtype, size in traffic.bytes_by_dtype.items())
        + ")"
        for traffic in plan.collectives
    )


def _chip_hours(plan: Plan) -> str:
    return f"{plan.chips * plan.days[1] * 24:,.0f}"


def _range(ends: Sequence[str]) -> str:
    """ "1–2"; a single number where both ends look the same."""
    return "–".join(dict.fromkeys(ends))


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"


def _whole(number: float) -> str:
    return f"{number:,.0f}"
