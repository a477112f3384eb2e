"""Two hosts on one machine: network namespaces joined by a cable, each with a host name of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# reaches a host like ssh would: address, then a line for its shell
_REACH = """#!/bin/bash
case $1 in {addresses[0]}) name={names[0]} ;; {addresses[1]}) name={names[1]} ;; *) exit 255 ;; esac
exec ip netns exec "$name" unshare --uts bash -c "hostname $name; $2"
"""


@dataclass(frozen=True)
class TwoHosts:
    """What tells them apart.

    Attributes:
        names: of hosts, and of their namespaces.
        addresses: by which they know each other.
        interfaces: the ends of the cable.
        reach: program that runs a shell line on a host: `reach ADDRESS LINE`.
    """

    names: tuple[str, str]
    addresses: tuple[str, str]
    interfaces: tuple[str, str]
    reach: Path


def missing() -> str:
    """Why there can be no such hosts here; empty if there can."""
    if os.geteuid() != 0:
        return "needs root"
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "not installed: ip, unshare (Debian: iproute2, util-linux)"
    name = f"hstu-probe-{os.getpid()}"
    try:
        _ip("netns", "add", name)
        _ip("netns", "delete", name)
        subprocess.run(["unshare", "--uts", "true"], check=True, capture_output=True)
    except subprocess.CalledProcessError:
        return "network namespaces are not allowed here"
    return ""


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[TwoHosts]:
    """Makes the hosts and removes them."""
    number = os.getpid() % 250
    hosts = TwoHosts(
        names=(f"hstu-a-{number}", f"hstu-b-{number}"),
        addresses=(f"10.213.{number}.1", f"10.213.{number}.2"),
        interfaces=(f"hstuva{number}", f"hstuvb{number}"),
        reach=folder / "reach",
    )
    hosts.reach.write_text(_REACH.format(names=hosts.names, addresses=hosts.addresses))
    hosts.reach.chmod(0o755)
    with contextlib.ExitStack() as stack:
        for name in hosts.names:
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "delete", name)
        first, second = hosts.interfaces
        ends = ("type", "veth", "peer", "name", second, "netns", hosts.names[1])
        _ip("link", "add", first, "netns", hosts.names[0], *ends)
        for name, address, interface in zip(hosts.names, hosts.addresses, hosts.interfaces, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", interface)
            _ip("-n", name, "link", "set", interface, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield hosts


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
