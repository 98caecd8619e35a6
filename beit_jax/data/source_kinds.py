"""The table of the kinds of sources: how each is written, and what opens it. No TensorFlow.

A further kind needs one row, or `KINDS["mine"] = Kind(...)` in code of one's own; what opens it
imports TensorFlow when it is called, so that settings are checked without.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from beit_jax.config import ConfigError, SourceConfig, check
from beit_jax.config.online import OnlineConfig
from beit_jax.config.parse import shown

if TYPE_CHECKING:
    from beit_jax.data.sources.source import Request, Source

# Held-out images of the embedded set start at this index: disjoint from any number of training
# images.
EMBEDDED_EVAL_START = 1 << 40


def _any(value: str) -> str:
    return ""


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of source.

    Attributes:
      usage: how the setting is written, for the error message that lists all kinds.
      open: opens a source; raises ConfigError with the name of the setting at fault.
      wrong: what is wrong with what follows the colon, before anything is opened; "" if nothing is.
    """

    usage: str
    open: "Callable[[Request], Source]"
    wrong: Callable[[str], str] = _any


def _open_embedded(request: "Request") -> "Source":
    from beit_jax.data.sources import embedded

    return embedded.open_embedded(request)


def _open_folder(request: "Request") -> "Source":
    from beit_jax.data.sources import folder

    return folder.open_folder(request)


def _open_pairs(request: "Request") -> "Source":
    from beit_jax.data.sources import pairs

    return pairs.open_pairs(request)


def _open_prepared(request: "Request") -> "Source":
    from beit_jax.data.sources import prepared

    return prepared.open_prepared(request)


def _open_tfds(request: "Request") -> "Source":
    from beit_jax.data.sources import tfds

    return tfds.open_tfds(request)


def _wrong_number(value: str) -> str:
    number = re.fullmatch(r"[0-9]{1,13}", value) is not None
    if value == "" or (number and 0 < int(value) <= EMBEDDED_EVAL_START):
        return ""
    return f"embedded:NUMBER needs a positive whole number of images up to 2^40, got {shown(value)}"


def _wrong_path(value: str) -> str:
    return "" if value.strip() else f"no such folder: {shown(value)}"


def _wrong_name(value: str) -> str:
    """TFDS's names: NAME, NAME/CONFIG, NAME:VERSION; also a folder's, of a set of one's own."""
    words = re.fullmatch(r"\w[\w.:/+=,-]*", value) is not None
    return "" if words and ".." not in value else f"{shown(value)} is no name of a TFDS data set"


KINDS = {
    "embedded": Kind("embedded, embedded:NUMBER", _open_embedded, _wrong_number),
    "folder": Kind("folder:PATH", _open_folder, _wrong_path),
    "pairs": Kind("pairs:FOLDER, pairs:IMAGES,LABELS", _open_pairs, _wrong_path),
    "prepared": Kind("prepared:PATH", _open_prepared, _wrong_path),
    "tfds": Kind("tfds:NAME", _open_tfds, _wrong_name),
}


def split_source(text: str, *, setting: str) -> tuple[Kind, str]:
    """The kind that a source is of, and what follows its colon.

    Raises:
      ConfigError: there is no such kind, or what follows is wrong for it.
    """
    name, _, value = text.partition(":")
    if name not in KINDS:
        *first, last = (kind.usage for kind in KINDS.values())
        raise ConfigError(f"{setting}: must be {', '.join(first)} or {last}; got {shown(text)}")
    wrong = KINDS[name].wrong(value)
    check(not wrong, setting, wrong)
    return KINDS[name], value


def check_sources(config: SourceConfig | OnlineConfig, *, section: str = "data") -> None:
    """Checks how the sources of a section are written; opens none. For `__post_init__` of jobs.

    Raises:
      ConfigError: see `split_source`.
    """
    split_source(config.source, setting=f"{section}.source")
    if config.eval_source:
        split_source(config.eval_source, setting=f"{section}.eval_source")
