"""Checkpoints, saved in the background and restored in a fixed order of precedence.

A run's directory holds `checkpoints/<step>/{state, config, digests}` and `config.json`; where a job
names a metric for it, `best/checkpoints/<step>/` with the parameters that did best on held-out
images. A run starts from the first of these that exists:

1. the newest readable checkpoint of its own directory (the same command resumes);
2. `config.run.init_from`, parameters of another run or format (`restore_params`), with a fresh
   optimizer at step 0; `start.source_facts` has compared what its names and shapes do not show;
3. fresh parameters from `config.run.seed`.

A checkpoint that cannot be read (truncated by an interrupted copy, say) or has another bit than was
saved (`weights.digests`) is set aside under `unreadable_checkpoints/` with a loud warning, and the
one before it is taken. So are best parameters, and the next evaluation's are then the best. Another
model is no damage: it is refused by the setting that differs (`training/same_run.py`). Best
parameters of a step that the run has not done are its own only where the settings are the same.
"""

import errno
import secrets
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from beit_jax import storage
from beit_jax.config import ConfigError, RunConfig, to_dict
from beit_jax.distributed import cluster
from beit_jax.files import write_json
from beit_jax.training import same_run, start_record
from beit_jax.training.optim import path_name
from beit_jax.training.run_directory import BEST, COUNTS, IDENTITY, check_kind
from beit_jax.training.same_run import Settings as Settings
from beit_jax.training.state import TrainState
from beit_jax.types import Json, JsonObject, Params, PyTree, Variables
from beit_jax.weights import digests, native

# Part of this module's interface: rule 2 above, and how tools read a checkpoint.
from beit_jax.weights.convert import restore_params as restore_params
from beit_jax.weights.convert import restore_variables as restore_variables
from beit_jax.weights.native import saved_config as saved_config
from beit_jax.weights.native import saved_params_shapes as saved_params_shapes

_FIELDS = ("step", "params", "variables", "ema", "opt_state", "skipped", "skipped_in_row")
# Written only where a run has them: checkpoints from before they existed stay readable.
_OPTIONAL = ("variables", "ema")
_REREAD = 5  # times, where a run deletes checkpoints while they are being read


class UnreadableError(ConfigError):
    """No checkpoint of a run can be read, or the newest one can't. The message is one line."""


