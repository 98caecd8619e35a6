"""A stand-in for gcloud: records every call, plays the machines with directories and processes.

`tpu_test.py` puts it on PATH as `gcloud`. A host is a directory, `ssh --command` runs in bash with
that directory as home and a clean environment as sshd's would be, `scp` copies. So `worker.sh` and
the detached processes it starts are real; only the cloud is not.

Everything is under the folder of the environment variable STANDIN:

    calls.jsonl    argument vectors, in order
    config/        project, compute-zone: what `gcloud config get-value` answers
    machine.json   {"state": ..., "initiator": ..., "queue": [states to pass, one per describe]}
    errors.json    {"create": [texts]}: what the next calls of a verb fail with; null: they don't
    hosts/NAME/    the hosts' homes
    host-bin/      programs that the hosts find first
    bucket/        stands for gs://; the file `preempt` there takes the machines away, once
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(os.environ["STANDIN"])


def main(words: list[str]) -> int:
    with (ROOT / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps(words) + "\n")
    if words[:2] == ["config", "get-value"]:
        configured = ROOT / "config" / words[2].replace("/", "-")
        print(configured.read_text() if configured.exists() else "")
        return 0
    if words[0] == "alpha":
        words = words[1:]
    assert words[:2] == ["compute", "tpus"], words
    kind, verb, *rest = words[2:]
    name = next(word for word in rest if not word.startswith("-"))
    flags = dict(word.lstrip("-").partition("=")[::2] for word in rest if word.startswith("--"))
    with (ROOT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        error = planned_error(verb)
    if error:
        print(f"ERROR: (gcloud.compute.tpus.{kind}.{verb}) {error}", file=sys.stderr)
        return 1
    return {
        "create": create,
        "describe": describe,
        "delete": delete,
        "ssh": ssh,
        "scp": scp,
    }[verb](kind, name, flags, rest)


def planned_error(verb: str) -> str | None:
    errors = read("errors.json", {})
    if not errors.get(verb):
        return None
    first, *errors[verb] = errors[verb]
    write("errors.json", errors)
    return first


def create(kind: str, name: str, flags: dict, rest: list[str]) -> int:
    if read("machine.json", None):
        print("ERROR: (gcloud) ALREADY_EXISTS: it exists", file=sys.stderr)
        return 1
    ready = "READY" if kind == "tpu-vm" else "ACTIVE"
    queue = [] if kind == "tpu-vm" else ["WAITING_FOR_RESOURCES", "PROVISIONING"]
    write("machine.json", {"state": ready, "initiator": "", "queue": queue})
    for slice_number in range(int(flags.get("node-count", 1))):
        for worker in range(2):
            (ROOT / "hosts" / f"{slice_number}-w-{worker}").mkdir(parents=True)
    return 0


def describe(kind: str, name: str, flags: dict, rest: list[str]) -> int:
    machine = read("machine.json", None)
    preempt = ROOT / "bucket" / "preempt"
    if machine and preempt.exists():
        preempt.unlink()
        take_away()
        machine = {"state": "SUSPENDED", "initiator": "SERVICE", "queue": []}
        write("machine.json", machine)
    if machine is None:
        print("ERROR: (gcloud) NOT_FOUND: Resource not found", file=sys.stderr)
        return 1
    if "networkEndpoints" in flags["format"]:
        print(2)
    elif "failedData" in flags["format"]:
        print("The request could not be completed: quota exceeded")
    else:
        state = machine["queue"].pop(0) if machine["queue"] else machine["state"]
        write("machine.json", machine)
        print(state, machine["initiator"], sep="\t")
    return 0


def delete(kind: str, name: str, flags: dict, rest: list[str]) -> int:
    take_away()
    (ROOT / "machine.json").unlink(missing_ok=True)
    return 0


def take_away() -> None:
    """Kills what runs on the hosts, and their disks with it."""
    for host in (ROOT / "hosts").glob("*"):
        for pid_file in ("supervisor", "pid"):
            with contextlib.suppress(OSError, ValueError):  # not running
                os.kill(int((host / "beit_jax/run" / pid_file).read_text()), signal.SIGKILL)
        shutil.rmtree(host, ignore_errors=True)


def chosen(flags: dict) -> list[Path]:
    hosts = sorted((ROOT / "hosts").glob("*"))
    if flags.get("worker") == "all":
        return hosts
    return [host for host in hosts if host.name == f"0-w-{flags['worker']}"]


def ssh(kind: str, name: str, flags: dict, rest: list[str]) -> int:
    machine = read("machine.json", None)
    if machine is None or machine["state"] not in ("READY", "ACTIVE"):
        print("ERROR: (gcloud) the TPU is in an unusable state", file=sys.stderr)
        return 1
    environment = {"PATH": f"{ROOT / 'host-bin'}:/usr/bin:/bin"}
    if flags.get("ssh-flag") == "-oSendEnv=LC_BEIT_JAX_ENV" and not (ROOT / "no-lc").exists():
        environment["LC_BEIT_JAX_ENV"] = os.environ["LC_BEIT_JAX_ENV"]
    # As gcloud does: words split at spaces, joined by ssh; all hosts at once.
    command = " ".join(flags["command"].split(" "))
    running = []
    for host in chosen(flags):
        home = {"HOME": str(host), "STANDIN_HOST": host.name}
        lock = {"LIBTPU_LOCKFILE": str(host / "libtpu_lockfile")}
        running.append(
            subprocess.Popen(
                ["bash", "-c", command],
                cwd=host,
                env=environment | home | lock,
                stdin=subprocess.DEVNULL,
            )
        )
    return max((process.wait() for process in running), default=0)


def scp(kind: str, name: str, flags: dict, rest: list[str]) -> int:
    source, target = (word for word in rest if not word.startswith("-"))
    for host in chosen(flags):
        shutil.copy(source, host / target.split(":", 1)[1])
    return 0


def read(name: str, default):
    path = ROOT / name
    return json.loads(path.read_text()) if path.exists() else default


def write(name: str, value) -> None:
    (ROOT / f"{name}.new").write_text(json.dumps(value))
    (ROOT / f"{name}.new").rename(ROOT / name)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
