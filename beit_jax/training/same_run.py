"""What makes a run the same run: which settings its checkpoints fix, and what no setting shows.

Settings say it where they are declared (`shape_setting` and its neighbours in `config/parse.py`).
What a run depends on besides, the bytes of its tokenizer for instance, is its identity: digests by
the setting that they come from, which `Job.identity` gives and every checkpoint records. Last come
the arrays themselves: a checkpoint that has others is another model's, which is no damage.
"""

import json
from collections.abc import Mapping
from typing import Any, TypeAlias, cast

import jax
import numpy as np
from absl import logging
from etils import epath

from beit_jax.config import ConfigError, fixed_settings, may_change, parse, to_dict
from beit_jax.config.differences import ABSENT, differences
from beit_jax.config.parse import shown
from beit_jax.json_text import JsonError, read_json_object
from beit_jax.training.optim import path_name
from beit_jax.training.run_directory import COUNTS, IDENTITY, plain_config
from beit_jax.types import ConfigDataclass, Json, JsonObject, PyTree
from beit_jax.weights import native

# The config of a job: its frozen dataclass, or plain nested dicts.
Settings: TypeAlias = JsonObject | ConfigDataclass
# Parts of the train state, and the sections of settings that decide what is in them.
_SECTIONS = {"opt_state": ("optimizer",), "ema": ("optimizer", "model", "tokenizer")}
_EMPTY = "nothing"  # an optimizer's step without a state has a place, but no arrays


def check(workdir: str, *, config: Settings, identity: Mapping[str, str]) -> list[str]:
    """The settings that differ from those of the checkpoints, which they may; one line each.

    Args:
      workdir: the run's directory, which may have no checkpoints.
      config: the job's, completed.
      identity: what the run depends on besides (`Job.identity`).

    Raises:
      ConfigError: the checkpoints belong to another run.
    """
    saved = recorded(workdir)
    changed = changes(saved, config)
    check_settings(changed, config, where=workdir)
    was = saved.get(IDENTITY)
    check_identity(was if isinstance(was, dict) else {}, identity, where=workdir)
    return list(lines(changed).values())


def recorded(workdir: str) -> JsonObject:
    """What the newest checkpoint of a run was written with; {} where there is no checkpoint.

    Where its own record is damaged, the next best is taken; `config.json` is the last. Where none
    is left, that is logged, and {} returned.
    """
    root = epath.Path(workdir)
    entries = (root / "checkpoints").iterdir() if (root / "checkpoints").exists() else ()
    steps = [int(entry.name) for entry in entries if native.is_step(entry.name)]
    if not steps:
        return {}
    for step in sorted(steps, reverse=True):
        try:
            return native.saved_config(str(root / "checkpoints" / str(step)), name="settings")
        except ConfigError as error:
            logging.warning("%s; an older record is taken", error)
    try:
        return read_json_object(root / "config.json", finite=False)
    except JsonError as error:
        logging.warning("%s", error)
    logging.error("the settings of the checkpoints in %s are lost: not compared", workdir)
    return {}


def changes(saved: JsonObject, settings: Settings) -> dict[str, dict[str, Json]]:
    """Settings that are not what they were: by full name, what each "was" and is "now".

    Args:
      saved: a checkpoint's config; {}, of which nothing is known, differs in nothing.
      settings: the job's now.
    """
    if not saved:
        return {}
    now = settings if isinstance(settings, dict) else to_dict(settings)
    return differences({"was": _as_now(plain_config(saved), settings), "now": as_json(now)})


def lines(changed: Mapping[str, Mapping[str, Json]]) -> dict[str, str]:
    """Changes in words: "model.width: was 4, now 6"."""
    return {
        name: f"{name}: was {shown(sides['was'])}, now {shown(sides['now'])}"
        for name, sides in changed.items()
    }


