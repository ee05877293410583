"""Atomic writing of files, and locks on folders.

Works for names of any length and encoding: temporary names are short and do not contain the target's.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path

# Errors of systems that do not support an operation.
_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
_FORBIDDEN = {errno.EACCES, errno.EPERM}
_LOCK = "lock"
_LONGEST_NAME = 255  # bytes
# Folders that this process has locked, since the system's locks exclude other processes only.
_held: set[Path] = set()


def temporary_name(target: Path) -> Path:
    """A new, hidden name beside `target`."""
    return target.with_name(f".iddpm-{secrets.token_hex(6)}.tmp")


def beside(target: Path, suffix: str) -> Path:
    """The path of `target` with a suffix; if its name would be too long, a digest replaces the name."""
    name = os.fsencode(target.name) + suffix.encode()
    if len(name) > _LONGEST_NAME:
        name = hashlib.sha256(name).hexdigest().encode() + suffix.encode()
    return target.with_name(os.fsdecode(name))


def write_whole(target: Path, data: bytes) -> None:
    """Writes `data` to a temporary name beside `target`, flushes it to disk and renames it.

    The mode is 0666 without the umask's bits. Raises OSError, after removing the temporary file.
    """
    with replacing(target) as temporary:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A context with a temporary path, at which it writes a file or a folder that then becomes `target`.

    It is flushed to disk before it is renamed, and removed if writing or renaming fails.
    """
    temporary = temporary_name(target)
    try:
        yield temporary
        for path in (temporary, *temporary.rglob("*")):
            flush(path)
        os.replace(temporary, target)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        raise
    flush(target.parent)


def flush(path: Path) -> None:
    """Flushes the content of a file, or the names in a folder, to disk.

    Warns if the system does not support that for this path. Raises OSError if flushing fails.
    """
    if os.name != "posix":
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED | _FORBIDDEN:
            raise
        warnings.warn(
            f"{path} cannot be flushed to disk ({error.strerror}): it is written, but a power cut "
            "within the next seconds may lose it",
            stacklevel=3,
        )


def cache_folder() -> Path | None:
    """The folder of this package in the user's cache (XDG_CACHE_HOME); None for a user without a home."""
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base, "iddpm_ext")
    try:
        return Path.home() / ".cache" / "iddpm_ext"
    except RuntimeError:  # no HOME, and an id without a name
        return None


@contextlib.contextmanager
def locked(folder: Path, who: str) -> Iterator[None]:
    """A context that locks `folder`, created if absent, for this process.

    The system releases the lock when the process ends, however it ends. A folder that was created here and is
    still empty is removed at the end.

    who: the function, for errors.
    Raises RuntimeError if another process holds the lock, OSError if the folder cannot be written. Warns if
    the file system does not support locks.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.resolve() / _LOCK
    if path in _held:
        raise RuntimeError(_refusal(who, folder, "this process"))
    descriptor = _lock(path, who, folder)
    _held.add(path)
    try:
        yield
    finally:
        _held.discard(path)
        # Removed while locked: a process that opened it meanwhile notices that it is another file.
        path.unlink(missing_ok=True)
        os.close(descriptor)
        for empty in made:
            with contextlib.suppress(OSError):
                empty.rmdir()


def _lock(path: Path, who: str, folder: Path) -> int:
    """The descriptor of the lock file, which holds the lock while it is open."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _try_lock(descriptor)
        except OSError as error:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            os.close(descriptor)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise RuntimeError(_refusal(who, folder, holder or "another process")) from None
            raise
        try:
            same = os.path.samestat(os.fstat(descriptor), os.stat(path))
        except FileNotFoundError:
            same = False
        if same:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            return descriptor
        os.close(descriptor)  # the previous holder has just removed this file


def _try_lock(descriptor: int) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        reason = "this system has no such locks"
    else:
        try:
            # A lock of the process, not of the open file: worker processes do not keep it after a kill.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            reason = str(error.strerror)
    warnings.warn(
        f"the folder cannot be locked ({reason}): take care that no second run works in it",
        stacklevel=5,
    )


def _refusal(who: str, folder: Path, holder: str) -> str:
    return f"{who}: out must be in use by no other run, got {folder}, which {holder} works in"
