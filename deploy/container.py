"""An image's entry point as a container engine would start it, by util-linux and chroot alone."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

USER = 10001


class ContainerError(Exception):
    """It did not get as far as it should have; the message has its log."""


class Container:
    """Process 1 of a PID namespace: its image's user, no capabilities, a read-only root, /tmp and /cache in memory.

    Attributes:
        pid: the process, as it is seen from here.
    """

    def __init__(
        self,
        root: Path,
        settings: dict[str, Any],
        *arguments: str,
        read_only: Mapping[str, Path] | None = None,
        writable: Mapping[str, Path] | None = None,
    ) -> None:
        """Starts it.

        Args:
            root: the image's files.
            settings: the image's entry point, environment and user.
            arguments: the command; without any, the image's own.
            read_only: from a directory of the container to one here.
            writable: the same, for directories that become the container's user's.
        """
        script = [
            f"set -e; mount --bind {root} {root}; mount -o remount,bind,ro {root}",
            f"mount -t tmpfs tmpfs {root}/tmp; mount -t proc proc {root}/proc; mount --rbind /dev {root}/dev",
        ]
        if (root / "cache").exists():
            script.append(f"mount -t tmpfs -o uid={USER},gid={USER} tmpfs {root}/cache")
        for inside, here in (read_only or {}).items():
            script.append(f"mount --bind {here} {root}{inside}; mount -o remount,bind,ro {root}{inside}")
        for inside, here in (writable or {}).items():
            os.chown(here, USER, USER)
            script.append(f"mount --bind {here} {root}{inside}")
        inherited = " ".join(f"'{variable}'" for variable in settings["Env"])
        script.append(f"""exec chroot --userspec={settings["User"]} --groups= {root} env -i {inherited} "$@" """)
        command = [*settings["Entrypoint"], *(arguments or settings["Cmd"])]
        self._unshare = subprocess.Popen(
            ["unshare", "--mount", "--pid", "--fork", "sh", "-c", "\n".join(script), "sh", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._log: list[str] = []
        self._serving = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    @property
    def log(self) -> str:
        """What it has written to stdout and stderr so far; after `wait`, all of it."""
        return "".join(self._log)

    @property
    def pid(self) -> int:
        """The process, as it is seen from here."""
        return int(Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children").read_text("utf-8"))

    def url(self, seconds: float = 120) -> str:
        """Where it listens, once it does.

        Raises:
            ContainerError: it ended before, or took too long.
        """
        if not self._serving.wait(seconds) or not (found := re.search(r"serving .* at (http[^\s;]+)", self.log)):
            self.close()
            raise ContainerError(f"the server did not start:\n{self.log}")
        return found[1].replace("0.0.0.0", "127.0.0.1")

    def status(self) -> dict[str, str]:
        """/proc/PID/status of the process."""
        lines = Path(f"/proc/{self.pid}/status").read_text("utf-8").splitlines()
        return dict(line.split(":\t", 1) for line in lines if ":\t" in line)

    def wait(self, seconds: float) -> int:
        """Its exit code."""
        code = self._unshare.wait(timeout=seconds)
        self._reader.join()
        return code

    def close(self) -> None:
        """Ends it, if it is still there."""
        # Process 1 itself: it has changed its user, and so does not die with its parent.
        with contextlib.suppress(ProcessLookupError, FileNotFoundError, ValueError):
            os.kill(self.pid, signal.SIGKILL)
        self._unshare.wait()
        self._reader.join()

    def __enter__(self) -> Container:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> None:
        assert self._unshare.stdout is not None
        for line in self._unshare.stdout:
            self._log.append(line)
            if re.search(r"serving .* at http", line):
                self._serving.set()
        self._serving.set()
