"""`start.json`: what is known when a run's first step begins, and not before its end elsewhere.

    write(workdir, known={"token_entropy": 4.13})
    # {"versions": {"jax": "0.10.2", ...}, "devices": {...}, "token_entropy": 4.13}

A report on a run that is still going on compares its loss with the token entropy; and what a
number was made with, versions and chips, is asked for long after the log is gone. A run that is
continued writes it again: it says with what the newest part was made.
"""

import os
from collections.abc import Mapping

import jax
from etils import epath

import beit_jax
from beit_jax.distributed.versions import code_version, library_versions
from beit_jax.files import write_json
from beit_jax.types import Json

NAME = "start.json"


def write(workdir: str | os.PathLike, *, known: Mapping[str, Json]) -> None:
    """Writes the record; to be called by one process.

    Args:
      workdir: the run's directory, local or gs://.
      known: what the job knows at its start, by the names that its summary has for it.

    Raises:
      OSError: it can't be written.
    """
    devices = jax.devices()
    versions = {"beit_jax": beit_jax.__version__, "code": code_version(), **library_versions()}
    record = {
        "versions": versions,
        "devices": {
            "kind": devices[0].device_kind,
            "platform": devices[0].platform,
            "count": len(devices),
            "processes": jax.process_count(),
        },
        **known,
    }
    write_json(epath.Path(workdir) / NAME, record)
