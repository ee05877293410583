"""Files that appear under their name whole or not at all, and folders that one process works in.

Nothing here depends on how long a name is, or on its being UTF-8: temporary names are short and our own.
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

# What a system answers that does not do what is asked, rather than fails at it.
_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
_FORBIDDEN = {errno.EACCES, errno.EPERM}
_LOCK = "lock"
_LONGEST_NAME = 255  # bytes
# Folders that this process holds: the system's locks keep out other processes only.
_held: set[Path] = set()


def temporary_name(target: Path) -> Path:
    """A new, hidden name beside `target`."""
    return target.with_name(f".iddpm-{secrets.token_hex(6)}.tmp")


def beside(target: Path, suffix: str) -> Path:
    """The name of `target` with a suffix behind it; where that were too long, with a digest in its place."""
    name = os.fsencode(target.name) + suffix.encode()
    if len(name) > _LONGEST_NAME:
        name = hashlib.sha256(name).hexdigest().encode() + suffix.encode()
    return target.with_name(os.fsdecode(name))


def write_whole(target: Path, data: bytes) -> None:
    """Writes `data` to a temporary name beside `target`, flushes it to disk and renames it.

    The mode is what the umask leaves of 0666. Raises OSError; the temporary file is removed then.
    """
    with replacing(target) as temporary:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary name for the block to write a file or a folder at, which then becomes `target`.

    It is flushed to disk before it is renamed, and removed where the block or the renaming fails.
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
    """Makes the content of a file, or the names in a folder, outlive a power cut.

    Where the system does not do that for this path, the file stands all the same: that is a warning.
    Raises OSError where it tries and fails.
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
    """Holds `folder`, made if need be, for this process: a second one is refused at its start.

    The system gives the lock back when the process ends, however it ends. A folder that was made for
    it and is still empty goes with it.

    who: the function that the error is of.
    Raises RuntimeError where another run holds the folder, OSError where it cannot be written. Where
    the file system knows no locks, that is a warning.
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
        # Removed while it is held: whoever opened it meanwhile sees that it is another file.
        path.unlink(missing_ok=True)
        os.close(descriptor)
        for empty in made:
            with contextlib.suppress(OSError):
                empty.rmdir()


def _lock(path: Path, who: str, folder: Path) -> int:
    """The descriptor of the lock's file, which holds it while it is open."""
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
        os.close(descriptor)  # its holder has just ended and removed it


def _try_lock(descriptor: int) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        reason = "this system has no such locks"
    else:
        try:
            # Of the process, not of the open file: its workers do not keep it after it was killed.
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
