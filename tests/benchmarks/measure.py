"""Whole processes and whole files, measured from outside. Standard library only.

Linux counts the memory of the parent at the moment of ``exec`` into the child's peak, so the
process that measures must stay small: it imports neither numpy nor torch, and everything that needs
them runs in a child.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

BUFFER_BYTES = 8 * 2**20
_SAMPLE_SECONDS = 0.02


@dataclass(frozen=True)
class Cost:
    """What one process (or several, one after the other) cost.

    Attributes:
        wall_seconds, cpu_seconds: elapsed, and user plus system time.
        peak_bytes: largest resident set, ``ru_maxrss``; pages of mapped files count.
        peak_anonymous_bytes: largest memory that is no page of a file, sampled every 20 ms; None
            where ``/proc`` is not.
        dirtied_bytes: pages made dirty on file systems with a disk, ``ru_oublock``.
        left_bytes: size of the files that it left.
    """

    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int
    peak_anonymous_bytes: int | None
    dirtied_bytes: int
    left_bytes: int = 0

    def then(self, other: Cost) -> Cost:
        """The cost of this and then the other: times and bytes add, peaks do not."""
        anonymous = [
            c.peak_anonymous_bytes for c in (self, other) if c.peak_anonymous_bytes is not None
        ]
        return Cost(
            self.wall_seconds + other.wall_seconds,
            self.cpu_seconds + other.cpu_seconds,
            max(self.peak_bytes, other.peak_bytes),
            max(anonymous, default=None),
            self.dirtied_bytes + other.dirtied_bytes,
            self.left_bytes + other.left_bytes,
        )


def run(
    command: Sequence[str | Path], log: Path, leaves: Iterable[Path] = (), cwd: Path | None = None
) -> Cost:
    """Run ``command`` to its end, output appended to ``log``; ``leaves`` are the files or folders
    that it makes.

    Raises:
        SystemExit: the command failed; the end of its output is in the message.
    """
    arguments = [str(word) for word in command]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("ab") as output:
        began = time.perf_counter()
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            cwd=cwd,
        )
        sampler = _AnonymousMemory(process.pid)
        sampler.start()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
        sampler.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise SystemExit(f"exit status {process.returncode}: {' '.join(arguments)}\n{tail}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Cost(
        wall_seconds=wall,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_bytes=usage.ru_maxrss * unit,
        peak_anonymous_bytes=sampler.peak_bytes,
        dirtied_bytes=usage.ru_oublock * 512,
        left_bytes=sum(size_of(path) for path in leaves),
    )


def output_of(command: Sequence[str | Path], log: Path) -> str:
    """Standard output of a command that is not timed; its standard error goes to ``log``.

    Raises:
        SystemExit: the command failed.
    """
    with log.open("ab") as errors:
        done = subprocess.run(
            [str(word) for word in command],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            check=False,
        )
    if done.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise SystemExit(f"exit status {done.returncode}: {' '.join(map(str, command))}\n{tail}")
    return done.stdout


class _AnonymousMemory(threading.Thread):
    """Follows ``RssAnon`` of a process until it ends (then the field is gone)."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.peak_bytes: int | None = None
        self._status = Path(f"/proc/{pid}/status")

    def run(self) -> None:
        while True:
            try:
                lines = self._status.read_text().splitlines()
            except OSError:
                return
            now = next(
                (int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), None
            )
            if now is None:
                return
            self.peak_bytes = max(now, self.peak_bytes or 0)
            time.sleep(_SAMPLE_SECONDS)


def size_of(path: Path) -> int:
    """Bytes of a file, or of every file below a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(
        os.lstat(os.path.join(folder, name)).st_size
        for folder, _, names in os.walk(path)
        for name in names
    )


def read_once(files: Iterable[Path]) -> float:
    """Seconds to read the files one after the other into one reused buffer: what no program can be
    faster than.
    """
    buffer = bytearray(BUFFER_BYTES)
    began = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - began


def write_once(path: Path, num_bytes: int) -> float:
    """Seconds of processor time to write a new file of ``num_bytes`` from one reused buffer,
    without waiting for the disk.
    """
    buffer = memoryview(os.urandom(BUFFER_BYTES))
    began = time.process_time()
    with path.open("wb", buffering=0) as file:
        for start in range(0, num_bytes, BUFFER_BYTES):
            file.write(buffer[: num_bytes - start])
    elapsed = time.process_time() - began
    path.unlink()
    return elapsed


def forget(files: Iterable[Path]) -> None:
    """Ask the system to drop the files from its page cache (only pages that are not dirty
    leave).
    """
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def memory_bytes() -> int:
    """Physical memory of the machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def machine() -> dict[str, str | int]:
    """Processor, cores, memory and the versions that matter."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip()
            for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")
        ]
        model = names[0] if names else model
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    packages = ("numpy", "scipy", "torch", "transformers", "safetensors", "zarr", "relexkit")
    return {
        "processor": model,
        "cores": cores,
        "memory_bytes": memory_bytes(),
        "system": platform.platform(),
        "load_before": f"{os.getloadavg()[0]:.2f}",
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def remove(*paths: Path) -> None:
    """Delete files or folders, whether they exist or not."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