def check_settings(
    changed: Mapping[str, Mapping[str, Json]], settings: Settings, *, where: object
) -> None:
    """Raises ConfigError for changes that the checkpoints do not fit.

    Args:
      changed: from `changes`.
      settings: the job's now. A plain dict declares nothing.
      where: the run's directory, for messages.
    """
    fixed = {} if isinstance(settings, dict) else fixed_settings(settings)
    text = lines(changed)
    refused = [
        text[name]
        for name, sides in changed.items()
        if not may_change(fixed.get(name), **sides, absent=ABSENT)
    ]
    if refused:
        raise ConfigError(
            f"config.{refused[0]}: differs from the checkpoint in {where}"
            f"{_more(refused)}; choose another --workdir"
        )


def check_identity(
    recorded: Mapping[str, Json], identity: Mapping[str, str], *, where: object
) -> None:
    """Raises ConfigError where the run depends on something else than its checkpoints do.

    Args:
      recorded: of a checkpoint; what an old one lacks is taken to be the same.
      identity: the run's now.
      where: the run's directory, for messages.
    """
    for name, digest in identity.items():
        was = recorded.get(name, digest)
        if was != digest:
            raise ConfigError(
                f"config.{name}: its content is not what the run in {where} began with"
                f" (digest {shown(was)}, now {digest!r}); choose another --workdir"
            )


def counts_changed(recorded: JsonObject, counts: Mapping[str, int]) -> list[str]:
    """Lines about images that have become more or fewer than they were; that is allowed.

    Args:
      recorded: what a checkpoint was written with; an old one does not say.
      counts: how many there are now, by setting (`Feed.counts`).
    """
    was = recorded.get(COUNTS)
    if not isinstance(was, dict):
        return []
    return [
        f"config.{name}: {count} images, and {shown(was[name])} when the checkpoint was written:"
        " from here on their order is another one"
        for name, count in counts.items()
        if was.get(name, count) != count
    ]


def misfit(stored: PyTree, wanted: PyTree) -> str:
    """The first array that a checkpoint has otherwise than the run needs it; "" where all fit.

    Args:
      stored: nested shapes and dtypes of a checkpoint.
      wanted: those of the run.
    """
    there, needed = _arrays(stored), _arrays(wanted)
    for name in sorted(there.keys() | needed.keys()):
        was, now = there.get(name, "missing"), needed.get(name, "not needed")
        if was != now:
            return f"{name} is {was} in the checkpoint, {now} in this run"
    return ""


def other_model(found: str, changed: Mapping[str, Mapping[str, Json]], *, where: object) -> str:
    """The line for checkpoints that hold other arrays, which names the setting that it is due to.

    Args:
      found: from `misfit`.
      changed: settings that are not what they were.
      where: the run's directory.
    """
    part = found.split("/")[0].split(" ")[0]
    sections = _SECTIONS.get(part, ("model", "tokenizer"))
    text = lines(changed)
    causes = [text[name] for name in text if name.split(".")[0] in sections] or list(text.values())
    if not causes:
        return (
            f"--workdir: the checkpoints in {where} are another model's: {found};"
            " choose another --workdir"
        )
    return (
        f"config.{causes[0]}: the checkpoints in {where} do not fit ({found})"
        f"{_more(causes)}; choose another --workdir"
    )


def as_json(config: JsonObject) -> JsonObject:
    """As it comes back from JSON, with lists for tuples."""
    return cast(JsonObject, json.loads(json.dumps(config)))


def _as_now(saved: JsonObject, settings: Settings) -> JsonObject:
    """A saved config with new settings at their defaults and without removed ones."""
    if isinstance(settings, dict):
        return saved
    try:
        return as_json(to_dict(parse(cast(type[Any], type(settings)), saved)))
    except ConfigError:  # of another version, or for images and weights that are gone
        return saved


def _more(texts: list[str]) -> str:
    """The changes after the first one, in words; of many, a few."""
    if len(texts) < 2:
        return ""
    rest = len(texts) - 4
    return f" (also {'; '.join(texts[1:4])}{f'; and {rest} more' if rest > 0 else ''})"


def _arrays(tree: PyTree) -> dict[str, str]:
    """Dtype and shape of every array by name; `_EMPTY` for a place without any."""
    leaves = jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda node: not jax.tree_util.tree_leaves(node)
    )
    return {
        path_name(path): f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"
        if hasattr(leaf, "shape")
        else _EMPTY
        for path, leaf in leaves
    }
