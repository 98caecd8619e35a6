"""From a config's `task` to the job that runs it: the edge between settings and code."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax

from beit_jax import storage
from beit_jax.config import ConfigError, ModelConfig, RunError, check, one_of, parse, to_dict
from beit_jax.config.unused import check_unused
from beit_jax.data import quiet_import
from beit_jax.distributed import cluster
from beit_jax.models.attention import PLATFORMS
from beit_jax.tasks import classify, pretrain, probe, quickstart, segment, tokenizer
from beit_jax.tokenizers.loading import TokenizerFileError
from beit_jax.training import room, run_directory, startup
from beit_jax.types import Json, JsonObject


class JobKind(NamedTuple):
    """A row of the table of jobs; a plain pair will do.

    Attributes:
      config: a frozen dataclass with a field `task`, whose `run` is a `RunConfig`. Settings in its
        sections that the job does not use stand in its `UNUSED` (`config/unused.py`).
      run: `(config, *, workdir) -> summary`; `tasks.run_job` does most of it.
    """

    config: type
    run: Callable[..., JsonObject]


JOBS: dict[str, JobKind] = {
    "classify": JobKind(classify.ClassifyConfig, classify.run),
    "pretrain": JobKind(pretrain.PretrainConfig, pretrain.run),
    "probe": JobKind(probe.ProbeConfig, probe.run),
    "segment": JobKind(segment.SegmentConfig, segment.run),
    "tokenizer": JobKind(tokenizer.TokenizerTaskConfig, tokenizer.run),
    "quickstart": JobKind(quickstart.QuickstartConfig, quickstart.run),
}


def parse_job(values: Mapping[str, Json]) -> Json:
    """Turns settings into the frozen config of the job that `values["task"]` names.

    Raises:
      ConfigError: a setting is unknown, missing, wrong, or of no use to the job.
    """
    task: Json = values.get("task")
    one_of(task, "config.task", *JOBS)
    config_class, _ = JOBS[task]
    config: Json = parse(config_class, values)
    check_unused(config)
    return config


def check_platform(config: Json, *, platform: str, path: str = "config") -> None:
    """Refuses a kernel of attention that does not run here, before anything is opened.

    Args:
      config: a frozen config dataclass; its sections are checked too.
      platform: "tpu", "gpu" or "cpu", where the run takes place.
      path: the section's full name, for messages.

    Raises:
      ConfigError: a section's `attention` names a kernel of another platform.
    """
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{path}.{field.name}"
        if isinstance(value, ModelConfig):
            wanted = PLATFORMS.get(value.attention, platform)
            check(
                wanted == platform,
                f"{name}.attention",
                f"{value.attention!r} is a kernel for {wanted}, and this run is on {platform};"
                ' take "auto"',
            )
        elif dataclasses.is_dataclass(value):
            check_platform(value, platform=platform, path=name)


def run(values: Mapping[str, Json], *, workdir: str) -> JsonObject:
    """Runs the job and returns its summary."""
    run_directory.check_path(workdir)
    config = parse_job(values)
    check_platform(config, platform=jax.default_backend())
    quiet_import.tensorflow()  # the first path that is opened would import it, loudly (etils.epath)
    startup.keep_compiled(config.run.compilation_cache, workdir=workdir)
    _, run_kind = JOBS[config.task]
    return run_kind(config, workdir=workdir)


def run_on_cluster(
    values: Mapping[str, Json], *, workdir: str, cluster_settings: Mapping[str, Json]
) -> int:
    """Runs the job as one process of the cluster, where there is a cluster; returns the exit code.

    Exit codes are those of `distributed/cluster.py`; an error of the user's is one line on stderr.
    """
    try:
        with storage.said_once():
            run_directory.check_path(workdir)
            settings = cluster.Settings(**cluster_settings)
            cluster.start(settings, config=to_dict(parse_job(values)), workdir=workdir)
            run(values, workdir=workdir)
    except cluster.Preempted as stop:
        return cluster.end(code=cluster.EXIT_PREEMPTED, error=stop, message=str(stop))
    except cluster.ClusterError as error:
        return cluster.end(code=cluster.EXIT_LOST, error=error, message=str(error))
    except storage.StorageError as error:
        message = room.line(error, workdir=workdir)
        return cluster.end(code=storage.EXIT_STORAGE, error=error, message=message)
    except (ConfigError, TokenizerFileError, FileNotFoundError, RunError) as error:
        return cluster.end(code=cluster.EXIT_SETTINGS, error=error, message=str(error))
    except KeyboardInterrupt as error:
        message = (
            "interrupted: steps since the last checkpoint are lost (SIGTERM saves them); the same"
            " command continues"
        )
        return cluster.end(code=130, error=error, message=message)
    except Exception as error:
        fault = storage.explain(error)
        if fault is not None:
            message = room.line(fault, workdir=workdir)
            return cluster.end(code=storage.EXIT_STORAGE, error=error, message=message)
        return cluster.end(code=1, error=error)
    return cluster.end(code=0)
