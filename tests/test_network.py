"""Tests ask nothing of other machines: conftest.py makes an attempt of Python's sockets fail."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable

import pytest


def connected(address: tuple[str, int]) -> None:
    with socket.socket() as made:
        made.settimeout(0.2)
        made.connect(address)


# Addresses and a name of no machine: kept free for documentation.
REACHING: dict[str, Callable[[], object]] = {
    "connect": lambda: connected(("192.0.2.1", 80)),
    "create_connection": lambda: socket.create_connection(("192.0.2.1", 80), timeout=0.2),
    "name": lambda: socket.create_connection(("nowhere.example", 80), timeout=0.2),
    "bytes": lambda: socket.getaddrinfo(b"nowhere.example", 80),
    "datagram": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"", ("192.0.2.1", 9)),
    "mapped": lambda: socket.getaddrinfo("::ffff:192.0.2.1", 80),
}


@pytest.mark.parametrize("way", REACHING)
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_another_machine_is_not_reached(way: str) -> None:
    """By address or by name; the error is none that a library would pass over."""
    with pytest.raises(AssertionError, match=r"must not reach for the network; it asked for (192|nowhere|::ffff:192)"):
        REACHING[way]()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_this_machine_is_reached(host: str) -> None:
    """Servers of the tests themselves."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection((host, server.getsockname()[1])) as client:
        assert client.getpeername()[0] == "127.0.0.1"


def test_the_hub_is_not_asked() -> None:
    """Here and in subprocesses."""
    constants = pytest.importorskip("huggingface_hub.constants", reason="needs huggingface_hub: pip install 'sparseffn[hf]'")
    assert constants.HF_HUB_OFFLINE and os.environ["HF_HUB_OFFLINE"] == "1"
    code = "from huggingface_hub.constants import HF_HUB_OFFLINE; print(HF_HUB_OFFLINE)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "True\n"