class Checkpoints:
    """The checkpoints of one run's directory.

    Args:
      workdir: the run's directory, local or gs://.
      run: how often to save and how many to keep.
      config: the job's config, saved beside every checkpoint and as `config.json`. Of a dataclass,
        the settings declared with `config.parse.shape_setting` must be those of the checkpoints; a
        plain dict declares none.
      identity: what the run depends on besides (`Job.identity`); saved with every checkpoint.
      counts: how many images there are (`Feed.counts`); likewise.
      read_only: changes nothing in the directory, where a run may be writing at the same time.
    """

    def __init__(
        self,
        workdir: str,
        *,
        run: RunConfig,
        config: Settings,
        identity: Mapping[str, str] | None = None,
        counts: Mapping[str, int] | None = None,
        read_only: bool = False,
    ):
        self._root = epath.Path(workdir).absolute() if "://" not in workdir else epath.Path(workdir)
        self._run = run
        self._settings = config
        self._config: JsonObject = config if isinstance(config, dict) else to_dict(config)
        self._identity, self._counts = dict(identity or {}), dict(counts or {})
        self.read_only = read_only
        self._last_save = time.monotonic()
        self._manager = self._open(self._root / "checkpoints", keep=run.keep_checkpoints)
        self._best: ocp.CheckpointManager | None = None
        self._best_read = False

    def _open(self, path: epath.Path, *, keep: int) -> ocp.CheckpointManager:
        if "://" not in str(path) and path.is_dir():
            for entry in path.iterdir():  # Orbax reads them all, and would wait for a pipe
                if native.is_step(entry.name):
                    check_kind(entry / "_CHECKPOINT_METADATA")
        return ocp.CheckpointManager(
            path,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.LatestN(keep),
                # Left by a process killed while saving; or else being written just now. (Orbax'
                # own `read_only` says the same, with five warnings.)
                cleanup_tmp_directories=not self.read_only,
                create=not self.read_only,
            ),
            item_names=("state", "config", digests.ITEM),
        )

    def check_shared(self) -> None:
        """Raises ConfigError where hosts see different directories; all processes call it."""
        if jax.process_count() == 1:
            return
        probe = self._root / ".seen_by_all_hosts"
        (token, *_) = cluster.gather("a file for all", secrets.token_hex(8))
        if jax.process_index() == 0:
            write_json(probe, token)
        cluster.barrier("to have a file for all")
        seen = probe.exists() and token in probe.read_text()
        everywhere = all(cluster.gather("workdir", seen))
        if jax.process_index() == 0:
            probe.unlink(missing_ok=True)
        if not everywhere:
            raise ConfigError(
                f"--workdir: not all hosts see {self._root}; a run on several hosts needs gs:// or"
                " a disk they share"
            )

    def write_config(self, *, known: Mapping[str, Json] | None = None) -> None:
        """Writes `config.json` and `start.json`, on process 0, once the run is known to go on.

        Args:
          known: what the job knows at its start (`Job.known`).

        Raises:
          ConfigError: the checkpoints belong to another run.
        """
        if jax.process_index() == 0:
            for line in self.check_config():
                logging.info("changed since the checkpoint was written: config.%s", line)
            if self._counts and self._steps():
                recorded = same_run.recorded(str(self._root))
                for line in same_run.counts_changed(recorded, self._counts):
                    logging.warning("%s", line)
            write_json(self._root / "config.json", self._config)
            start_record.write(self._root, known=known or {})
        cluster.barrier("to have config.json")

    def check_config(self) -> list[str]:
        """The settings that differ from those of the checkpoints, which they may; one line each.

        Raises:
          ConfigError: the checkpoints belong to another run (`training/same_run.py`).
        """
        if self._manager.latest_step() is None:
            return []
        return same_run.check(str(self._root), config=self._settings, identity=self._identity)

    def latest_step(self) -> int | None:
        """The newest checkpoint's step."""
        return self._manager.latest_step()

    def restore(self, shapes: TrainState) -> TrainState | None:
        """The newest readable checkpoint, placed as `shapes` says; None where there is none.

        Raises:
          ConfigError: the checkpoints hold another model, or another optimizer's state.
          UnreadableError: none can be read, or the newest can't and the config says to fail.
          Exception: of Orbax, where one may not be read for a reason that is not in it, such as
            permission.
        """
        for _ in range(_REREAD):
            steps = self._steps()
            try:
                self._check_model(steps, shapes)
                return self._restore(steps, shapes)
            except ConfigError:
                if not self.read_only:
                    raise
                self._manager.reload()  # the run beside this one may have deleted what was read
                if not cluster.gather("deleted", steps != self._steps())[0]:
                    raise
        raise UnreadableError(f"the checkpoints in {self._root} are deleted faster than read")

    def _steps(self) -> list[int]:
        return sorted(self._manager.all_steps(), reverse=True)

    def _restore(self, steps: list[int], shapes: TrainState) -> TrainState | None:
        """`restore`, of these checkpoints, the newest first."""
        first_error = ""
        for step in steps:
            try:
                with native.quiet_reads():
                    (state, stored), error = self._read(step, shapes), None
            except Exception as raised:
                state, stored, error = None, None, raised
            # Hosts read different parts: a checkpoint that one cannot read is used by none.
            failures = [text for text in cluster.gather("restore", _say(error)) if text]
            if state is not None and not failures:
                # After all have read, since they compute the digests together.
                problem = digests.arrays_problem(stored, _as_dict(state))
                if not problem and int(state.step) != step:
                    problem = f"it was saved at step {int(state.step)}, and renamed"
                error = ValueError(problem) if problem else None
                failures = [text for text in cluster.gather("restore", problem) if text]
            if not failures:
                if first_error and not self.read_only:
                    self._set_aside(above=step)
                return state
            if error is not None and storage.passing(error):
                raise error  # it may be read well the next time: nothing is moved away
            reason = _say(error) or f"on another host: {failures[0]}"
            logging.error("checkpoint %d in %s can't be read: %s", step, self._root, reason)
            if self._run.on_corrupt_checkpoint == "fail":
                raise UnreadableError(
                    f"checkpoint {step} in {self._root} can't be read, and"
                    f" config.run.on_corrupt_checkpoint is 'fail': {reason}"
                ) from error
            first_error = first_error or reason
        if first_error:
            raise UnreadableError(
                f"no checkpoint in {self._root}/checkpoints can be read; the newest says:"
                f" {first_error}"
            )
        return None

    def _check_model(self, steps: list[int], shapes: TrainState) -> None:
        """Raises ConfigError where every checkpoint whose shapes can be read holds other arrays.

        One among others that fit is damaged.
        """
        found = ""
        for step in steps:
            misfit = cluster.gather("shapes", self._misfit(step, shapes))[0]
            if misfit == "":
                return
            found = found or misfit or ""
        if found:
            changed = same_run.changes(same_run.recorded(str(self._root)), self._settings)
            raise ConfigError(same_run.other_model(found, changed, where=self._root))

    def _misfit(self, step: int, shapes: TrainState) -> str | None:
        """What a checkpoint has otherwise than this run; None where its shapes can't be read."""
        try:
            stored = native.saved_shapes(str(self._root / "checkpoints" / str(step)))
            return same_run.misfit(stored, _as_dict(shapes))
        except Exception:  # whatever damage does; reading it will say
            return None

    def _read(self, step: int, shapes: TrainState) -> tuple[TrainState, JsonObject | None]:
        """A checkpoint's state and the digests saved with it, not yet compared."""
        native.check_files(self._root / "checkpoints" / str(step))
        stored = digests.read(self._root / "checkpoints" / str(step))
        restored = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(_as_dict(shapes)))
        )
        state = TrainState(**({name: {} for name in _OPTIONAL} | restored["state"]))
        _check_shapes(state, shapes)
        return state, stored

    def _set_aside(self, *, above: int) -> None:
        """Moves checkpoints newer than `above` away, so that their steps can be saved again."""
        newer = [step for step in self._manager.all_steps() if step > above]
        self._manager.close()
        if jax.process_index() == 0:
            for step in newer:
                self._move_aside(
                    self._root / "checkpoints" / str(step),
                    str(step),
                    folder=self._root / "unreadable_checkpoints",
                )
        cluster.barrier("to set checkpoints aside")
        self._manager = self._open(self._root / "checkpoints", keep=self._run.keep_checkpoints)

    def _move_aside(self, checkpoint: epath.Path, name: str, *, folder: epath.Path) -> None:
        target = folder / f"{name}-{time.time_ns()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            checkpoint.rename(target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            # `checkpoints` is a link to another disk; here may be no room for a copy.
            target = checkpoint.parent / folder.name / target.name
            target.parent.mkdir(exist_ok=True)
            checkpoint.rename(target)
        logging.error("checkpoint %s moved to %s", name, target)

    def due(self, step: int, *, meeting: bool = True) -> bool:
        """Whether a checkpoint is due after `step` steps, by steps or by minutes.

        Args:
          step: steps done.
          meeting: the hosts synchronise at this step anyway, so that process 0's clock can decide
            for all. A single process decides at every step.
        """
        run = self._run
        if run.checkpoint_every and step % run.checkpoint_every == 0:
            return True
        if not run.checkpoint_minutes or (jax.process_count() > 1 and not meeting):
            return False
        minutes = (time.monotonic() - self._last_save) / 60
        by_time = minutes >= run.checkpoint_minutes
        if jax.process_count() > 1:
            by_time = bool(multihost_utils.broadcast_one_to_all(np.asarray(by_time)))
        return by_time

    def save(self, state: TrainState, *, step: int) -> None:
        """Starts saving in the background; does nothing where this step is saved already."""
        if self._manager.latest_step() == step:
            return
        config = self._config | self._recorded()
        self._manager.save(step, args=_items(_as_dict(state), config=config), force=True)
        self._last_save = time.monotonic()

    def _recorded(self) -> JsonObject:
        notes: JsonObject = {IDENTITY: self._identity, COUNTS: self._counts}
        return {name: note for name, note in notes.items() if note}

    def best(self) -> JsonObject | None:
        """The note of the last `save_best`; None before the first, and where it is damaged.

        Raises:
          UnreadableError: it is damaged and the config says to fail.
        """
        first, self._best_read = not self._best_read, True
        step = self._best_manager().latest_step()
        if step is None:
            return None
        source = str(self._root / "best" / "checkpoints" / str(step))
        try:
            note = saved_config(source, name="the best parameters").get(BEST)
            if not isinstance(note, dict) or not isinstance(note.get("value"), int | float):
                raise ConfigError(f"the best parameters: {source} does not say how good they are")
            if first:  # read once by a run that continues, so that damage is not found at its end
                for part in ("params", "variables"):
                    if saved_params_shapes(source, part=part):
                        native.read_params(source, name="the best parameters", part=part)
            error = None
        except Exception as raised:
            note, error = None, raised
        failures = [text for text in cluster.gather("best", _say(error)) if text]
        if not failures:
            return note
        if error is not None and storage.passing(error):
            raise error  # as in `restore`
        reason = _say(error) or f"on another host: {failures[0]}"
        logging.error("%s; the next evaluation's will be the best", reason)
        if self._run.on_corrupt_checkpoint == "fail":
            raise UnreadableError(reason) from error
        self._set_best_aside([step], self._root / "unreadable_checkpoints")
        return None

    def check_best(self, *, start: int) -> None:
        """Sets best parameters aside that another run has left in the directory.

        Those of steps up to the checkpoint's come from the run that goes on. Later ones, without a
        checkpoint any, are done again: with the same settings they become the same, and are kept.

        Args:
          start: the step that the run starts from.
        """
        others: list[int] = []
        if jax.process_index() == 0 and (self._root / "best" / "checkpoints").exists():
            later = [step for step in self._best_manager().all_steps() if step > start]
            for step in later:
                difference = self._other_run(self._root / "best" / "checkpoints" / str(step))
                if difference:
                    others.append(step)
                    logging.warning(
                        "the best parameters in %s/best are of step %d, which this run has not"
                        " done, with other settings (%s): the next evaluation's will be the best",
                        *(self._root, step, difference),
                    )
        (others, *_) = cluster.gather("the best parameters", others)
        if others:
            self._set_best_aside(others, self._root / "best" / "aside")

    def _other_run(self, best: epath.Path) -> str:
        """How the best parameters' run differed from this one; "" where it did not."""
        try:
            saved = saved_config(str(best), name="the best parameters")
        except (ConfigError, OSError):  # `best` will say
            return ""
        was, digest_of = saved.get(IDENTITY), self._identity.get
        known = was if isinstance(was, dict) else {}
        changed = list(same_run.lines(same_run.changes(saved, self._settings)).values())
        changed += [f"{name}: its content" for name in known if known[name] != digest_of(name)]
        return f"config.{changed[0]}" if changed else ""

    def _set_best_aside(self, steps: list[int], folder: epath.Path) -> None:
        self._best_manager().close()
        if jax.process_index() == 0:
            for step in steps:
                best = self._root / "best" / "checkpoints" / str(step)
                self._move_aside(best, f"best-{step}", folder=folder)
        cluster.barrier("to set the best parameters aside")
        self._best = self._open(self._root / "best" / "checkpoints", keep=1)

    def save_best(
        self, params: Params, *, step: int, note: JsonObject, variables: Variables | None = None
    ) -> None:
        """Saves these parameters as the best ones, for `init_from` and export.

        They replace those of the same step and of later ones: from before a restart.

        Args:
          params: nested dict of arrays.
          variables: the model's state that no gradient trains, where it has any.
          step: steps done.
          note: saved with them and returned by `best`, their score for instance.
        """
        manager = self._best_manager()
        for repeated in [done for done in manager.all_steps() if done >= step]:
            manager.delete(repeated)  # Orbax keeps what is of the latest step
        state = {"params": params} | ({"variables": variables} if variables else {})
        config = self._config | self._recorded() | {BEST: note | {"step": step}}
        manager.save(step, args=_items(state, config=config), force=True)
        manager.wait_until_finished()  # small and rare; `best` must see it

    def _best_manager(self) -> ocp.CheckpointManager:
        if self._best is None:
            self._best = self._open(self._root / "best" / "checkpoints", keep=1)
        return self._best

    def check(self) -> None:
        """Raises errors of the background thread; never waits for it."""
        self._manager.check_for_errors()
        # Orbax' thread that completes a checkpoint takes the error before it can be asked for.
        if not self._manager.is_saving_in_progress():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until the last save is complete."""
        try:
            self._manager.wait_until_finished()
        finally:  # a failed save must not keep the threads of others
            self._manager.close()
            if self._best is not None:
                self._best.close()


def _say(error: Exception | None) -> str:
    """An error in one line: tensorstore's have many."""
    if error is None:
        return ""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else f"{text[:400]}..."


def _items(state: PyTree, *, config: JsonObject) -> ocp.args.Composite:
    return ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        config=ocp.args.JsonSave(config),
        digests=ocp.args.JsonSave(digests.item(state, config=config)),
    )


def _as_dict(state: TrainState) -> dict[str, Any]:
    fields = {name: getattr(state, name) for name in _FIELDS}
    return {name: value for name, value in fields.items() if name not in _OPTIONAL or value}


def _check_shapes(state: TrainState, shapes: TrainState) -> None:
    """Orbax checks too, but silently gives a NumPy target of the wrong shape the stored one."""
    for (path, leaf), (_, wanted) in zip(
        jax.tree_util.tree_leaves_with_path(state),
        jax.tree_util.tree_leaves_with_path(shapes),
        strict=True,
    ):
        if leaf.shape != wanted.shape or leaf.dtype != wanted.dtype:
            raise ValueError(
                f"{path_name(path)} is {leaf.dtype}{leaf.shape} in the checkpoint,"
                f" needed {wanted.dtype}{wanted.shape}"
            )
