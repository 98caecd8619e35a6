"""A run at Weights & Biases: the extra `[wandb]`, `config.run.wandb = "project"`.

The run's directory holds its id, so that a run that goes on is one run there too. Everything that
`wandb` reads from the environment works: WANDB_MODE=offline, WANDB_API_KEY, WANDB_ENTITY, ...
"""

import secrets
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from beit_jax.config import to_dict
from beit_jax.files import write_whole
from beit_jax.types import Json

ID_FILE = "wandb_id.txt"


class WandbWriter:
    """Writes to a new run, or resumes the one that the directory's id names.

    A step is a value of its own, by which everything is drawn: W&B's own count of steps only
    grows, and would drop those that are repeated after a kill.

    Args:
      workdir: the run's directory, local or gs://. Beside the id, W&B's own files lie there
        (`wandb/`), or in the working directory where it is gs://.
      project: at W&B.
      config: the settings, for the record.

    Raises:
      Exception: of wandb's, where there is no login or no network, say.
    """

    def __init__(self, workdir: str, *, project: str, config: Json):
        import wandb  # here, since it is an extra

        self._wandb = wandb
        self._run = wandb.init(
            project=project,
            id=run_id(workdir),
            name="/".join(epath.Path(workdir).parts[-2:]),
            resume="allow",
            reinit="create_new",  # a quickstart's jobs are runs of one process
            dir=None if "://" in workdir else workdir,
            config=config if isinstance(config, dict) else to_dict(config),
            settings=wandb.Settings(console="off"),  # what the run prints stays as it is
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        logging.info("W&B: %s", self._run.url or f"offline, in {self._run.dir}")

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Numbers by name."""
        self._run.log({**scalars, "step": step})

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Pictures by name, uint8 `[n, h, w, 3]`."""
        shown: dict[str, Any] = {
            name: [self._wandb.Image(picture) for picture in pictures]
            for name, pictures in images.items()
        }
        self._run.log({**shown, "step": step})

    def flush(self) -> None:
        """Does nothing: a process of wandb's own has everything already."""

    def close(self) -> None:
        """Waits until everything is sent or on the disk; a run that an error ends is marked so."""
        self._run.finish(exit_code=int(sys.exc_info()[0] is not None))


def run_id(workdir: str) -> str:
    """The id of a directory's run, which is drawn and kept there the first time."""
    path = epath.Path(workdir) / ID_FILE
    if path.exists():
        kept = path.read_text().strip()
        if kept.isalnum() and len(kept) <= 64:
            return kept
        logging.warning("%s holds no id of a W&B run: a new run starts there", path)
    new = secrets.token_hex(4)
    write_whole(path, f"{new}\n".encode())
    return new
