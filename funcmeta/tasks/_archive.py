"""Files out of zips and folders that others made: nothing is extracted, and nothing is read without a limit."""

import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from os import PathLike, fspath
from pathlib import Path

from funcmeta._errors import ArgumentError, DataError

LARGEST_FILE = 1 << 16
"""Bytes of one file, unpacked: the drawings have some hundred, a run's labels two thousand."""
LARGEST_SUM = 1 << 26
"""Bytes of all files, unpacked; with it no ratio of sizes needs a limit of its own. All of Omniglot has 9 MiB."""
LARGEST_ARCHIVE = 1 << 25
"""Bytes of a zip: its table of members is read whole before they can be counted. The largest published has 9.1 MiB."""
MOST_MEMBERS = 1 << 16
"""Members of a zip, as many as the format had at first: the largest published one has 20,000."""

Found = Iterator[tuple[tuple[str, ...], int, Callable[[], bytes]]]
"""Of each file that matches: the groups of the pattern, the size in bytes, and how to read it."""

_BROKEN = (zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, RuntimeError, ValueError)


def read_matching(
    path: str | PathLike[str], pattern: str, *, archives: str, advice: str
) -> dict[tuple[str, ...], bytes]:
    """The files whose path ends like ``pattern``, sorted by its groups; of several with the same groups, the first.

    ``path`` is a zip, or a folder with files, with zips named like ``archives``, or both. ``advice`` ends each message.
    """
    try:
        root = Path(fspath(path))
    except TypeError as error:
        raise ArgumentError(f"path is {path!r}, expected the path of a zip or folder. Pass a str or a Path.") from error
    if not root.exists():
        raise DataError(f"{root} does not exist, expected a zip or a folder. {advice}")
    ending = re.compile(rf"(?:^|/){pattern}$")
    contents: dict[tuple[str, ...], bytes] = {}
    total = 0
    for source in [root, *sorted(root.glob(archives))]:
        try:
            for groups, size, read in _files(source, ending) if source.is_dir() else _members(source, ending):
                if groups in contents:
                    continue
                total += size
                if size > LARGEST_FILE or total > LARGEST_SUM:
                    raise DataError(
                        f"{source} holds {'/'.join(groups)} of {size} bytes, expected at most {LARGEST_FILE} a file "
                        f"and {LARGEST_SUM} in all. {advice}"
                    )
                contents[groups] = read()
        except DataError:
            raise
        except _BROKEN as error:
            raise DataError(f"{source} is truncated or not a zip ({error}). {advice}") from error
    if not contents:
        raise DataError(f"{root} holds no file like {pattern}. {advice}")
    return dict(sorted(contents.items()))


def _files(folder: Path, ending: re.Pattern[str]) -> Found:
    """The matching files in a folder and below."""
    for file in sorted(folder.resolve().rglob("*")):
        match = ending.search(file.as_posix())
        if match and file.is_file():
            yield match.groups(), file.stat().st_size, file.read_bytes


def _members(archive: Path, ending: re.Pattern[str]) -> Found:
    """The matching members of a zip; reading one unpacks no more than its size, or fails."""
    size = archive.stat().st_size
    if size > LARGEST_ARCHIVE:
        raise DataError(f"{archive} has {size} bytes, expected at most {LARGEST_ARCHIVE} of a zip. Unpack it.")
    with zipfile.ZipFile(archive) as opened:
        members = opened.infolist()
        if len(members) > MOST_MEMBERS:
            raise DataError(f"{archive} holds {len(members)} members, expected at most {MOST_MEMBERS}. Unpack it.")
        for info in members:
            parts = re.split(r"[/\\]", info.filename)
            if parts[0] == "" or parts[0][1:2] == ":" or ".." in parts:
                raise DataError(
                    f"{archive} has a member {info.filename!r}, whose path leads out of the zip. It is not what was "
                    f"published; get it anew."
                )
            match = ending.search(info.filename)
            if match:
                yield match.groups(), info.file_size, partial(_unpacked, opened, info)


def _unpacked(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """The content of a member, unpacked no further than to the size that it claims."""
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others cannot be unpacked in parts
        raise ValueError(f"{info.filename} is compressed by method {info.compress_type}, expected to be deflated")
    with archive.open(info) as member:
        content = member.read(info.file_size)
        if len(content) != info.file_size:
            raise ValueError(f"{info.filename} has {len(content)} bytes, expected the {info.file_size} that it claims")
    return content
