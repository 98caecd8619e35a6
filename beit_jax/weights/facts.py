"""Compares a checkpoint with the model that it is to start: what names and shapes do not show.

    found = stated("runs/base")
    check(found, to_dict(config), source="runs/base")  # ConfigError where the epsilon differs, say

The facts are the rows of `config.facts.FACTS`. A checkpoint of this project states them in the
config saved with it; a foreign file states some of them, and a fact that had to be guessed is not
compared: the model's own is taken, and the log says so.
"""

import dataclasses
from collections.abc import Collection, Iterable

from absl import logging

from beit_jax.config import ConfigError
from beit_jax.config.facts import FACTS, Difference, comparable, differences, value_of
from beit_jax.config.facts import stated as is_stated
from beit_jax.types import Json, JsonObject
from beit_jax.weights import foreign, native, opening
from beit_jax.weights.description import describe, to_config
from beit_jax.weights.formats.format import STATED_ELSEWHERE
from beit_jax.weights.report import WeightsError

# What a reader calls guessed although names show it, unless the file is another architecture's.
_SHOWN = frozenset({"pooling"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceFacts:
    """What a checkpoint says of itself.

    Attributes:
      config: as saved with it, or as `description.to_config` writes it of a foreign file.
      guessed: names of the facts in it that the file does not say.
    """

    config: JsonObject
    guessed: frozenset[str] = frozenset()


def check(
    found: SourceFacts,
    target: JsonObject,
    *,
    source: str,
    allow_different: Collection[str] = (),
    from_data: bool = False,
    name: str = "config.run.init_from",
) -> None:
    """Refuses a checkpoint whose numbers would be another function in the model they are to start.

    Args:
      found: what the checkpoint says, from `stated`.
      target: the job's config, as plain dicts.
      source: the checkpoint, for messages.
      allow_different: names of facts that may differ.
      from_data: compares the facts that are known once the images are open; False: the others.
      name: the setting that `source` came from, for messages.

    Raises:
      ConfigError: facts differ, all of which are named.
    """
    compared = [it for it in comparable(found.config, target) if FACTS[it].from_data == from_data]
    silent = [it for it in compared if it in found.guessed or not is_stated(found.config, it)]
    if silent:
        ours = ", ".join(f"{it} {_shown(it, target)}" for it in silent)
        logging.info("%s does not say everything; this run's settings are taken: %s", source, ours)
    different = [
        it
        for it in differences(found.config, target)
        if it.name in compared and it.name not in silent
    ]
    for it in different:
        if it.name in allow_different:
            logging.warning("%s has %s; it is allowed to differ", source, _phrase(it))
    refused = [it for it in different if it.name not in allow_different]
    if refused:
        raise WeightsError(f"{name}: {_message(refused, source=source)}")


def stated(
    source: str, *, allow_unused: Collection[str] = (), name: str = "config.run.init_from"
) -> SourceFacts:
    """What a checkpoint in any format says of itself.

    Args:
      source: what `convert.restore_params` takes.
      allow_unused: foreign keys without a parameter that may be left over.
      name: the setting that `source` came from, for messages.

    Raises:
      ConfigError: there is no such checkpoint, or it can't be read.
    """
    if native.is_checkpoint(source) or not opening.is_foreign(source):
        folder = native.state_folder(source, name=name).parent / "config"
        config = _complete(native.saved_config(source, name=name)) if folder.exists() else {}
        # Guessed by the import, and saved as if it were known.
        said = _object(value_of(config, "imported_from.guessed"))
        kept = _object(value_of(config, "imported_from.kept"))
        return SourceFacts(config=config, guessed=_unsaid(said, kept=kept))
    try:
        checkpoint = foreign.read(source, stated=STATED_ELSEWHERE, allow_unused=allow_unused)
    except WeightsError as error:
        raise WeightsError(f"{name}: {error}") from None
    guessed = _unsaid(checkpoint.guessed, kept=checkpoint.kept)
    return SourceFacts(config=to_config(checkpoint.description), guessed=guessed)


def _unsaid(guessed: Iterable[str], *, kept: JsonObject) -> frozenset[str]:
    """The guesses that stand for something that the file does not say at all."""
    names = frozenset(guessed) - _SHOWN
    if "layer_norm_eps" in _object(kept.get("config")):  # said, and read as the official value
        names -= {"layer_norm_epsilon"}
    return names


def _object(value: Json) -> JsonObject:
    """A section of a config that anybody may have written; {} where it is none."""
    return value if isinstance(value, dict) else {}


def _complete(saved: JsonObject) -> JsonObject:
    """A saved config with the defaults of model settings that it is too old to have."""
    try:
        return saved | {"model": to_config(describe(saved))["model"]}
    except ConfigError:  # of a kind of run, or of a version, that this one does not know
        return saved


def _shown(name: str, config: JsonObject) -> str:
    fact = FACTS[name]
    return fact.show(value_of(config, fact.setting))


def _phrase(it: Difference) -> str:
    show = FACTS[it.name].show
    return f"{it.name} {show(it.source)}, this run {show(it.target)}"


def _message(refused: list[Difference], *, source: str) -> str:
    """Every difference, what it changes, and both ways on."""
    parts = "; ".join(f"{_phrase(it)} ({FACTS[it.name].why})" for it in refused)
    settings = [
        f"--config.{FACTS[it.name].setting}={FACTS[it.name].show(it.source)}"
        for it in refused
        if not FACTS[it.name].from_data
    ]
    change = f"set {' '.join(settings)}, or " if settings else ""
    allowed = " ".join(f"--config.run.init_allow_different={it.name}" for it in refused)
    return f"{source} has {parts}: {change}allow what is meant: {allowed}"
