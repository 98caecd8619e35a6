"""Names the bottleneck of a planned run, and advises where it does not fit or wastes chips."""

from beit_jax.planning.estimate import Plan
from beit_jax.planning.report import gib
from beit_jax.planning.workloads import PlannedConfig, task_of_shapes
from beit_jax.training import sharding


def bound(plan: Plan) -> str:
    """The bottleneck of the step, in words."""
    if plan.memory.fits is False:
        return "memory: it does not fit"
    if plan.time is None:
        return f"unknown: {plan.missing}"
    if plan.host_images_per_vcpu > plan.workload.images_per_vcpu:
        return "the hosts' input"
    t = plan.time
    if t.collectives > 0.3 * t.seconds:
        return "collectives"
    if t.compute_at_peak > 0.6 * t.seconds:
        return "matrix units"
    if t.matmul_cycles > 0.75 * t.seconds:
        return "matrix products below peak: padding, memory, and the work fused to them"
    return "memory traffic and vector work around the matrix products"


def advice(plan: Plan, config: PlannedConfig) -> list[str]:
    """Changes to make, one sentence per change; empty where the run fits and wastes no chips."""
    lines = _memory_advice(plan, config)
    if (plan.memory.evaluation or 0.0) > plan.memory.available:
        lines.append(
            "the evaluation does not fit: fewer config.inference.scales in this run, and all in"
            " one with config.evaluate_only and a smaller config.run.batch_size"
        )
    held = plan.memory.parameters + plan.memory.optimizer
    if config.run.fsdp > 1 and held * config.run.fsdp < 0.25 * plan.memory.available:
        lines.append(
            f"config.run.fsdp = 1 would fit too, the state is {gib(held * config.run.fsdp)} whole:"
            " plan both; gathers cost time, a sharded optimizer saves some"
        )
    possible = plan.workload.images_per_vcpu
    if plan.host_images_per_vcpu > possible:
        lines.append(
            f"input-bound: {plan.host_images_per_vcpu:.0f} images/s of each vCPU; about"
            f" {possible:g} is what one decodes and crops: expect"
            f" {possible / plan.host_images_per_vcpu:.0%} of this speed"
        )
    if plan.time is not None:
        if plan.time.collectives > 0.2 * plan.time.seconds:
            lines.append(
                f"{plan.time.collectives / plan.time.seconds:.0%} of the step is collectives: more"
                " images per chip, or fewer chips"
            )
        undeclared = [work.name for work in plan.uncosted if work.kernel and not work.declared]
        if undeclared:
            lines.append(
                f"kernels without a cost, so that the time is too short: {', '.join(undeclared)}"
            )
    return lines


def _memory_advice(plan: Plan, config: PlannedConfig) -> list[str]:
    memory = plan.memory
    fixed = memory.parameters + memory.optimizer + memory.tokenizer + memory.batch
    if memory.needed is None:
        return [_shard_state(plan)] if fixed > 0.9 * memory.available else []
    if memory.needed > memory.available:
        return _too_big(plan, config, needed=memory.needed, fixed=fixed)
    if memory.needed < 0.3 * memory.available:
        return [
            f"{memory.needed / memory.available:.0%} of the memory is used: a smaller slice would"
            " do, or a larger batch"
        ]
    return []


def _too_big(plan: Plan, config: PlannedConfig, *, needed: float, fixed: float) -> list[str]:
    """Lists changes that make a run fit: smaller micro-batches, recomputation, sharding.

    Args:
      plan: needs too much memory.
      config: the run.
      needed: bytes on one chip.
      fixed: the part of it that does not depend on the images at work at once.
    """
    memory, model, micro = plan.memory, config.model, config.optimizer.accumulate
    lines = [
        f"does not fit: {gib(needed)} needed, {gib(memory.available)} there,"
        f" {gib(needed - memory.available)} too much"
    ]
    # Activations grow with the images at work at once; gradients take as much as the parameters.
    working = needed - fixed - memory.parameters
    room = memory.available - fixed - memory.parameters
    images = plan.images_per_chip
    times = next(
        (
            k
            for k in (2, 4, 8, 16, 32, 64, 128)
            if images % (micro * k) == 0 and working / k <= 0.95 * room
        ),
        None,
    )
    if room > 0 and times:
        # Only BatchNorm, whose statistics are variables, sees that the batch is in parts.
        variables = task_of_shapes(config).init_variables is not None
        same = "but BatchNorm sees only so many" if variables else "and updates"
        lines.append(
            f"config.optimizer.accumulate = {micro * times}: {images // micro // times} images"
            f" per chip at a time, the same batch {same}"
        )
        lines.append(
            f"or {times} times the chips; or config.run.batch_size ="
            f" {plan.workload.batch_size // times} (another recipe)"
        )
    if model.remat == "none":
        lines.append("config.model.remat = 'dots' or 'full': less memory, 10 to 33 % slower")
    if model.blocks_per_step < model.layers:
        lines.append("config.model.scan_unroll = 0: a rolled scan takes up to 1.8 times the memory")
    if memory.parameters + memory.optimizer > 0.25 * memory.available:
        lines.append(_shard_state(plan))
    return lines


def _shard_state(plan: Plan) -> str:
    held = plan.memory.parameters + plan.memory.optimizer
    return (
        f"parameters and optimizer take {gib(held)} per chip: config.run.fsdp ="
        f" {min(plan.chips, 8 * plan.mesh[sharding.FSDP])} splits them"
    )
