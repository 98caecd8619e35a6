"""Who may connect to a port of this process: this machine, and the networks that are named.

    guard(5050, parse_networks("10.0.0.0/8,trainer-1"))

The servers of tf.data listen on all interfaces and ask nobody who they are, and who may talk to
them can run any TensorFlow graph, which reads and writes files. No setting of theirs changes that.
So a filter (BPF, as of tcpdump) is attached to the sockets they listen on: the kernel drops packets
from anyone else, to whom the port looks as if no machine were there.
"""

import ctypes
import ipaddress
import os
import socket
import struct
import sys
from collections.abc import Iterator, Sequence
from typing import TypeAlias

from beit_jax.config import ConfigError
from beit_jax.config.parse import shown

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network
_Instruction: TypeAlias = tuple[int, int, int, int]  # code, jump if true, if false, operand

ANYONE = "any"
_MOST = 200  # networks; a filter has at most 4096 instructions, and a network takes up to 13
_LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128"))
_ATTACH_FILTER = 26  # SO_ATTACH_FILTER of Linux, which Python's socket does not name
# Instructions of classic BPF (linux/bpf_common.h), and where a packet's network header begins.
_LOAD_BYTE, _LOAD_WORD, _AND, _SHIFT = 0x30, 0x20, 0x54, 0x74
_JUMP_IF_EQUAL, _JUMP, _RETURN = 0x15, 0x05, 0x06
_HEADER = 0xFFF00000
_SOURCE = {4: 12, 6: 8}  # where the address of the sender is in it
_TAKE, _DROP = (_RETURN, 0, 0, 0xFFFFFFFF), (_RETURN, 0, 0, 0)


def parse_networks(text: str) -> tuple[Network, ...] | None:
    """The networks of a flag: addresses, networks and host names with commas between them.

    Args:
      text: "" for this machine alone, "any" for everybody.

    Returns:
      The networks; None for everybody.

    Raises:
      ConfigError: something is none of these, or a name can't be resolved.
    """
    if text.strip() == ANYONE:
        return None
    networks: list[Network] = []
    for name in filter(None, (part.strip() for part in text.split(","))):
        try:
            networks.append(ipaddress.ip_network(name))
            continue
        except ValueError as error:
            if "/" in name or "host bits" in str(error):
                raise ConfigError(f"--allow: {shown(name)} is no network: {error}") from None
        try:
            found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or "no name"
            raise ConfigError(f"--allow: {shown(name)} is no address or host: {why}") from None
        networks += [ipaddress.ip_network(entry[4][0]) for entry in found]
    networks = list(dict.fromkeys(networks))
    if len(networks) > _MOST:
        raise ConfigError(f"--allow: {len(networks)} networks are more than {_MOST}")
    return tuple(networks)


def guard(port: int, networks: Sequence[Network]) -> None:
    """From now on lets nobody but this machine and `networks` connect to a port of this process.

    Raises:
      ConfigError: this system has no such filters.
    """
    instructions = _filter((*_LOOPBACK, *networks))
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in instructions)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HP", len(instructions), ctypes.addressof(buffer))
    guarded = 0
    try:
        for listening in _listening(port):
            listening.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, program)
            guarded += 1
    except OSError as error:
        raise _unguarded(port, error.strerror or str(error)) from None
    if not guarded:
        raise _unguarded(port, f"not known on {sys.platform}")


def _unguarded(port: int, why: str) -> ConfigError:
    return ConfigError(
        f"--allow: strangers can't be kept from port {port} here ({why}); --allow={ANYONE} serves"
        " everybody who can reach it, so let a firewall see to it"
    )


def _listening(port: int) -> Iterator[socket.socket]:
    """The sockets of this process that listen on a port; gRPC may have several for one."""
    folder = "/proc/self/fd"
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        try:
            descriptor = os.dup(int(name))
        except OSError:  # closed meanwhile
            continue
        try:
            copy = socket.socket(fileno=descriptor)
        except OSError:  # no socket
            os.close(descriptor)
            continue
        with copy:
            if copy.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            listens = copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if listens and copy.getsockname()[1] == port:
                yield copy


def _filter(networks: Sequence[Network]) -> list[_Instruction]:
    """A program that takes packets from the networks and drops others."""
    old, new = (_of_version(networks, version) for version in (4, 6))
    return [
        (_LOAD_BYTE, 0, 0, _HEADER),
        (_SHIFT, 0, 0, 4),
        (_JUMP_IF_EQUAL, 1, 0, 4),
        (_JUMP, 0, 0, len(old)),
        *old,
        *new,
    ]


def _of_version(networks: Sequence[Network], version: int) -> list[_Instruction]:
    program: list[_Instruction] = []
    for network in networks:
        if network.version != version:
            continue
        size = network.max_prefixlen // 8
        wanted = struct.unpack(f">{size // 4}I", network.network_address.packed)
        masks = struct.unpack(f">{size // 4}I", network.netmask.packed)
        words = [(i, w, m) for i, (w, m) in enumerate(zip(wanted, masks, strict=True)) if m]
        for left, (i, word, mask) in zip(range(len(words), 0, -1), words, strict=True):
            program += [
                (_LOAD_WORD, 0, 0, _HEADER + _SOURCE[version] + 4 * i),
                (_AND, 0, 0, mask),
                (_JUMP_IF_EQUAL, 0, 3 * (left - 1) + 1, word),  # else to the next network
            ]
        program.append(_TAKE)
    return [*program, _DROP]
