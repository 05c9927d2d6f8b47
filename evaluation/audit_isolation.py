"""T7: what a scorer reaches for while it scores."""

import os
import socket
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from niblick.evaluation.audit_case import Case
from niblick.evaluation.audit_report import Finding

REACHES_OUT = {
    *(f"socket.{call}" for call in ("connect", "bind", "sendto", "sendmsg")),
    *(f"socket.{call}" for call in ("getaddrinfo", "gethostbyname", "gethostbyaddr", "getnameinfo")),
    *("subprocess.Popen", "os.system", "os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn"),
}
DEVICES = ("null", "zero", "random", "urandom", "nvidia")
"""What names in /dev may begin with. Other places there hold what a process has written, /dev/shm above all."""
_seen: list[list[tuple[str, str]]] = []
_installed: list[bool] = []


def isolation(case: Case) -> list[Finding]:
    """T7. A call opens no file but the artifact's, and neither the network nor another process.

    The interpreter tells of every `open`, connection, fork, and library that is loaded by hand. It does not tell of
    what was read before the call, nor of what compiled code opens by itself; for those, run the evaluation where the
    files and the network are not.
    """
    allowed = {os.path.realpath(path) for path in getattr(case.scorer, "files", ())}
    with _watched() as events:
        case.score(case.tokens)
    findings = []
    for event, what in dict.fromkeys(events):
        if event not in REACHES_OUT and (os.path.realpath(what) in allowed or _is_of_python(what)):
            continue
        findings.append(Finding("R1", f"{event} {what}".rstrip() + " while scoring"))
    return findings[:5]


def _is_of_python(path: str) -> bool:
    """Code of the interpreter or of a library, loaded when first needed, or what the system shows of itself. Code that
    lies elsewhere counts towards the artifact, as all data do."""
    resolved = Path(os.path.realpath(path))
    if resolved.is_relative_to("/dev"):
        return len(resolved.parts) == 3 and resolved.name.startswith(DEVICES)
    if resolved.is_relative_to("/proc"):  # not of another process, whose arguments and memory may be anything
        return not (resolved.parts[2:] and resolved.parts[2].isdigit() and resolved.parts[2] != str(os.getpid()))
    if resolved.is_relative_to("/sys"):
        return True
    roots = {os.path.realpath(root) for root in (sys.prefix, sys.base_prefix, *sysconfig.get_paths().values())}
    return resolved.suffix in (".py", ".pyc", ".so") and any(resolved.is_relative_to(root) for root in roots)


@contextmanager
def _watched() -> Iterator[list[tuple[str, str]]]:
    if not _installed:  # a hook cannot be taken away again
        sys.addaudithook(_hook)
        _installed.append(True)
    events: list[tuple[str, str]] = []
    _seen.append(events)
    try:
        yield events
    finally:
        _seen.remove(events)


def _hook(event: str, arguments: tuple) -> None:
    if not _seen:
        return
    if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        _seen[-1].append((event, os.fsdecode(arguments[0])))
    elif event == "mmap.__new__" and arguments[0] != -1:  # shared memory is opened without a word
        _seen[-1].append((event, os.path.realpath(f"/proc/self/fd/{arguments[0]}")))
    elif event == "ctypes.dlopen":
        _seen[-1].append((event, "the C library" if arguments[0] is None else os.fsdecode(arguments[0])))
    elif event == "ctypes.dlsym" and arguments[0]._name is None and not str(arguments[1]).startswith(("Py", "_Py")):
        _seen[-1].append((event, f"the C library's {arguments[1]}"))  # through what was loaded before the call
    elif event in REACHES_OUT:
        what = [
            str(part) for part in arguments[:2] if not isinstance(part, socket.socket)
        ]  # no environment, which follows
        _seen[-1].append((event, " ".join(what)[:200]))
