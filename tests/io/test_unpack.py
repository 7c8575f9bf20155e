"""Archives are unpacked once, nothing leaves their folder, and damage is named."""

from __future__ import annotations

import io
import shutil
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from everysat.io.unpack import is_archive, unpack


def make(path: Path, **files: bytes) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        with tarfile.open(path, "w:gz") as archive:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("name", ["set.zip", "set.tar.gz", "SET.tgz"])
def test_once(tmp_path: Path, name: str) -> None:
    assert is_archive(Path(name))
    archive = make(tmp_path / name, **{"DATA/a.npy": b"12", "b.txt": b"3"})
    assert unpack(archive, quiet=True)
    assert ((tmp_path / "DATA" / "a.npy").read_bytes(), (tmp_path / "b.txt").read_bytes()) == (b"12", b"3")
    (tmp_path / "b.txt").write_bytes(b"changed")
    assert not unpack(archive, quiet=True)
    assert (tmp_path / "b.txt").read_bytes() == b"changed"
    make(archive, **{"c.txt": b"new"})
    assert unpack(archive, quiet=True)
    assert (tmp_path / "c.txt").exists()


@pytest.mark.parametrize("name", ["set.zip", "set.tar.gz"])
@pytest.mark.parametrize("inner", ["../evil", "/evil", "a/../../evil"])
def test_nothing_leaves_the_folder(tmp_path: Path, name: str, inner: str) -> None:
    archive = make(tmp_path / "in" / name if (tmp_path / "in").mkdir() is None else tmp_path, **{inner: b"x"})
    if name.endswith("zip") or ".." in inner:
        with pytest.raises(OSError, match=name.replace(".", r"\.")):
            unpack(archive, quiet=True)
    else:
        unpack(archive, quiet=True)  # a leading slash is taken off
    assert not (tmp_path / "evil").exists()
    assert not Path("/evil").exists()


@pytest.mark.parametrize("name", ["set.zip", "set.tar.gz"])
def test_damage_is_named_and_not_taken_for_done(tmp_path: Path, name: str) -> None:
    archive = make(tmp_path / name, **{"a.npy": bytes(range(256)) * 400})
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match=r"set\.\S+ cannot be unpacked: .* fetch it again"):
        unpack(archive, quiet=True)
    archive.write_bytes(whole)
    assert unpack(archive, quiet=True)


def test_a_content_that_does_not_fit_on_the_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = make(tmp_path / "set.zip", **{"a.npy": bytes(100_000)})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=50_000))
    with pytest.raises(OSError, match=r"content of .*set.zip need"):
        unpack(archive, quiet=True)
    assert not (tmp_path / "a.npy").exists()
