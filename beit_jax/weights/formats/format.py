"""What a foreign format is: one object with functions to recognise, describe, read and write it.

    FORMATS["toy"] = Format(name="toy", help="a NumPy archive", suffix=".npz", write=write)

`formats.FORMATS` has one row per format; commands, their help, detection and error messages all
come from it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from beit_jax.config import check, one_of
from beit_jax.preprocessing import NORMALIZATIONS
from beit_jax.types import FlatParams, JsonObject
from beit_jax.weights.description import Description
from beit_jax.weights.keys import Table
from beit_jax.weights.report import WeightsError

State = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
    """A foreign file as it is, before any conversion.

    Attributes:
      path: the file with the weights.
      state: foreign key → array.
      metadata: of the file's own header, where its container has one.
      config: `config.json` beside it, where there is one.
      preprocessor: `preprocessor_config.json` beside it, where there is one.
      sha256: of the file with the weights.
      notes: lines for the report: what was chosen where the file leaves a choice.
      extras: what the file says beside its tensors: strings, numbers and bools of the top level,
        and `args`, `hyper_parameters` or `meta` as a dict of these, of lists and of dicts:
        {"arch": "...", "args": {"model": "...", "mean": [0.5, 0.5, 0.5]}}.
    """

    path: str
    state: State
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    config: JsonObject = dataclasses.field(default_factory=dict)
    preprocessor: JsonObject = dataclasses.field(default_factory=dict)
    sha256: str = ""
    notes: tuple[str, ...] = ()
    extras: JsonObject = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """A checkpoint that is to be written, known to fit its description.

    Attributes:
      output: the folder or file to write, with the format's suffix.
      params: flat, "encoder/cls_token" → float32 array.
      description: what they are.
      config: as saved with the checkpoint.
      metrics: the run's last numbers; empty where there are none.
      source: where the checkpoint came from, for a model card.
    """

    output: str
    params: FlatParams
    description: Description
    config: JsonObject
    metrics: JsonObject
    source: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written:
    """What became of an `Export`.

    Attributes:
      load: the Python that loads the result.
      used: parameters that were written, under this project's names.
      left_out: parameters that the format cannot hold.
      rebuilt: foreign keys that were computed from the sizes.
      reshaped: descriptions of changed shapes.
      files: path in a hub repository → local path or content. Empty: the output as it is.
      notes: lines for the report: what is another function there, what the reader has to be told.
    """

    load: str
    used: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    rebuilt: tuple[str, ...] = ()
    reshaped: tuple[str, ...] = ()
    files: Mapping[str, str | bytes] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stated:
    """What the caller says of a checkpoint, whose file may not say it.

    Attributes:
      normalization: of the pixels, in place of what the file says; "" takes that.
      heads: attention heads, for files that do not say; 0 takes the file's or a guess.
      layer_norm_epsilon: in place of what the file says; None takes that.
      weights: "ema" or "model", for files that hold an average beside the model; "" takes the
        average, as timm does.
      elsewhere: only the parameters are wanted, and what the file does not say is known elsewhere,
        from a run's settings: a guess that could not be made is no error.
    """

    normalization: str = ""
    heads: int = 0
    layer_norm_epsilon: float | None = None
    weights: str = ""
    elsewhere: bool = False

    def __post_init__(self) -> None:
        if self.normalization:
            one_of(self.normalization, "--normalization", *NORMALIZATIONS)
        known = self.weights in ("", "ema", "model")
        check(known, "--weights", f"must be ema or model, got {self.weights!r}")
        check(self.heads >= 0, "--heads", f"must be positive, got {self.heads}")
        epsilon = self.layer_norm_epsilon
        check(
            epsilon is None or 0 < epsilon < 1, "--epsilon", f"must be between 0 and 1: {epsilon}"
        )

    def over(self, description: Description) -> Description:
        """The description with what the caller says in place of what a checkpoint does."""
        model = description.model
        if self.layer_norm_epsilon is not None:
            model = dataclasses.replace(model, layer_norm_epsilon=self.layer_norm_epsilon)
        normalization = self.normalization or description.normalization
        return dataclasses.replace(description, model=model, normalization=normalization)


NOTHING_STATED = Stated()
STATED_ELSEWHERE = Stated(elsewhere=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Described:
    """What a file holds, and how that is known.

    Attributes:
      description: the kind and sizes.
      guessed: a fact's name ("heads") → what was taken for it and why. Only what the file does not
        say.
      left_out: foreign keys or modules that the described kind has no use for and that files of the
        kind commonly keep; they are not converted, and the report says so.
      kept: what the file says and no parameter shows: preprocessing, dropout, a loss's kind. Saved
        with an imported checkpoint and given to a format's `write`.
      notes: lines for the report.
    """

    description: Description
    guessed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    kept: JsonObject = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Describe(Protocol):
    """Finds out what a file holds.

    Raises WeightsError where the file contradicts itself or the caller, or is another architecture.
    """

    def __call__(self, opened: Opened, *, stated: Stated) -> Described: ...


def _unchanged(state: State) -> State:
    return state


def _none(key: str) -> bool:
    return False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader:
    """How a format is recognised and read.

    Attributes:
      detect: whether an opened file is of this format. Formats are asked in the order of `FORMATS`,
        so where two could read a file, the earlier one does.
      describe: what the file holds.
      table: foreign keys ↔ parameters for a description.
      canonical: renames the keys of a variant of the format before `describe` and `table` see them.
      in_encoder: whether a foreign key, known or not, is of the encoder. Those can't be allowed to
        be missing or left over: a model with other ones is another architecture.
      rebuilt: whether a foreign key is a buffer that follows from the sizes and is not read.
      load: `(content, path) -> (state, metadata)` for files with the format's suffix; None where
        they are safetensors or what `torch.save` writes.
    """

    detect: Callable[[Opened], bool]
    describe: Describe
    table: Callable[[Description], Table]
    canonical: Callable[[State], State] = _unchanged
    in_encoder: Callable[[str], bool] = _none
    rebuilt: Callable[[str], bool] = _none
    load: Callable[[bytes, str], tuple[State, dict[str, str]]] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """A foreign format.

    Attributes:
      name: its key in `FORMATS` and on the command line.
      help: one line for the command's help, without a full stop.
      writing: what writing takes, for the help of `export`, in a few words; "" for nothing.
      suffix: of the file it writes, ".pth"; "" for a folder.
      kinds: what it can hold, of `Description.task`.
      write: writes a checkpoint.
      reader: None where the format can only be written.
    """

    name: str
    help: str
    suffix: str
    write: Callable[[Export], Written]
    reader: Reader | None = None
    writing: str = ""
    kinds: tuple[str, ...] = ("pretrain", "classify", "encoder")

    def check_output(self, output: str) -> None:
        """Raises WeightsError where `output` cannot be what this format writes."""
        if not output.endswith(self.suffix):
            raise WeightsError(f"--output: {output} must end in {self.suffix}")
