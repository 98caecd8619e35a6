"""`launch/tpu.sh` against a stand-in for gcloud whose hosts are directories and real processes."""

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = (
    "bash git grep sed awk mktemp rm mkdir dirname cat cut tr tail head base64 sleep cp mv env "
    "sort gzip ssh-add ssh-agent ssh-keygen"
)
WHERE = ["--name=beit", "--project=p", "--zone=us-central2-b"]
QUICK = ["--poll=0.05", "--retry-seconds=0.05", "--retry-max-seconds=0.1"]
ARGUMENTS = ["--config=configs/beit_large.py", "--workdir=gs://bucket/run"]
SECRET = "s3cr3t with 'quotes' & spaces=&"

# Stands for main.py: acts as bucket/plan says for this attempt, and notes its arguments.
MAIN = """
import json, os, pathlib, signal, socket, sys, time
bucket = pathlib.Path(os.environ["HOME"]).parents[1] / "bucket"
host = os.environ["STANDIN_HOST"]
attempt = len(list(bucket.glob(f"{host}.*.json")))
plan = (bucket / "plan").read_text().split()
told = plan[min(attempt, len(plan) - 1)]
ended = []
signal.signal(signal.SIGTERM, lambda *_: ended.append(75))
note = {"arguments": sys.argv[1:], "environment": dict(os.environ)}
note["resumed"] = (bucket / "step").exists()
(bucket / f"{host}.{attempt}.new").write_text(json.dumps(note))
(bucket / f"{host}.{attempt}.new").rename(bucket / f"{host}.{attempt}.json")
print("step of attempt", attempt, flush=True)
if told == "preempted":
    (bucket / "step").write_text("5")
    if host == "0-w-0":
        (bucket / "preempt").touch()
    told = "wait"
if told.startswith("first:"):  # one host fails, the other for want of it
    told = told.removeprefix("first:")
    if host != "0-w-1":
        time.sleep(0.3)
        told = "1"
patience = time.monotonic() + 300  # nobody is left to stop it where a test died
while told == "wait" and not ended and time.monotonic() < patience:
    time.sleep(0.02)
if told == "kill":
    os.kill(os.getpid(), signal.SIGABRT)
sys.exit(ended[0] if ended else 1 if told == "wait" else int(told))
"""

PYTHON = """#!/bin/sh
# Python on a host: makes environments and installs packages without doing either.
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip") echo "$@" >>"$HOME/pip" ;;
  "-c "*) echo 3.12.0 ;;
  *) exec REAL_PYTHON -S -E "$@" ;;
esac
"""


class Cloud:
    """A checkout with launch/ and a stand-in main.py, and the stand-in cloud it talks to."""

    def __init__(self, root: Path, checkout: Path):
        self.root = root
        self.standin = root / "cloud"
        self.checkout = root / "checkout"
        self.bucket = self.standin / "bucket"
        for folder in (self.bucket, self.standin / "hosts", self.standin / "config", root / "home"):
            folder.mkdir(parents=True)
        # A PATH on which no other gcloud can be found, whatever this machine has.
        self.bin = root / "bin"
        self.bin.mkdir()
        for tool in TOOLS.split():
            if found := shutil.which(tool):
                (self.bin / tool).symlink_to(found)
        script(
            self.bin / "gcloud",
            f'#!/bin/sh\nexec {sys.executable} -S -E {ROOT}/tests/launch/gcloud_standin.py "$@"\n',
        )
        host_bin = self.standin / "host-bin"
        host_bin.mkdir()
        script(host_bin / "python3.13", PYTHON.replace("REAL_PYTHON", sys.executable))
        script(host_bin / "hostname", '#!/bin/sh\necho "$STANDIN_HOST"\n')
        script(host_bin / "sudo", "#!/bin/sh\nexit 1\n")
        shutil.copytree(checkout, self.checkout)
        self.plan("0")

    def plan(self, *attempts):
        """What main.py does at each start: a status, "wait", "kill", "preempted", "first:N"."""
        (self.bucket / "plan").write_text(" ".join(attempts))

    def environment(self, **more):
        return {
            "PATH": str(self.bin),
            "HOME": str(self.root / "home"),
            "TMPDIR": str(self.root),
            "STANDIN": str(self.standin),
            **more,
        }

    def start(self, *words, **environment):
        return subprocess.Popen(
            [str(self.checkout / "launch/tpu.sh"), *words],
            env=self.environment(**environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words, **environment):
        process = self.start(*words, **environment)
        output, errors = process.communicate(timeout=60)
        return subprocess.CompletedProcess(words, process.returncode, output, errors)

    def calls(self):
        """The gcloud calls so far, as words; each once, since polling repeats them."""
        record = self.standin / "calls.jsonl"
        lines = record.read_text().splitlines() if record.exists() else []
        return [json.loads(line) for line in dict.fromkeys(lines)]

    def count(self, verb):
        record = (self.standin / "calls.jsonl").read_text().splitlines()
        return sum(json.loads(line)[3:4] == [verb] for line in record)

    def note(self, host, attempt):
        return json.loads((self.bucket / f"{host}.{attempt}.json").read_text())

    def attempts(self, host="0-w-0"):
        return len(list(self.bucket.glob(f"{host}.*.json")))

    def fails(self, **errors):
        (self.standin / "errors.json").write_text(json.dumps(errors))

    def prepared(self, *, kind="queued-resources", slices=1):
        """As after `create` and `setup`, without the calls."""
        self.machine("READY" if kind == "tpu-vm" else "ACTIVE")
        for host in (f"{i}-w-{j}" for i in range(slices) for j in range(2)):
            home = self.standin / "hosts" / host / "beit_jax"
            shutil.copytree(self.checkout, home / "code", ignore=shutil.ignore_patterns(".git"))
            (home / "code/.tree").write_text("0" * 40)
            (home / ".venv/bin").mkdir(parents=True)
            shutil.copy(self.standin / "host-bin/python3.13", home / ".venv/bin/python")

    def machine(self, state, initiator=""):
        value = {"state": state, "initiator": initiator, "queue": []}
        (self.standin / "machine.json").write_text(json.dumps(value))

    def processes(self):
        """Processes whose command line names this cloud, or that work in it."""
        found = []
        for command in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                folder = str(command.parent.joinpath("cwd").readlink())
                if str(self.standin) in f"{folder} {command.read_bytes().decode(errors='replace')}":
                    found.append(int(command.parent.name))
            except OSError:
                pass  # gone meanwhile
        return found


def script(path, text):
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "launch", folder / "launch")
    (folder / "main.py").write_text(MAIN)
    (folder / "requirements.txt").write_text("jax\n")
    (folder / ".gitignore").write_text("runs/\n")
    identity = ["-c", "user.name=n", "-c", "user.email=e"]
    for words in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture
