"""Archives unpacked where they lie, once."""

from __future__ import annotations

import json
import tarfile
import zipfile
import zlib
from pathlib import Path

from everysat.io.download import enough
from everysat.progress import track

TAR = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
MARK = ".{}.unpacked"
"""A small file beside an archive: size and time of change of what was unpacked."""


def is_archive(path: Path) -> bool:
    """Whether the name is one of an archive that can be unpacked here."""
    return path.name.lower().endswith((".zip", *TAR))


def unpack(archive: Path, *, quiet: bool = False) -> bool:
    """Unpack an archive (zip, tar) into its folder; False when that was done before.

    Raises:
        OSError: it is damaged, holds a file that leads out of the folder, or does not fit on the disk; names the archive.
    """
    mark = archive.with_name(MARK.format(archive.name))
    state = json.dumps([archive.stat().st_size, archive.stat().st_mtime_ns])
    if mark.is_file() and mark.read_text(encoding="utf-8") == state:
        return False
    try:
        if archive.name.lower().endswith(".zip"):
            _unzip(archive, quiet)
        else:
            with tarfile.open(archive) as content:
                for member in track(content, f"Unpacking {archive.name}", quiet=quiet):
                    content.extract(member, archive.parent, filter="data")
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, NotImplementedError) as error:
        raise OSError(f"{archive} cannot be unpacked: {error}. Delete it and fetch it again") from error
    mark.write_text(state, encoding="utf-8")
    return True


def _unzip(archive: Path, quiet: bool) -> None:
    with zipfile.ZipFile(archive) as content:
        members = content.infolist()
        for member in members:
            if member.filename.startswith(("/", "\\")) or ".." in Path(member.filename).parts:
                raise zipfile.BadZipFile(f"it holds {member.filename!r}, which leads out of its folder")
        enough(archive.parent, sum(member.file_size for member in members), f"the content of {archive}")
        for member in track(members, f"Unpacking {archive.name}", quiet=quiet):
            content.extract(member, archive.parent)
