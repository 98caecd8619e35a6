"""Finding a cluster, introductions and what they refuse; in threads, without JAX's cluster."""

import concurrent.futures
import json
import socket
import threading
import time

import jax
import pytest

from beit_jax.config import ConfigError
from beit_jax.distributed import cluster, collectives, session
from beit_jax.distributed.cluster import Settings
from beit_jax.distributed.discovery import Membership, find_membership
from beit_jax.distributed.handshake import describe_differences, introduce
from tests.distributed.processes import free_port

FACTS = {"config": {"run": {"seed": 0}}, "version": {"jax": "0.10.2"}}


def test_settings_come_before_variables_and_without_both_a_process_is_alone():
    member = Membership(address="a:1", count=4, index=2)
    flags = Settings(coordinator_address="a:1", num_processes=4, process_id=2)
    variables = {
        "JAX_COORDINATOR_ADDRESS": "a:1",
        "JAX_NUM_PROCESSES": "4",
        "JAX_PROCESS_ID": "2",
    }
    assert find_membership(flags, {}) == member
    assert find_membership(Settings(), variables) == member
    assert find_membership(flags, variables | {"JAX_PROCESS_ID": "3"}) == member
    assert find_membership(Settings(), {}) is None
    assert find_membership(Settings(multihost="no"), variables) is None
    # One process is no cluster, unless it is asked for.
    one = Settings(coordinator_address="a:1", num_processes=1, process_id=0)
    assert find_membership(one, {}) is None