def cloud(tmp_path, checkout):
    cloud = Cloud(tmp_path, checkout)
    yield cloud
    for pid in cloud.processes():
        os.kill(pid, signal.SIGKILL)


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def split(lines):
    """The words that a shell reads from each line."""
    code = "import json, sys; print(json.dumps(sys.argv[1:]))"
    read = f"gcloud() {{ {sys.executable} -c '{code}' \"$@\"; }}\n"
    output = subprocess.run(
        ["bash", "-c", read + lines], capture_output=True, text=True, check=True
    )
    return [json.loads(line) for line in output.stdout.splitlines()]


def test_shellcheck_finds_nothing():
    # tests/run.sh installs it beside the Python that runs this, which need not be on PATH.
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    shellcheck = shutil.which("shellcheck", path=beside)
    if not shellcheck:
        pytest.skip("shellcheck is not installed")
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "launch").glob("*.sh"))
    files.remove("launch/setup.sh")  # sourced, without a shell of its own: -x reads it
    result = subprocess.run([shellcheck, "-x", *files], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


QUEUE = "compute tpus queued-resources"
VM = "compute tpus tpu-vm"
AT = "--project=p --zone=us-central2-b"
ALL = f"{AT} --node=all --worker=all --batch-size=64 --quiet"
NETWORK = ["--internal-ips", "--service-account=a@b", "--network=n", "--subnetwork=s"]
WORKER = "--command=bash beit_jax/code/launch/worker.sh"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["create", "--type=v4-128"],
            [
                f"{QUEUE} create beit --node-id=beit {AT} --accelerator-type=v4-128"
                " --runtime-version=tpu-ubuntu2204-base",
                f"{QUEUE} describe beit {AT} --format=value(state.state,state.stateInitiator)",
            ],
        ),
        (
            ["create", "--type=v4-128", "--on-demand"],
            [
                f"{VM} create beit {AT} --accelerator-type=v4-128 --version=tpu-ubuntu2204-base",
                f"{VM} describe beit {AT} --format=value(state)",
            ],
        ),
        (
            ["create", "--type=v6e-64", "--slices=2", "--spot", "--valid-until=6h", *NETWORK],
            [
                f"{QUEUE} create beit --node-count=2 --node-prefix=beit {AT}"
                " --accelerator-type=v6e-64 --runtime-version=v2-alpha-tpuv6e --spot"
                f" {' '.join(NETWORK)} --valid-until-duration=6h",
                f"{QUEUE} describe beit {AT} --format=value(state.state,state.stateInitiator)",
            ],
        ),
        (
            ["create", "--type=v5p-8", "--reserved", "--autocheckpoint", "--runtime-version=mine"],
            [
                f"alpha {QUEUE} create beit --node-id=beit {AT} --accelerator-type=v5p-8"
                " --runtime-version=mine --autocheckpoint-enabled --reserved",
                f"{QUEUE} describe beit {AT} --format=value(state.state,state.stateInitiator)",
            ],
        ),
        (["delete"], [f"{QUEUE} delete beit {AT} --force --quiet"]),
        (["delete", "--on-demand"], [f"{VM} delete beit {AT} --quiet"]),
        (["stop"], [f"{QUEUE} ssh beit {ALL} | {WORKER} stop 300 mark"]),
        (
            ["logs", "--worker=1", "--lines=5"],
            [f"{QUEUE} ssh beit {AT} --node=0 --worker=1 --quiet | {WORKER} logs 5"],
        ),
        (
            ["logs", "--on-demand", "--iap", "--follow"],
            [
                f"alpha {VM} ssh beit {AT} --worker=0 --tunnel-through-iap --quiet"
                f" | {WORKER} logs 100 follow"
            ],
        ),
        (
            ["logs", "--internal-ip"],
            [
                f"{QUEUE} ssh beit {AT} --node=0 --worker=0 --internal-ip --quiet"
                f" | {WORKER} logs 100"
            ],
        ),
        (
            ["status", "--slices=2"],
            [
                f"{QUEUE} describe beit {AT} --format=value(state.state,state.stateInitiator)",
                f"{VM} describe beit-0 {AT} --format=value(networkEndpoints.len())",
                f"{VM} describe beit-1 {AT} --format=value(networkEndpoints.len())",
                f"{QUEUE} ssh beit {ALL} | {WORKER} status || echo @worker $(hostname) idle - -",
            ],
        ),
        (
            ["run", "--", *ARGUMENTS],
            [
                f"{VM} describe beit {AT} --format=value(networkEndpoints.len())",
                f"{QUEUE} ssh beit {ALL} | {WORKER} start - -- {' '.join(ARGUMENTS)}",
                f"{QUEUE} ssh beit {AT} --node=0 --worker=0 --quiet | {WORKER} logs 20 follow",
                f"{QUEUE} describe beit {AT} --format=value(state.state,state.stateInitiator)",
                f"{QUEUE} ssh beit {ALL} | {WORKER} status || echo @worker $(hostname) idle - -",
            ],
        ),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_a_dry_run_prints_the_exact_calls_and_runs_none(cloud, words, expected):
    """The calls that the stand-in receives equal those that the dry run prints."""
    command, *flags = words
    if "--" in flags:
        at = flags.index("--")
        flags, arguments = flags[:at], flags[at:]
    else:
        arguments = []
    words = [command, *WHERE, "--poll=0.05", *flags, *arguments]
    expected = [
        [*head.split(), *([tail] if tail else [])]
        for head, _, tail in (line.partition(" | ") for line in expected)
    ]
    dry = cloud.run(*words[:1], "--dry-run", *words[1:])
    assert dry.returncode == 0, dry.stderr
    assert split(dry.stdout) == expected
    assert cloud.calls() == []
    if command != "create":
        cloud.prepared(
            kind="tpu-vm" if "--on-demand" in flags else "queued-resources",
            slices=2 if "--slices=2" in flags else 1,
        )
        if command == "logs":
            for host in (cloud.standin / "hosts").iterdir():
                (host / "beit_jax/run").mkdir()
                (host / "beit_jax/run/log").write_text("step of attempt 0\n")
        if command == "stop":
            cloud.plan("wait")
            assert cloud.run("run", *WHERE, "--detach", "--", *ARGUMENTS).returncode == 0
            wait_for(lambda: cloud.attempts() == 1 and cloud.attempts("0-w-1") == 1)
            (cloud.standin / "calls.jsonl").unlink()
    real = cloud.run(*words)
    assert real.returncode == 0, real.stderr
    assert sorted(cloud.calls()) == sorted(expected)
    if command == "stop":
        assert real.stdout.count("stopped 75") == 2
    if command == "status":
        assert real.stdout.count("idle") == 4
        assert "4 of 4 hosts answered" in real.stdout
    if command in ("logs", "run"):
        assert "step of attempt 0" in real.stdout


