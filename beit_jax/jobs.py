"""From a config's `task` to the job that runs it: the edge between settings and code."""

from collections.abc import Mapping
from typing import Any

from beit_jax.config import ConfigError, RunError, check, parse, to_dict
from beit_jax.distributed import cluster
from beit_jax.tasks import classify, pretrain, probe, quickstart, tokenizer
from beit_jax.tokenizers.loading import TokenizerFileError
from beit_jax.training import startup

JOBS = {
    "classify": (classify.ClassifyConfig, classify.run),
    "pretrain": (pretrain.PretrainConfig, pretrain.run),
    "probe": (probe.ProbeConfig, probe.run),
    "tokenizer": (tokenizer.TokenizerTaskConfig, tokenizer.run),
    "quickstart": (quickstart.QuickstartConfig, quickstart.run),
}


def parse_job(values: Mapping[str, Any]) -> Any:
    """The frozen config of the job that `values["task"]` names; raises ConfigError."""
    task = values.get("task")
    check(task in JOBS, "config.task", f"must be one of {', '.join(JOBS)}; got {task!r}")
    return parse(JOBS[task][0], values)


def run(values: Mapping[str, Any], *, workdir: str) -> dict[str, Any]:
    """Runs the job and returns its summary."""
    config = parse_job(values)
    startup.keep_compiled(config.run.compilation_cache, workdir=workdir)
    return JOBS[config.task][1](config, workdir=workdir)


def run_on_cluster(
    values: Mapping[str, Any], *, workdir: str, cluster_settings: Mapping[str, Any]
) -> int:
    """Runs the job as one of the cluster's processes, if there is a cluster; the exit code.

    Exit codes are those of `distributed/cluster.py`; what is wrong is one line on stderr.
    """
    try:
        settings = cluster.Settings(**cluster_settings)
        cluster.start(settings, config=to_dict(parse_job(values)), workdir=workdir)
        run(values, workdir=workdir)
    except cluster.Preempted as stop:
        return cluster.end(code=cluster.EXIT_PREEMPTED, error=stop, message=str(stop))
    except cluster.ClusterError as error:
        return cluster.end(code=cluster.EXIT_LOST, error=error, message=str(error))
    except (ConfigError, TokenizerFileError, FileNotFoundError, RunError) as error:
        return cluster.end(code=cluster.EXIT_SETTINGS, error=error, message=str(error))
    except KeyboardInterrupt as error:
        return cluster.end(code=130, error=error, message="interrupted")
    except Exception as error:
        return cluster.end(code=1, error=error)
    return cluster.end(code=0)
