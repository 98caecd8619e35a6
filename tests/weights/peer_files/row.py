"""What a row of the table is. Nothing here, nor in the rows, imports a peer when it is imported."""

import dataclasses
from collections.abc import Callable
from typing import Any

TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Built:
    """A peer's file, made in the process of the peers.

    Attributes:
      path: the file or folder.
      kind: "classify", "pretrain" or "encoder"; "" where the file is never read.
      model: the live module that the file is of; None where there is none.
      forward: normalised pixels `[b, 3, s, s]` and a mask (for "pretrain") → what the model gives.
      state: tensors that a round trip must give back, under the names of the format; None takes
        those of `model`.
      image_size: pixels of the images that the model takes.
      patch_size: pixels of a patch.
    """

    path: str
    kind: str = ""
    model: Any = None
    forward: Callable[..., Any] | None = None
    state: dict[str, Any] | None = None
    image_size: int = 64
    patch_size: int = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accepted:
    """The file is read, gives the peer's numbers, and comes back from a round trip unchanged.

    Attributes:
      flags: of import.
      guessed: facts that the report must name as guessed; no other may be, but for the pooling of
        a classifier, which is guessed wherever the activation is.
      wrong: a guess is wrong, so that the numbers are the peer's only with `right_flags`.
      right_flags: the flags that replace the wrong guess.
      says: regular expressions for lines of the report.
      format: that the round trip goes through; "" for none.
      lost: names of the peer's tensors that import leaves out, and says so.
      changed: fields of the peer's config that a round trip changes, with their new values.
      renamed: the round trip gives a model of another library's class, whose names differ.
      copies: the format holds other tensors that make the same function: a shared table's copies.
      data: names of timm's `resolve_data_config` that the printed line must give as the peer does.
    """

    flags: tuple[str, ...] = ()
    guessed: tuple[str, ...] = ()
    wrong: bool = False
    right_flags: tuple[str, ...] = ()
    says: tuple[str, ...] = ()
    format: str = ""
    lost: tuple[str, ...] = ()
    changed: tuple[tuple[str, Any], ...] = ()
    renamed: bool = False
    copies: bool = False
    data: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refused:
    """The file is refused in one line.

    Attributes:
      line: a regular expression that the line must match.
      flags: of import.
      hint: whether the line may name an --allow flag. It may not where going on would give a model
        that is not the file's.
    """

    line: str
    flags: tuple[str, ...] = ()
    hint: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One peer file.

    Attributes:
      name: what the file is, in words.
      build: writes it into a folder; runs in the process of the peers.
      outcome: what must become of it.
      fast: whether it belongs to the fast part of the tests.
      container: whether the file is a way of packing tensors that `readers_test` must run.
    """

    name: str
    build: Callable[[str], Built]
    outcome: Accepted | Refused
    fast: bool = False
    container: bool = False