def test_setup_copies_the_code_and_installs_packages_once(cloud):
    """Code as committed, or as it is; packages once; and how: the exact calls."""
    assert cloud.run("create", *WHERE, "--type=v4-16", "--poll=0.05").returncode == 0
    (cloud.standin / "calls.jsonl").unlink()
    (cloud.checkout / "new.txt").write_text("not committed")
    committed = cloud.run("setup", *WHERE, "--poll=0.05")
    assert committed.returncode == 0, committed.stderr
    assert "2 hosts are set up" in committed.stderr
    assert "uncommitted changes are not copied" in committed.stderr
    code = cloud.standin / "hosts/0-w-1/beit_jax/code"
    assert (code / "main.py").read_text() == MAIN
    assert not (code / "new.txt").exists()
    tree = (code / ".tree").read_text().strip()
    archive = "runs/launch/beit/code.tar.gz"
    expected = [
        f"{QUEUE} ssh beit {ALL} | --command=mkdir -p beit_jax && rm -rf beit_jax/code.new",
        f"{QUEUE} scp {archive} beit:beit_jax/code.tar.gz {ALL}",
        f"{QUEUE} ssh beit {ALL} | --command=mkdir beit_jax/code.new && tar -xzf"
        " beit_jax/code.tar.gz -C beit_jax/code.new && bash beit_jax/code.new/launch/worker.sh"
        f" setup {tree}",
    ]
    expected = [
        [*head.split(), *([tail] if tail else [])]
        for head, _, tail in (line.partition(" | ") for line in expected)
    ]
    assert cloud.calls() == expected
    assert split(cloud.run("setup", "--dry-run", *WHERE).stdout) == expected
    installed = (cloud.standin / "hosts/0-w-1/pip").read_text()
    assert "-r code/requirements.txt" in installed
    assert "-r code/launch/requirements-tpu.txt" in installed

    assert cloud.run("setup", *WHERE, "--working-tree", "--poll=0.05").returncode == 0
    assert (code / "new.txt").read_text() == "not committed"
    assert (code / ".tree").read_text().strip() != tree
    assert (cloud.standin / "hosts/0-w-1/pip").read_text() == installed  # not again
    status = subprocess.run(
        ["git", "status", "--short"], cwd=cloud.checkout, capture_output=True, text=True, check=True
    )
    assert status.stdout == "?? new.txt\n"  # the user's own index is as it was