@pytest.mark.parametrize(
    ("settings", "environment", "message"),
    [
        ({"multihost": "yes"}, {}, r"no cluster that JAX knows .* --coordinator_address"),
        ({"coordinator_address": "a:1", "num_processes": 2}, {}, r"not given: --process_id"),
        ({}, {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_PROCESS_ID": "x"}, "JAX_PROCESS_ID: must be"),
        ({"coordinator_address": "a", "num_processes": 2, "process_id": 0}, {}, "is not host:port"),
        *(
            (
                {"coordinator_address": address, "num_processes": 2, "process_id": 0},
                {},
                r"^--coordinator_address: .* is not host:port with a port from 1 to 65535$",
            )
            for address in ("localhost:99999", "localhost:abc", "localhost:0", ":1", "a b:1", "x:")
        ),
        ({"coordinator_address": "a:1", "num_processes": 2, "process_id": 2}, {}, "2 is not one"),
        # A run that was meant to be one of several is none on its own.
        ({"num_processes": 2}, {}, r"^--num_processes: no cluster .* --coordinator_address"),
        ({"process_id": 1}, {}, r"^--num_processes: no cluster .* --coordinator_address"),
    ],
)
def test_an_incomplete_description_of_a_cluster_is_an_error(settings, environment, message):
    with pytest.raises(ConfigError, match=message):
        find_membership(Settings(**settings), environment)


def test_a_slurm_step_is_found(monkeypatch):
    variables = {
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_NODELIST": "node[03-04]",
        "SLURM_NTASKS": "8",
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    member = find_membership(Settings())
    assert (member.count, member.index, member.local_device_ids) == (8, 5, (1,))
    assert member.address.startswith("node03:")


def test_a_wrong_setting_is_named():
    for settings, name in (
        ({"multihost": "maybe"}, "--multihost"),
        ({"platform": "abacus"}, "--platform"),
        ({"heartbeat_timeout": 0.0}, "--heartbeat_timeout"),
        ({"heartbeat_timeout": -1.0}, "--heartbeat_timeout"),
        ({"start_timeout": float("nan")}, "--start_timeout"),
        ({"barrier_timeout": float("inf")}, "--barrier_timeout"),
        ({"num_processes": 2**63}, "--num_processes"),
        ({"process_id": 2**63}, "--process_id"),
    ):
        with pytest.raises(ConfigError, match=name):
            Settings(**settings)


def meet(hellos, *, count=None, timeout=20.0):
    """Introduces processes (index → facts) to each other; returns index → result or error."""
    address = f"127.0.0.1:{free_port()}"
    count = count or len(hellos)

    def one(index):
        member = Membership(address=address, count=count, index=index)
        try:
            return introduce(member, hellos[index], timeout=timeout)
        except (ConfigError, cluster.ClusterError) as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(len(hellos)) as pool:
        return dict(zip(hellos, pool.map(one, hellos), strict=True))


def test_introductions_give_every_process_all_host_names():
    results = meet({i: FACTS for i in range(5)})
    assert set(results.values()) == {(socket.gethostname(),) * 5}


def test_every_process_is_told_what_differs_and_where():
    """A setting, a library that is newer, one that is absent."""
    other = {"config": {"run": {"seed": 1}}, "version": {"jax": "0.10.3", "libtpu": "1"}}
    results = meet({0: FACTS, 1: other, 2: FACTS})
    host = socket.gethostname()
    expected = (
        f"hosts disagree: config.run.seed: 0 on processes 0 ({host}), 2 ({host}), 1 on process 1"
        f" ({host}); version.jax: '0.10.2' on processes 0 ({host}), 2 ({host}), '0.10.3' on process"
        f" 1 ({host}); version.libtpu: absent on processes 0 ({host}), 2 ({host}), '1' on process 1"
        f" ({host})"
    )
    for error in results.values():
        assert isinstance(error, ConfigError)
        assert str(error) == expected


def test_differences_between_many_hosts_are_one_short_line():
    facts = {i: {"a": int(i > 1)} for i in range(300)}
    line = describe_differences(facts, hosts=[f"h{i}" for i in range(300)])
    assert line == (
        "hosts disagree: a: 0 on processes 0 (h0), 1 (h1), 1 on processes 2 (h2), 3 (h3), 4 (h4),"
        " 5 (h5) and 294 more"
    )


def test_missing_processes_are_named_when_the_time_is_up(monkeypatch):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "w0,w1,w2,w3")
    began = time.monotonic()
    results = meet({0: FACTS, 2: FACTS}, count=4, timeout=1.5)
    assert time.monotonic() - began < 10
    for error in results.values():
        assert isinstance(error, cluster.ClusterError)
        assert str(error) == (
            "2 of 4 processes did not start within 2 s: process 1 (w1), 3 (w3); is the command"
            " running on every host?"
        )


def test_a_missing_process_0_is_reported():
    results = meet({1: FACTS}, count=2, timeout=0.5)
    assert "no answer from process 0 at 127.0.0.1" in str(results[1])


def test_a_port_in_use_is_reported():
    with socket.create_server(("", 0)) as server:
        member = Membership(address=f"127.0.0.1:{server.getsockname()[1]}", count=2, index=0)
        with pytest.raises(cluster.ClusterError, match=r"can't listen on port .* earlier run"):
            introduce(member, FACTS, timeout=1.0)


def test_strangers_on_the_port_are_ignored():
    """A scanner, and a process of an earlier run that says nothing."""
    port = free_port()

    def strangers():
        for word in (b"GET / HTTP/1.1\r\n\r\n", b"\n", b'{"hello": "you"}\n', b""):
            while True:
                try:
                    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
                        connection.sendall(word)
                    break
                except ConnectionRefusedError:
                    time.sleep(0.01)
        introduce(Membership(address=f"127.0.0.1:{port}", count=2, index=1), FACTS, timeout=10.0)

    thread = threading.Thread(target=strangers)
    thread.start()
    hosts = introduce(
        Membership(address=f"127.0.0.1:{port}", count=2, index=0), FACTS, timeout=10.0
    )
    thread.join()
    assert len(hosts) == 2


def test_two_processes_with_the_same_number_are_refused():
    address = f"127.0.0.1:{free_port()}"

    def one(index):
        try:
            introduce(Membership(address=address, count=3, index=index), FACTS, timeout=10.0)
        except ConfigError as error:
            return str(error)

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        errors = list(pool.map(one, [0, 1, 1]))
    assert all("say that they are process 1" in error for error in errors)


def test_the_code_version_depends_on_every_python_file_and_no_other(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    first = cluster.code_version(tmp_path)
    (tmp_path / "note.txt").write_text("not code")
    assert cluster.code_version(tmp_path) == first
    (tmp_path / "a.py").write_text("x = 2\n")
    assert cluster.code_version(tmp_path) != first
    assert len(cluster.code_version()) == 12


def test_a_tpu_that_jax_does_not_use_is_an_error():
    tpu_host = {"TPU_WORKER_HOSTNAMES": "a,b"}
    with pytest.raises(ConfigError, match=r"expected tpu \(--platform=tpu\).* found cpu; is jax"):
        cluster.check_platform("tpu", {})
    with pytest.raises(ConfigError, match=r"expected tpu \(TPU_WORKER_HOSTNAMES is set\)"):
        cluster.check_platform("any", tpu_host)
    cluster.check_platform("any", tpu_host | {"JAX_PLATFORMS": "cpu"})
    cluster.check_platform("any", {})
    cluster.check_platform("cpu", {})


def test_the_coordination_services_message_becomes_host_names(monkeypatch):
    """Its message as jaxlib 0.10.2 words it."""
    message = (
        "DEADLINE_EXCEEDED: Barrier timed out. Id: x::0. This usually happens because a task"
        " triggered the barrier too early or too slowly.\n# of tasks that reached the barrier:"
        " 1/3.\nThe first task at the barrier: 0. Some timed out task names:\n2\n1\n\n\nRPC: /xla"
    )
    monkeypatch.setattr(session.session, "hosts", ("h0", "h1", "h2"))
    assert collectives.absent(message) == "missing: processes 1 (h1), 2 (h2)"
    assert (
        collectives.absent("INTERNAL: odd\nmore") == "the coordination service says: INTERNAL: odd"
    )


def test_a_process_alone_does_not_wait():
    assert jax.process_count() == 1
    cluster.barrier("here")
    assert cluster.gather("x", {"a": 1}) == [{"a": 1}]
    cluster.check_agreement("x", json.dumps(1))
    assert not cluster.preemption_point()
    assert cluster.end(code=0) == 0
