"""LMDB databases whose values are encoded images, through the optional `lmdb` library."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .containers import MAX_FILE_BYTES, Survey
from .image import BadImage
from .names import printable

# What writers of such databases put beside the images.
_FACTS = (b"length", b"num-samples", b"classnum", b"keys")


def is_lmdb(path: Path) -> bool:
    """Whether `path` is a folder with data.mdb, or a file of that kind."""
    if path.is_dir():
        return (path / "data.mdb").is_file()
    return path.suffix in (".mdb", ".lmdb") and path.is_file()


class Lmdb:
    """The images of a database, named by their keys; opened to read only.

    Raises ImportError without the library `lmdb`, ValueError for a file that is no database.
    """

    def __init__(self, path: Path):
        self.path = path
        self._keys: dict[str, bytes] = {}
        left = []
        with self._reading() as transaction:
            for key in transaction.cursor().iternext(values=False):
                key = bytes(key)
                name = key.decode(errors="surrogateescape")
                if key.startswith(b"__") or key in _FACTS:
                    left.append(printable(name))
                else:
                    self._keys[name] = key
        self._notes = [f"left out, as they are no images: {', '.join(left)}"] if left else []

    def survey(self) -> Survey:
        """All that is there."""
        return Survey(sorted(self._keys), [], list(self._notes))

    def read(self, name: str) -> bytes:
        """The value of one key; BadImage when it cannot be read."""
        label = f"{printable(str(self.path))}:{printable(name)}"
        try:
            with self._reading() as transaction:
                value = transaction.get(self._keys[name])
                if value is None:
                    raise BadImage(f"{label}: must be there, got no value any more")
                if len(value) > MAX_FILE_BYTES:
                    raise BadImage(
                        f"{label}: must have at most {MAX_FILE_BYTES} bytes, got {len(value)}"
                    )
                return bytes(value)
        except (BadImage, ImportError):
            raise
        except Exception as error:  # lmdb.Error, which has no base of Python's own
            raise BadImage(f"{label}: must be readable, got {error}") from error

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Any]:
        """A transaction. The database is open no longer than that: a process may open it only once, and one
        that was open when it forked never again; opening takes 60 us, as decoding a 64x64 PNG does."""
        lmdb = _library()
        try:
            environment = lmdb.open(
                str(self.path), subdir=self.path.is_dir(), readonly=True, lock=False,
                readahead=False, meminit=False, create=False,
            )  # fmt: skip
        except lmdb.Error as error:
            raise ValueError(
                f"open_data: {printable(str(self.path))} must be an LMDB database, got {error}"
            ) from error
        with environment, environment.begin(buffers=True) as transaction:
            yield transaction


def _library() -> Any:
    try:
        import lmdb
    except ImportError as error:
        raise ImportError(
            "open_data: LMDB databases need the library `lmdb`: pip install lmdb"
        ) from error
    return lmdb