@pytest.mark.parametrize(
    ("accelerator", "runtime"),
    [
        ("v2-8", "tpu-ubuntu2204-base"),
        ("v3-32", "tpu-ubuntu2204-base"),
        ("v4-4096", "tpu-ubuntu2204-base"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v6e-8", "v2-alpha-tpuv6e"),
    ],
)
def test_the_runtime_version_follows_the_accelerator(cloud, accelerator, runtime):
    dry = cloud.run("create", "--dry-run", *WHERE, f"--type={accelerator}")
    assert f"--runtime-version={runtime}\n" in dry.stdout


def test_up_creates_runs_and_deletes(cloud):
    """From nothing to nothing: the calls of a dry run; main.py gets just what it was given."""
    awkward = [
        "--config.a=it's",
        '--b="x y"',
        "--c=$HOME `date` \\ ; &",
        "--d=  two  spaces",
        "é*?",
    ]
    words = [*WHERE, *QUICK, "--type=v4-16", "--slices=2", "--env=WANDB_API_KEY", "--", *ARGUMENTS]
    awkward += ["é*?", "", "line\nbreak"]
    words += awkward
    dry = cloud.run("up", "--dry-run", *words, WANDB_API_KEY=SECRET)
    assert dry.returncode == 0, dry.stderr
    assert cloud.calls() == []
    real = cloud.run("up", *words, WANDB_API_KEY=SECRET)
    assert real.returncode == 0, real.stderr
    printed = [json.loads(line) for line in dict.fromkeys(map(json.dumps, split(dry.stdout)))]
    assert sorted(cloud.calls()) == sorted(printed)
    assert "step of attempt 0" in real.stdout
    assert not (cloud.standin / "machine.json").exists()  # deleted
    assert list(cloud.standin.glob("hosts/*")) == []
    assert "[1-w-1] step of attempt 0" in (cloud.checkout / "runs/launch/beit/logs.txt").read_text()
    for host in ("0-w-0", "0-w-1", "1-w-0", "1-w-1"):
        note = cloud.note(host, 0)
        assert note["arguments"] == [*ARGUMENTS, *awkward]
        environment = note["environment"]
        assert environment["WANDB_API_KEY"] == SECRET
        assert "LC_BEIT_JAX_ENV" not in environment
        assert environment["JAX_COORDINATOR_PORT"] == "8476"
        assert environment["JAX_PLATFORMS"] == "tpu,cpu"
        assert (
            "JAX_COMPILATION_CACHE_DIR" not in environment
        )  # config.run.compilation_cache decides
        assert len(environment["BEIT_JAX_REVISION"]) == 40


def test_values_of_env_reach_main_and_nothing_else(cloud):
    """The value of --env is in main.py's environment and nowhere else."""
    cloud.plan("wait")
    words = [*WHERE, *QUICK, "--type=v4-16", "--env=TOKEN", "--", *ARGUMENTS]
    process = cloud.start("up", *words, TOKEN=SECRET)
    wait_for(lambda: cloud.attempts() == 1 and cloud.attempts("0-w-1") == 1)
    assert cloud.note("0-w-1", 0)["environment"]["TOKEN"] == SECRET
    for note in cloud.bucket.glob("*.json"):  # the stand-in's own record of it
        note.unlink()
    lines = b"".join(
        path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if readable(path)
    )
    assert b"s3cr3t" not in lines
    assert cloud.run("stop", *WHERE).returncode == 0
    output, errors = process.communicate(timeout=120)
    assert "s3cr3t" not in output + errors
    for path in cloud.root.rglob("*"):
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            assert b"s3cr3t" not in content, path
            assert base64.b64encode(b"TOKEN=s3cr3t") not in content, path
    dry = cloud.run("up", "--dry-run", *words, TOKEN=SECRET)
    assert "s3cr3t" not in dry.stdout + dry.stderr


def readable(path):
    try:
        path.read_bytes()
    except OSError:
        return False
    return True


def test_a_preempted_slice_is_made_again_and_the_run_resumes(cloud):
    """A slice that is taken away is made again, set up again, and the run resumes."""
    cloud.plan("preempted", "0")
    result = cloud.run("up", *WHERE, *QUICK, "--type=v4-16", "--spot", "--", *ARGUMENTS)
    assert result.returncode == 0, result.stderr
    assert "SUSPENDED" in result.stderr
    assert cloud.count("create") == 2
    assert cloud.count("delete") == 2
    assert cloud.attempts() == cloud.attempts("0-w-1") == 2
    assert cloud.note("0-w-1", 1)["resumed"]
    assert cloud.note("0-w-1", 0)["arguments"] == cloud.note("0-w-1", 1)["arguments"]


@pytest.mark.parametrize("status", ["75", "69"])
def test_an_interrupted_run_starts_again_on_the_same_machines(cloud, status):
    """Told to leave (75) or lost another host (69): main.py again, on the same machines."""
    cloud.plan(status, "0")
    result = cloud.run("up", *WHERE, *QUICK, "--type=v4-16", "--", *ARGUMENTS)
    assert result.returncode == 0, result.stderr
    assert f"status {status}" in result.stderr
    assert cloud.count("create") == cloud.count("delete") == 1
    assert cloud.attempts() == 2


def test_a_failure_of_main_ends_up_with_its_status_and_log(cloud):
    """main.py's own error ends it all, with the status and log of the host that failed first."""
    cloud.plan("first:3")
    result = cloud.run("up", *WHERE, *QUICK, "--type=v4-16", "--", *ARGUMENTS)
    assert result.returncode == 3
    assert "error: main.py failed on 0-w-1 with status 3" in result.stderr
    assert "[0-w-1] step of attempt 0" in result.stderr
    assert cloud.attempts() == 1
    assert not (cloud.standin / "machine.json").exists()


def test_keep_leaves_the_machines(cloud):
    cloud.plan("3")
    result = cloud.run("up", *WHERE, *QUICK, "--type=v4-16", "--keep", "--", *ARGUMENTS)
    assert result.returncode == 3
    assert cloud.count("delete") == 0
    assert (cloud.standin / "machine.json").exists()
    assert "costs money" in result.stderr


def test_up_gives_up_after_max_retries(cloud):
    """Killed each time, at once: given up after --max-retries, and the machines given back."""
    cloud.plan("kill")
    result = cloud.run("up", *WHERE, *QUICK, "--type=v4-16", "--max-retries=1", "--", *ARGUMENTS)
    assert result.returncode == 69
    assert "gave up after 1 retries in a row; the last: killed by signal 6" in result.stderr
    assert cloud.attempts() == 2
    assert not (cloud.standin / "machine.json").exists()


def test_a_run_stopped_by_the_user_is_not_started_again(cloud):
    """`stop` lets main.py save, and a watching `up` does not start it again."""
    cloud.plan("wait")
    process = cloud.start("up", *WHERE, *QUICK, "--type=v4-16", "--", *ARGUMENTS)
    wait_for(lambda: cloud.attempts() == 1 and cloud.attempts("0-w-1") == 1)
    stopped = cloud.run("stop", *WHERE)
    assert stopped.stdout.count("stopped 75") == 2
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75
    assert "stopped by tpu.sh stop" in errors
    assert cloud.attempts() == 1


def test_a_run_is_stopped_although_it_has_only_just_started(cloud):
    """main.py runs before its process id is written down, and `stop` may come between the two."""
    script(
        cloud.standin / "host-bin/mv",
        '#!/bin/sh\ncase "$1" in */pid.new) sleep 2 ;; esac\nexec /bin/mv "$@"\n',
    )
    cloud.plan("wait")
    cloud.prepared()
    process = cloud.start("run", *WHERE, "--detach", "--", *ARGUMENTS)
    wait_for(lambda: cloud.attempts() == 1 and cloud.attempts("0-w-1") == 1)
    stopped = cloud.run("stop", *WHERE)
    assert stopped.returncode == 0, stopped.stderr
    assert stopped.stdout.count("stopped 75") == 2
    process.communicate(timeout=120)


def test_machines_deleted_by_the_user_are_not_made_again(cloud):
    """Machines that somebody deletes or suspends are not made again."""
    cloud.plan("wait")
    process = cloud.start("up", *WHERE, *QUICK, "--type=v4-16", "--", *ARGUMENTS)
    wait_for(lambda: cloud.attempts() == 1 and cloud.attempts("0-w-1") == 1)
    assert cloud.run("delete", *WHERE).returncode == 0
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 69
    assert "deleted or stopped by somebody" in errors
    assert cloud.count("create") == 1
    cloud.machine("SUSPENDED", "USER")
    again = cloud.run("up", *WHERE, *QUICK, "--type=v4-16", "--", *ARGUMENTS)
    assert again.returncode == 2
    assert "suspended by hand" in again.stderr


def test_main_outlives_its_watcher(cloud):
    """main.py goes on when `up` is killed; the same command finds it and watches."""
    cloud.plan("wait")
    words = ["up", *WHERE, *QUICK, "--type=v4-16", "--", *ARGUMENTS]
    process = cloud.start(*words)
    wait_for(lambda: cloud.attempts() == 1 and cloud.attempts("0-w-1") == 1)
    process.terminate()
    _, errors = process.communicate(timeout=120)
    assert "goes on" in errors
    again = cloud.start(*words)
    wait_for(lambda: cloud.count("ssh") > 12)
    assert cloud.run("stop", *WHERE).returncode == 0
    _, errors = again.communicate(timeout=120)
    assert "main.py runs already on all 2 hosts" in errors
    assert again.returncode == 75
    assert cloud.attempts() == 1


def test_missing_capacity_is_waited_for_and_missing_quota_is_not(cloud):
    """Capacity is waited for; a quota is not."""
    no_capacity = "RESOURCE_EXHAUSTED: There is no more capacity in the zone us-central2-b"
    cloud.fails(create=[no_capacity, None])
    result = cloud.run("up", *WHERE, *QUICK, "--type=v4-16", "--on-demand", "--", *ARGUMENTS)
    assert result.returncode == 0, result.stderr
    assert cloud.count("create") == 2
    cloud.fails(
        create=["Quota limit 'TPUV4PerProjectPerZone' has been exceeded. RESOURCE_EXHAUSTED"]
    )
    result = cloud.run("up", *WHERE, *QUICK, "--type=v4-16", "--on-demand", "--", *ARGUMENTS)
    assert result.returncode == 69
    assert cloud.count("create") == 3
    assert "error: create beit: quota; ask for more of v4-16" in result.stderr


def test_a_failed_request_is_reported_with_its_reason(cloud):
    """A request that has failed says why."""
    cloud.machine("FAILED")
    (cloud.standin / "errors.json").write_text(json.dumps({"create": [None]}))
    status = cloud.run("status", *WHERE)
    assert "FAILED" in status.stdout
    assert "quota exceeded" in status.stdout


def test_main_starts_on_all_hosts_or_on_none(cloud):
    """Where a host cannot start, the others are stopped, and the reason is told."""
    cloud.prepared()
    (cloud.standin / "hosts/0-w-1/beit_jax/code/.tree").unlink()
    cloud.plan("wait")
    result = cloud.run("run", *WHERE, "--", *ARGUMENTS)
    assert result.returncode == 69
    assert "main.py started on 1 of 2 hosts" in result.stderr
    assert "0-w-1 error not set up" in result.stderr
    status = cloud.run("status", *WHERE).stdout
    assert "0-w-0 exit 75" in status or "0-w-0 exit 143" in status  # 143: had not begun to listen


def test_the_worker_protects_a_running_main(cloud):
    """A stale lock goes; a second start is refused; code under a run is not replaced."""
    cloud.prepared()
    lock = cloud.standin / "hosts/0-w-0/libtpu_lockfile"
    lock.touch()
    cloud.plan("wait")
    run = ["run", *WHERE, "--detach", "--", *ARGUMENTS]
    assert cloud.run(*run).returncode == 0
    assert not lock.exists()
    wait_for(lambda: cloud.attempts() == 1)
    again = cloud.run("setup", *WHERE, "--poll=0.05")
    assert again.returncode == 69
    assert "'stop' it before its code is replaced" in again.stderr
    assert cloud.run("status", *WHERE).stdout.count("running") == 2
    supervisor = cloud.standin / "hosts/0-w-1/beit_jax/run/supervisor"
    os.kill(int(supervisor.read_text()), signal.SIGKILL)
    os.kill(int(supervisor.with_name("pid").read_text()), signal.SIGKILL)
    wait_for(lambda: "0-w-1 lost" in cloud.run("status", *WHERE).stdout)


def test_a_main_that_ends_during_a_status_request_is_not_lost(cloud):
    """A host whose main.py ends in the middle of a question is not taken for one that died."""
    cloud.prepared()
    cloud.plan("wait")
    assert cloud.run("run", *WHERE, "--detach", "--", *ARGUMENTS).returncode == 0
    wait_for(lambda: cloud.attempts() == 1)
    run = cloud.standin / "hosts/0-w-0/beit_jax/run"
    asked, answer = cloud.root / "asked", cloud.root / "answer"
    script(
        cloud.standin / "host-bin/flock",
        f"#!/bin/sh\ntouch {asked}\nwhile [ ! -e {answer} ]; do sleep 0.02; done\n"
        f'exec {shutil.which("flock")} "$@"\n',
    )
    process = cloud.start("status", *WHERE)
    wait_for(asked.exists)
    os.kill(int((run / "pid").read_text()), signal.SIGTERM)
    wait_for((run / "exit").exists)
    supervisor = Path("/proc") / (run / "supervisor").read_text().strip()
    wait_for(lambda: not supervisor.exists())
    answer.touch()
    output, _ = process.communicate(timeout=120)
    assert "0-w-0 exit 75" in output


def test_variables_that_sshd_drops_are_an_error(cloud):
    """Where sshd drops the variables, that is an error and not a run without them."""
    cloud.prepared()
    (cloud.standin / "no-lc").touch()
    result = cloud.run("run", *WHERE, "--env=TOKEN", "--", *ARGUMENTS, TOKEN=SECRET)
    assert result.returncode == 69
    assert "does not accept LC_*" in result.stderr
    assert cloud.attempts() == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fly"], "fly: unknown command"),
        (["create", "--type=v4-8"], "--name=NAME is missing"),
        (["create", "--name=Beit"], "--name=Beit: lower-case"),
        (["create", *WHERE], "--type=TYPE is missing"),
        (["create", *WHERE, "--type=v9-8"], "the families are v2-N, v3-N, v4-N, v5litepod-N"),
        (["create", *WHERE, "--type=v4-x8"], "--type=v4-x8: unknown"),
        (["create", *WHERE, "--type=v5e-16"], "v5litepod-16"),
        (["create", *WHERE, "--type=tpu7x-8"], "docs/tpus-in-compute-engine"),
        (["create", *WHERE, "--type=v4-8", "--spot", "--reserved"], "exclude each other"),
        (["create", *WHERE, "--type=v4-8", "--on-demand", "--slices=2"], "need the queue"),
        (["create", *WHERE, "--type=v4-8", "--slices=two"], "not a whole number"),
        (["create", *WHERE, "--sport"], "--sport: unknown flag"),
        (["create", *WHERE, "--type=v4-8", "--", "--config=x"], "create takes no arguments"),
        (["run", *WHERE], "main.py's arguments are missing"),
        (["run", *WHERE, "--", "--config=x"], "--workdir=gs://BUCKET/RUN is missing"),
        (
            ["run", *WHERE, "--env=TOKEN", "--", *ARGUMENTS],
            "--env=TOKEN: there is no such variable",
        ),
        (["run", *WHERE, "--env=TOKEN=s3cr3t", "--", *ARGUMENTS], "--env=TOKEN=...: a name only"),
        (["status", "--name=beit", "--zone=z"], "--project=P is missing"),
        (["status", "--name=beit", "--project=p"], "--zone=Z is missing"),
        (["logs", *WHERE, "--worker=x"], "--worker=x: a number, or all"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(cloud, words, message):
    """One line and status 2, before anything is asked of the cloud."""
    result = cloud.run(*words)
    assert result.returncode == 2
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert "s3cr3t" not in result.stderr
    assert all(call[0] == "config" for call in cloud.calls())


def test_project_and_zone_come_from_gclouds_configuration(cloud):
    """Project and zone come from gcloud's configuration when no flag gives them."""
    (cloud.standin / "config/project").write_text("mine")
    (cloud.standin / "config/compute-zone").write_text("europe-west4-b")
    assert cloud.run("delete", "--name=beit").returncode == 0
    assert f"{QUEUE} delete beit --project=mine --zone=europe-west4-b --force --quiet".split() in (
        cloud.calls()
    )


def test_without_gcloud_only_dry_runs_work(cloud):
    (cloud.bin / "gcloud").unlink()
    result = cloud.run("create", *WHERE, "--type=v4-8")
    assert result.returncode == 2
    assert "gcloud is not installed" in result.stderr
    assert cloud.run("create", "--dry-run", *WHERE, "--type=v4-8").returncode == 0


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        ("You do not currently have an active account selected.", "gcloud auth login"),
        ("PERMISSION_DENIED: Permission 'tpu.nodes.create' denied", "roles/tpu.admin"),
        ("Cloud TPU API has not been used in project p before", "gcloud services enable"),
        ("Quota limit 'X' has been exceeded. Code RESOURCE_EXHAUSTED", "quota; ask for more"),
        ("There is no more capacity in the zone; code 8", "no capacity in us-central2-b"),
        ("ALREADY_EXISTS: beit", "beit exists already"),
        ("INVALID_ARGUMENT: Accelerator type v4-8 not known", "accelerator-types list"),
        ("This API method requires billing to be enabled", "billing account"),
        (
            "something new",
            "gcloud failed (gcloud: (gcloud.compute.tpus.queued-resources.create) some",
        ),
    ],
)
def test_gclouds_errors_are_explained_in_one_line(cloud, said, advice):
    """What gcloud says is explained in one line that quotes it; status 69."""
    cloud.fails(create=[said])
    result = cloud.run("create", *WHERE, "--type=v4-8")
    assert result.returncode == 69
    assert result.stderr.startswith("error: create beit: ")
    assert len(result.stderr.splitlines()) == 1
    assert advice in result.stderr
    assert said in result.stderr


