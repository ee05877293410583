"""Sources of image files: a folder, or a zip archive; others are in `shards` and `lmdb_file`."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import NamedTuple, Protocol

from .classes import shown
from .image import BadImage
from .names import printable

# Larger files and members are refused without reading them.
MAX_FILE_BYTES = 1 << 29


class Survey(NamedTuple):
    """Names of all files and folders, relative POSIX paths, sorted; and notes on what was not entered."""

    files: list[str]
    folders: list[str]
    notes: list[str]


class Container(Protocol):
    """What image files lie in. path: of it all, for messages."""

    path: Path

    def survey(self) -> Survey:
        """All that is there."""
        ...

    def read(self, name: str) -> bytes:
        """The bytes of one file; BadImage when it cannot be read."""
        ...


class Folder:
    """The files below a directory. Links are followed, but each real folder is entered once."""

    def __init__(self, path: Path):
        self.path = path

    def survey(self) -> Survey:
        """All files and folders. Real folders have priority over links to them."""
        files: list[str] = []
        folders: list[str] = []
        links: list[str] = []
        notes: list[str] = []
        entered: set[tuple[int, int]] = set()
        again: list[str] = []
        pending = [""]
        while pending or links:
            # All real folders before links.
            name = pending.pop() if pending else links.pop()
            try:
                state = os.stat(self.path / name)
                identity = (state.st_dev, state.st_ino)
                if identity in entered:
                    again.append(name)
                    continue
                entered.add(identity)
                with os.scandir(self.path / name) as entries:
                    for entry in sorted(entries, key=lambda e: e.name, reverse=True):
                        path = f"{name}/{entry.name}" if name else entry.name
                        if entry.is_dir():
                            (links if entry.is_symlink() else pending).append(path)
                        elif entry.is_file() or entry.is_symlink():
                            files.append(path)  # broken links too, for an error on reading
                if name:
                    folders.append(name)
            except OSError as error:
                notes.append(f"cannot be entered: {printable(name)} ({error.strerror})")
        if again:
            listed = shown(sorted(map(printable, again)))
            notes.append(f"links to folders that are read already are left out: {listed}")
        return Survey(sorted(files), sorted(folders), notes)

    def read(self, name: str) -> bytes:
        """The bytes of one file; BadImage when it cannot be read."""
        shown_name = f"{printable(str(self.path))}/{printable(name)}"
        try:
            with open(self.path / name, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size > MAX_FILE_BYTES:
                    raise BadImage(
                        f"{shown_name}: must have at most {MAX_FILE_BYTES} bytes, got {size}"
                    )
                return file.read()
        except OSError as error:
            raise BadImage(f"{shown_name}: must be readable, got {error.strerror}") from error


class Zip:
    """The members of a zip archive. Nothing is extracted; every process opens the archive for itself."""

    def __init__(self, path: Path):
        self.path = path
        self._opened: tuple[int, zipfile.ZipFile] | None = None
        # Some Windows tools write backslashes.
        self._members: dict[str, zipfile.ZipInfo] = {}
        self._twice: list[str] = []
        for info in self._archive().infolist():
            name = info.filename.replace("\\", "/")
            if name in self._members and not name.endswith("/"):
                self._twice.append(name)
            self._members[name] = info

    def survey(self) -> Survey:
        """All files and folders."""
        notes = []
        if self._twice:
            names = shown(list(map(printable, self._twice)))
            notes.append(f"of members with one name only the last is read: {names}")
        files = sorted(name for name in self._members if not name.endswith("/"))
        folders = {name.rstrip("/") for name in self._members if name.endswith("/")}
        return Survey(files, sorted(folders), notes)

    def read(self, name: str) -> bytes:
        """The bytes of one member; BadImage when it is damaged, encrypted or claims to be huge."""
        member, shown_name = self._members[name], f"{printable(str(self.path))}:{printable(name)}"
        if member.file_size > MAX_FILE_BYTES:
            raise BadImage(
                f"{shown_name}: must unpack to at most {MAX_FILE_BYTES} bytes, got {member.file_size}"
            )
        try:
            return self._archive().read(member)
        except Exception as error:  # zlib.error, BadZipFile, RuntimeError for a password, OSError
            raise BadImage(f"{shown_name}: must be readable, got {error}") from error

    def _archive(self) -> zipfile.ZipFile:
        # Opened anew in forked workers, which would otherwise share a file position.
        if self._opened is None or self._opened[0] != os.getpid():
            try:
                self._opened = (os.getpid(), zipfile.ZipFile(self.path))
            except (zipfile.BadZipFile, OSError) as error:
                raise ValueError(
                    f"open_data: path must be a complete zip archive, got {self.path}: {error}"
                ) from error
        return self._opened[1]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_opened": None}
