"""T7 of the audit: ways out of the process that a scorer may try, and what it may open."""

import ctypes
import os
import socket
import subprocess
import sys
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import audit_cheats as cheats
import numpy as np
import pytest

from niblick.evaluation.audit_case import Case, make_stream
from niblick.evaluation.audit_isolation import isolation

STREAM = make_stream(cheats.V, n=20)
C_LIBRARY = ctypes.CDLL(None)


def another_process():
    subprocess.run([sys.executable, "-c", ""], check=True)


def connection():
    with socket.socket() as tcp:
        tcp.connect_ex(("127.0.0.1", 9))


def datagram():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.sendto(b"x", ("127.0.0.1", 9))


def fork():
    if (child := os.fork()) == 0:
        os._exit(0)
    os.waitpid(child, 0)


def c_library():
    ctypes.CDLL(None).getpid()


def c_library_loaded_before():
    C_LIBRARY.getppid()


def shared_memory():
    memory = SharedMemory(create=True, size=16)
    memory.close()
    memory.unlink()


def found_in(reach) -> list[str]:
    def scorer(tokens):
        reach()
        return cheats.Honest()(tokens)

    case = Case(scorer, STREAM, cheats.V, 1, np.zeros(len(STREAM)), None)
    return [finding.evidence for finding in isolation(case)]


WAYS_OUT = {
    another_process: f"subprocess.Popen {sys.executable} ['{sys.executable}', '-c', '']",
    connection: "socket.connect ('127.0.0.1', 9)",
    datagram: "socket.sendto ('127.0.0.1', 9)",
    fork: "os.fork",
    c_library: "ctypes.dlopen the C library",
    c_library_loaded_before: "ctypes.dlsym the C library's getppid",
    shared_memory: "mmap.__new__ /dev/shm/psm_",
}


@pytest.mark.parametrize("way", WAYS_OUT, ids=lambda way: way.__name__)
def test_ways_out_are_seen(way):
    assert any(evidence.startswith(WAYS_OUT[way]) for evidence in found_in(way)), found_in(way)


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/dev/null", True),
        ("/dev/urandom", True),
        ("/proc/self/status", True),
        ("/proc/self/cwd/secret", False),
        ("/proc/cpuinfo", True),
        ("/proc/1/status", False),
        ("/dev/shm/{}", False),
        (os.__file__, True),
        (__file__, False),
    ],
)
def test_what_may_be_opened(path, allowed, monkeypatch, tmp_path):
    path = path.format(f"niblick-{os.getpid()}")
    monkeypatch.chdir(tmp_path)
    try:
        if "/shm/" in path or "secret" in path:
            Path(path).write_text("x")
        expected = [] if allowed else [f"open {path} while scoring"]
        assert found_in(lambda: open(path, "rb").close()) == expected
    finally:
        if "/shm/" in path:
            Path(path).unlink(missing_ok=True)