NUMBERS = (
    "08",
    "-1",
    "+1",
    " 1",
    "1 ",
    "1e3",
    "0x10",
    "1.",
    "٣",
    "1\n2",
    "9" * 20,
    "a[$(touch c)]",
)
NAMES = (
    "a b",
    "a\nb",
    "$(touch c)",
    "`touch c`",
    ";touch c",
    "-x",
    "a'b",
    "\x1b[2J",
    "é",
    "a" * 300,
)


@pytest.mark.parametrize(
    ("flags", "values"),
    [
        (("slices", "lines", "grace", "max-retries", "healthy-seconds", "worker"), NUMBERS),
        (("poll", "retry-seconds", "retry-max-seconds"), NUMBERS),
        (("name", "project", "zone", "type", "runtime-version", "service-account"), NAMES),
        (("network", "subnetwork", "flex-start", "valid-until", "env", "nothing"), NAMES),
    ],
)
def test_hostile_words_are_refused_in_one_line_and_not_run(cloud, flags, values):
    for flag in flags:
        for value in (*values, ""):
            words = ["up", *WHERE, "--type=v4-8", "--dry-run", f"--{flag}={value}"]
            result = cloud.run(*words, "--", *ARGUMENTS)
            assert result.returncode == 2, (words, result.stdout)
            assert re.fullmatch(r"error: [^\n\x1b]{1,250}\n", result.stderr), result.stderr
            assert flag in result.stderr
            assert not list(cloud.checkout.rglob("c"))
            assert not result.stdout


