"""Strangers can't reach a guarded port; who is named can."""

import ipaddress
import socket
import subprocess
import sys

import pytest

from beit_jax.config import ConfigError
from beit_jax.data import peers, service


def own_address() -> str:
    """An address of this machine by which it is a stranger to itself."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            pytest.skip("this machine has no network")
        address = probe.getsockname()[0]
    if ipaddress.ip_address(address).is_loopback:
        pytest.skip("this machine has no network")
    return address


@pytest.fixture(params=[socket.AF_INET, socket.AF_INET6], ids=["4", "6"])
def port(request):
    """A port of this process that listens on every interface, as gRPC's do."""
    with socket.socket(request.param) as listening:
        if request.param == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listening.bind(("::" if request.param == socket.AF_INET6 else "0.0.0.0", 0))
        listening.listen()
        yield listening.getsockname()[1]


def reaches(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=0.5).close()
    except TimeoutError:
        return False
    return True


@pytest.mark.parametrize(
    ("allow", "reached"),
    [
        ("", False),
        ("10.98.0.0/16,2001:db8::/32", False),
        ("OWN", True),
        ("10.98.0.0/16,OWN/20", True),
        ("0.0.0.0/0", True),
        ("::/0", False),
        (",".join(f"10.98.{i}.0/24" for i in range(199)) + ",OWN", True),
    ],
)
def test_who_is_not_named_does_not_reach_a_port(port, allow, reached):
    address = own_address()
    assert reaches(address, port)
    network = ipaddress.ip_network(f"{address}/20", strict=False)
    text = allow.replace("OWN/20", str(network)).replace("OWN", address)
    networks = peers.parse_networks(text)
    peers.guard(port, networks)
    assert reaches(address, port) == reached
    assert reaches("127.0.0.1", port)  # this machine always does


def test_addresses_of_version_6_are_compared_in_full():
    """By the program that the kernel runs, run here on a packet's header."""
    networks = peers.parse_networks("2001:db8:1::/48,2001:db8:2::7")
    program = peers._filter(networks)
    for sender, taken in {
        "2001:db8:1:ffff::1": True,
        "2001:db8:2::7": True,
        "2001:db8:2::8": False,
        "2001:db8:3::7": False,
        "::1": False,
    }.items():
        header = bytes([0x60]) + bytes(7) + ipaddress.ip_address(sender).packed
        assert _runs(program, header) == taken, sender


def _runs(program, header: bytes) -> bool:
    value, at = 0, 0
    while True:
        code, yes, no, operand = program[at]
        at += 1
        if code == peers._LOAD_BYTE:
            value = header[operand - peers._HEADER]
        elif code == peers._LOAD_WORD:
            start = operand - peers._HEADER
            value = int.from_bytes(header[start : start + 4], "big")
        elif code == peers._AND:
            value &= operand
        elif code == peers._SHIFT:
            value >>= operand
        elif code == peers._JUMP:
            at += operand
        elif code == peers._JUMP_IF_EQUAL:
            at += yes if value == operand else no
        else:
            return operand > 0


def test_the_networks_of_a_flag():
    assert peers.parse_networks("") == ()
    assert peers.parse_networks("any") is None
    assert peers.parse_networks(" 10.0.0.0/8, 10.0.0.0/8 ,") == (
        ipaddress.ip_network("10.0.0.0/8"),
    )
    assert ipaddress.ip_network("127.0.0.1/32") in peers.parse_networks("localhost")


@pytest.mark.parametrize(
    "text",
    ["10.0.0.1/8", "10.0.0.0/33", "no-such-host.invalid", "a" * 10**5, "a\nb", "é", "*", "x y"],
)
def test_what_is_no_network_is_named_in_one_line(text):
    with pytest.raises(ConfigError, match="--allow: ") as caught:
        peers.parse_networks(text)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 250


def test_a_port_that_nobody_listens_on_can_not_be_guarded():
    with pytest.raises(ConfigError, match="strangers can't be kept from port 1 "):
        peers.guard(1, ())


@pytest.mark.slow
@pytest.mark.parametrize(("allow", "reached"), [((), False), (("--allow=0.0.0.0/0",), True)])
def test_a_service_is_for_this_machine_unless_others_are_named(allow, reached):
    address = own_address()
    command = [sys.executable, "-m", "beit_jax.data.service", "--port=0", *allow]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            said = next(line for line in process.stderr if "config.data.service" in line)
            port = int(said.split(":")[-1].split('"')[0])
            assert reaches("127.0.0.1", port)
            assert reaches(address, port) == reached
        finally:
            process.kill()


@pytest.mark.parametrize(
    "flag", ["--port=70000", "--port=-1", "--allow=10.0.0.1/8", "--address=a b", "--address=a\nb"]
)
def test_wrong_flags_of_a_service_are_one_line(flag, capsys):
    assert service.main([flag]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --")
