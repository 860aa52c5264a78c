"""What all tests share."""

from __future__ import annotations

import functools
import ipaddress
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from sparseffn.storage import default_cache_dir

CHROMIUM = Path("/usr/bin/chromium")
CHROMEDRIVER = Path("/usr/bin/chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1200,900",
)


# What huggingface_hub may ask for, which it reads when it is imported; subprocesses inherit it.
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY")
os.environ.update(dict.fromkeys(OFFLINE, "1"))


# Files that take longest. They come first, so that none is left for one process at the end while the other waits.
LONGEST = (
    "test_triton_numerics.py",
    "test_several_processes.py",
    "test_cpu_mutants.py",
    "test_compare.py",
    "test_torture.py",
    "test_browser.py",
    "test_methods.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order of files is the suite's own; within a file nothing moves."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_addoption(parser: pytest.Parser) -> None:
    """A limit of time for machines that are several times slower than expected."""
    parser.addoption(
        "--minutes", type=float, help="tests that have not begun after so many are skipped, and counted at the end"
    )


_BEGUN = time.monotonic()
_NOT_BEGUN = "not begun within the time of this run (--minutes)"


def _seconds_left(config: pytest.Config) -> float:
    """Infinite where there is no limit."""
    minutes = config.getoption("--minutes")
    return math.inf if minutes is None else 60 * minutes - (time.monotonic() - _BEGUN)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before anything that the test needs is made."""
    if _seconds_left(item.config) < 0:
        pytest.skip(_NOT_BEGUN)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what the limit cost: a run that passed has not tested this."""
    n = sum(_NOT_BEGUN in str(report.longrepr) for report in terminalreporter.stats.get("skipped", []))
    if n:
        terminalreporter.write_line(f"{n} tests were NOT RUN: {_NOT_BEGUN}", red=True)


@pytest.fixture(scope="session")
def seconds_left(pytestconfig: pytest.Config) -> Callable[[], float]:
    """For what computes many tests' outcomes at once."""
    return functools.partial(_seconds_left, pytestconfig)


@pytest.fixture(scope="session")
def not_begun() -> Callable[[], NoReturn]:
    """What a test calls whose outcome there was no time for."""
    return functools.partial(pytest.skip, _NOT_BEGUN)


def pytest_configure(config: pytest.Config) -> None:
    """No other machine for the Python sockets of this process."""
    patch = pytest.MonkeyPatch()
    config.add_cleanup(patch.undo)
    # A proxy on this machine would pass everything on.
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        patch.delenv(name, raising=False)
        patch.delenv(name.upper(), raising=False)
    for name in ("connect", "connect_ex", "sendto"):
        patch.setattr(socket.socket, name, _guarded(getattr(socket.socket, name)))
    resolve = socket.getaddrinfo

    def resolved(host: Any, *args: Any, **named: Any) -> Any:
        _refuse_other_machines(host)
        return resolve(host, *args, **named)

    patch.setattr(socket, "getaddrinfo", resolved)


def _guarded(plain: Callable[..., Any]) -> Callable[..., Any]:
    """A socket's method, whose last argument is an address, for this machine alone."""

    def call(self: socket.socket, *args: Any) -> Any:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            _refuse_other_machines(args[-1][0])
        return plain(self, *args)

    return call


def _refuse_other_machines(host: Any) -> None:
    """Raise an error that is no OSError: libraries take that for a network that is down, and go on."""
    name = host.decode() if isinstance(host, bytes) else str(host or "localhost")
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
        address = getattr(address, "ipv4_mapped", None) or address
        own = address.is_loopback or address.is_unspecified or str(address) in _own_addresses()
    except ValueError:
        own = name in ("localhost", "localhost.localdomain", socket.gethostname(), socket.getfqdn())
    if not own:
        raise AssertionError(f"a test must not reach for the network; it asked for {name}")


@functools.cache
def _own_addresses() -> tuple[str, ...]:
    """What this machine's name stands for."""
    try:
        return tuple(socket.gethostbyname_ex(socket.gethostname())[2])
    except OSError:
        return ()


@pytest.fixture(autouse=True)
def _own_random_state() -> Iterator[None]:
    """Each test starts from one generator state and leaves the next one's alone."""
    state = torch.get_rng_state()
    torch.manual_seed(42)
    yield
    torch.set_rng_state(state)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Token files go to a folder of the session, never to the user's cache; compiled kernels are the user's own."""
    cache, kernels = tmp_path_factory.mktemp("cache"), default_cache_dir() / "kernels"
    # Named after their sources, flags, compiler and processor, they cannot be wrong, and take a minute to compile.
    kernels.mkdir(parents=True, exist_ok=True)
    (cache / "kernels").symlink_to(kernels, target_is_directory=True)
    before = os.environ.get("SPARSEFFN_CACHE")
    os.environ["SPARSEFFN_CACHE"] = str(cache)
    yield
    if before is None:
        del os.environ["SPARSEFFN_CACHE"]
    else:
        os.environ["SPARSEFFN_CACHE"] = before


@pytest.fixture(scope="session")
def lacks() -> Callable[[str], NoReturn]:
    """What a test calls, with what it needs, where a tool is not there: it skips at home and fails in CI."""
    return pytest.fail if os.environ.get("CI") else pytest.skip


@pytest.fixture
def browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacks: Callable[[str], NoReturn]) -> Iterator[Any]:
    """Debian's chromium with an empty profile."""
    if not (CHROMIUM.exists() and CHROMEDRIVER.exists()):
        lacks(f"needs {CHROMIUM} and {CHROMEDRIVER} (Debian: chromium, chromium-driver)")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    # Selenium looks for a browser to download only when it is not told where one is; this forbids it even then.
    monkeypatch.setenv("SE_OFFLINE", "true")
    monkeypatch.setenv("SE_AVOID_STATS", "true")
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(str(CHROMEDRIVER)))
    yield driver
    driver.quit()