@pytest.mark.parametrize("name", ["SLICES", "name"])
@pytest.mark.parametrize("value", ["08", "9" * 20, "1 2", "a\nb", "$(touch c)", "-1"])
def test_gke_refuses_hostile_words(cloud, name, value):
    script(cloud.bin / "xpk", '#!/bin/bash\nprintf "%s\\n" "$@"\n')
    variables = {"CLUSTER": "c", "PROJECT": "p", "ZONE": "z", "TYPE": "v5litepod-16", "IMAGE": "i"}
    variables |= {name: value} if name == "SLICES" else {}
    words = [str(cloud.checkout / "launch/gke.sh"), value if name == "name" else "beit", "--a=b"]
    result = subprocess.run(
        words, env=cloud.environment(**variables), capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1


def test_gke_makes_one_xpk_call(cloud):
    """The one xpk call, with main.py's arguments as they were; what is missing is named."""
    script(cloud.bin / "xpk", '#!/bin/bash\nprintf "%s\\n" "$@"\n')
    variables = {"CLUSTER": "c", "PROJECT": "p", "ZONE": "z", "TYPE": "v5litepod-16"}

    def call(*words, **environment):
        gke = [str(cloud.checkout / "launch/gke.sh"), *words]
        environment = cloud.environment(**environment)
        return subprocess.run(gke, env=environment, capture_output=True, text=True)

    result = call("beit", "--config=x.py", "--a=b c", IMAGE="i", **variables)
    words = result.stdout.splitlines()
    assert words[:2] == ["workload", "create"]
    assert "--tpu-type=v5litepod-16" in words
    assert "--restart-on-exit-codes=75" in words
    command = r"--command=cd /opt/beit_jax && exec python main.py --config=x.py --a=b\ c "
    assert words[-1] == command
    assert "the variable IMAGE is missing" in call("beit", "--config=x.py", **variables).stderr
