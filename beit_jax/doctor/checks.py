"""The table of checks, in the order in which they are made, and what runs them."""

import dataclasses
import textwrap
from collections.abc import Callable, Iterator

from beit_jax.config import ConfigError, RunError
from beit_jax.doctor import images, machine, step, tokens, versions, workdir
from beit_jax.doctor.context import Context
from beit_jax.doctor.finding import BlockedError, Finding, skipped, wrong
from beit_jax.doctor.parts import JOBS
from beit_jax.types import Json

_LONGEST = 600  # characters of an error


def _always(config: Json) -> bool:
    return True


def _has_normalization(config: Json) -> bool:
    return config.task != "tokenizer"  # which reads the other view


def _pretrains(config: Json) -> bool:
    return config.task == "pretrain"


def _steps(config: Json) -> bool:
    return config.task in JOBS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """A row.

    Attributes:
      run: looks, and says what it finds.
      fix: of an error that it raises.
      applies: whether a job's config has what is checked.
      of_machine: it says the same for every job on this machine.
    """

    run: Callable[[Context], list[Finding]]
    fix: str
    applies: Callable[[Json], bool] = _always
    of_machine: bool = False


CHECKS: dict[str, Check] = {
    "versions": Check(
        run=versions.check_versions,
        fix="make the environment anew from requirements.txt",
        of_machine=True,
    ),
    "devices": Check(
        run=machine.check_devices,
        fix="run on a machine with such devices, or change --platform or config.model.attention",
    ),
    "batch": Check(
        run=machine.check_batch,
        fix="set config.run.batch_size to a multiple of devices times config.optimizer.accumulate",
    ),
    "workdir": Check(run=workdir.check_workdir, fix="choose another --workdir"),
    "weights": Check(
        run=workdir.check_weights,
        fix="set what differs as the weights have it, or change config.run.init_from",
    ),
    "tokenizer": Check(
        run=tokens.check_tokenizer,
        fix="set config.tokenizer.path to a whole file of this kind",
        applies=_pretrains,
    ),
    "images": Check(
        run=images.check_images, fix="set config.data.source and config.data.holdout to images"
    ),
    "pixels": Check(run=images.check_pixels, fix="look at the files"),
    "normalization": Check(
        run=images.check_normalization, fix="look at the files", applies=_has_normalization
    ),
    "masks": Check(run=images.check_masks, fix="change config.data.mask", applies=_pretrains),
    "tokens": Check(run=tokens.check_tokens, fix="take another tokenizer", applies=_pretrains),
    "run": Check(run=workdir.check_run, fix="choose another --workdir"),
    "memory": Check(
        run=machine.check_memory, fix="set config.run.fsdp to a divisor", applies=_steps
    ),
    "room": Check(run=workdir.check_room, fix="choose another --workdir", applies=_steps),
    "step": Check(run=step.check_step, fix="the message names what to change", applies=_steps),
    "input": Check(run=step.check_input, fix="look at the files that it names", applies=_steps),
}


def run_checks(context: Context, *, machine_too: bool = True) -> Iterator[tuple[str, Finding]]:
    """Makes the checks one after the other; names and findings, as they come.

    Args:
      context: of a job.
      machine_too: whether to make those that say the same for every job.
    """
    for name, check in CHECKS.items():
        if not check.applies(context.config) or (check.of_machine and not machine_too):
            continue
        for finding in findings_of(name, context):
            yield name, finding


def findings_of(name: str, context: Context) -> list[Finding]:
    """What a check says; an error that it raises is a finding, too.

    Args:
      name: a key of `CHECKS`.
      context: of a job.
    """
    check = CHECKS[name]
    try:
        return check.run(context)
    except BlockedError as error:
        return [skipped(f"needs {error}")]
    except Exception as error:
        known = isinstance(error, ConfigError | RunError | OSError | ValueError)
        lines = [line for line in str(error).splitlines() if line.strip()] or ["without a text"]
        first = textwrap.shorten(lines[0], _LONGEST, placeholder=" …")
        text = first if known else f"{type(error).__name__}: {first}"
        return [wrong(text.removesuffix(f"; {check.fix}"), check.fix)]
