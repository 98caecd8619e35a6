"""A row of the table of faults: what was tried and what came through."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """The outcome of one part.

    Attributes:
      part: its name: "kill".
      tried: how many faults were made.
      survived: how many had an outcome that `docs/guarantees.md` promises.
      failures: one line for each of the others, good enough to repeat it.
      note: figures in words: "SIGKILL 61, SIGTERM 39".
    """

    part: str
    tried: int
    survived: int
    failures: tuple[str, ...] = ()
    note: str = ""
