"""Finished windows on disk: nothing half counts, nothing foreign is used, every failure leaves the same command something to go on with."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from odc.geo.geobox import GeoBox
from test_predict import CLASSES, Interrupted, classified, dense, failing_after, read, scene

from everysat.io.read import open_scene
from everysat.mapping import parts as journal
from everysat.mapping.parts import Parts
from everysat.mapping.source import InputChanged
from everysat.mapping.windows import Plan
from everysat.nn.mappers import Classified
from everysat.predict import predict

SIZES = {"window_m": 90.0, "quiet": True}
PLAN = Plan((50, 70), 10.0, window=20, halo=12)


def parts(folder, plan=PLAN, **facts) -> Parts:
    return Parts(folder / "map.parts", plan, 2, {"input": 1, "model": 1, **facts}, quiet=False)


def image(window, value: float) -> np.ndarray:
    top, bottom, left, right = window.kept
    return np.full((2, bottom - top, right - left), value, np.float32)


def test_finished_windows_are_taken_up_by_the_same_work(tmp_path) -> None:
    windows = list(PLAN.windows())
    with parts(tmp_path) as first:
        first.save(windows[3], image(windows[3], 3))
        first.save(windows[4], np.zeros(0, np.float32))
    with parts(tmp_path) as again:
        assert [w.index for w in again.missing] == [0, 1, 2, *range(5, 12)]
        assert (again.read(windows[3].core) == 3).all()
        assert np.isnan(again.read(windows[4].core)).all()


@pytest.mark.parametrize("change", ["input", "model", "cut into windows"])
def test_windows_of_other_work_are_removed_and_the_reason_is_said(tmp_path, capsys, change) -> None:
    with parts(tmp_path) as first:
        first.save(PLAN.at(0), image(PLAN.at(0), 1))
    plan = Plan((50, 70), 10.0, window=20, halo=8) if change == "cut into windows" else PLAN
    with parts(tmp_path, plan, **({} if plan is not PLAN else {change: 2})) as other:
        assert len(other.missing) == 12
    assert (
        f"1 finished windows in {tmp_path / 'map.parts'} are not used: changed since: {change}"
        in capsys.readouterr().err
    )


def test_windows_without_their_note_do_not_count(tmp_path, capsys) -> None:
    with parts(tmp_path) as first:
        first.save(PLAN.at(0), image(PLAN.at(0), 1))
    for damage in ("", '{"cut', "[]"):
        (tmp_path / "map.parts" / "plan.json").write_text(damage)
        with parts(tmp_path) as other:
            assert len(other.missing) == 12
            other.save(PLAN.at(0), image(PLAN.at(0), 1))
    assert "changed since" not in capsys.readouterr().err.replace("their note is lost", "")


def test_half_a_window_does_not_count(tmp_path) -> None:
    with parts(tmp_path) as first:
        for index in (0, 1, 2):
            first.save(PLAN.at(index), image(PLAN.at(index), 1))
    path = tmp_path / "map.parts" / "000001.npy"
    path.write_bytes(path.read_bytes()[:-7])
    (tmp_path / "map.parts" / "000002.npy").write_bytes(b"")
    (tmp_path / "map.parts" / "000003.partial").write_bytes(b"half")
    with parts(tmp_path) as again:
        assert [w.index for w in again.missing] == list(range(1, 12))


def test_two_at_once_are_refused(tmp_path) -> None:
    with parts(tmp_path), pytest.raises(OSError, match="another process is writing"), parts(tmp_path):
        pass
    with parts(tmp_path):
        pass


# --- killed ----------------------------------------------------------------------------------------------------------


class Slow(Classified):
    def __call__(self, batch):
        time.sleep(0.01)
        return super().__call__(batch)


def run_slowly(out) -> None:
    predict(Slow(**vars(classified())), scene(), out, blend=True, threads=2, window_m=120.0, quiet=True)


@pytest.fixture(scope="module")
def children():
    """Processes that are forked from one that has imported all of this already."""
    context = multiprocessing.get_context("forkserver")
    here = Path(__file__).resolve().parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{here}{os.pathsep}{here.parent}")
        context.set_forkserver_preload(["test_parts"])
        first = context.Process(target=os.getpid)
        first.start()
        first.join()
    return context


def test_killed_twenty_times_at_random_points_the_files_are_the_same(tmp_path, children) -> None:
    """Kills fall into reading, computing, writing and the making of the final file: a run that gets through begins anew."""
    out, rng = tmp_path / "map.tif", np.random.default_rng(0)
    began = time.monotonic()
    run_slowly(tmp_path / "once.tif")
    whole = time.monotonic() - began
    kills, states = 0, []
    while kills < 20:
        child = children.Process(target=run_slowly, args=(out,))
        child.start()
        child.join(rng.uniform(0, 1.2 * whole))
        child.kill()
        child.join()
        if child.exitcode == 0:
            check_same(tmp_path)
            out.unlink()
            continue
        kills += 1
        states.append(len(list(tmp_path.glob("map.tif.parts/*.npy"))))
        if out.exists():  # whatever appears is complete
            assert out.read_bytes() == (tmp_path / "once.tif").read_bytes()
    run_slowly(out)
    check_same(tmp_path)
    assert len(set(states)) > 3, f"kills at different points: {states}"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        f"{name}{kind}.tif" for name in ("map", "once") for kind in ("", "-confidence")
    )


def check_same(folder) -> None:
    for kind in ("", "-confidence"):
        assert (folder / f"map{kind}.tif").read_bytes() == (folder / f"once{kind}.tif").read_bytes()


# --- disks and files that fail ---------------------------------------------------------------------------------------


def full(after: int):
    """``os.fsync`` on a disk that is full after so many files."""
    calls, real = [], os.fsync

    def fsync(number: int) -> None:
        calls.append(1)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(number)

    return fsync


def test_a_full_disk_is_named_and_what_was_finished_is_used_again(tmp_path, monkeypatch) -> None:
    once = predict(classified(), scene(), tmp_path / "once.tif", **SIZES)
    out = tmp_path / "map.tif"
    with monkeypatch.context() as patch:
        patch.setattr(journal.os, "fsync", full(11))
        with pytest.raises(
            OSError, match=r"cannot write .*map.tif.parts/\d+.npy: No space left on device. Free .* GB there"
        ) as failed:
            predict(classified(), scene(), out, **SIZES)
    assert "10 finished windows are kept" in str(failed.value)
    assert sorted(p.suffix for p in (tmp_path / "map.tif.parts").iterdir()) == ["", ".json", *[".npy"] * 10]
    assert not out.exists()
    made = predict(failing_after(classified(), 38), scene(), out, **SIZES)
    np.testing.assert_array_equal(read(made["classes"]), read(once["classes"]))


def test_too_small_a_disk_is_told_before_the_work(tmp_path, monkeypatch) -> None:
    free = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(journal.shutil, "disk_usage", lambda _: free)
    with pytest.raises(OSError, match=r"will take .* GB until the map is complete, the disk has 1e-06 GB left"):
        predict(failing_after(classified(), 0), scene(), tmp_path / "map.tif", **SIZES)


def limited(out, errors) -> None:
    """In a process whose files may not grow beyond some size, as on a disk that fills while the map itself is written."""
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    try:
        predict(classified(), scene(), out, **SIZES)
    except OSError as error:
        errors.put(str(error))
    else:
        errors.put("")


def test_a_disk_that_fills_while_the_map_is_written_leaves_no_half_map(tmp_path, children) -> None:
    errors, out = children.Queue(), tmp_path / "map.tif"
    child = children.Process(target=limited, args=(out, errors))
    child.start()
    message = errors.get(timeout=60)
    child.join()
    assert f"cannot write {out}" in message
    assert f"the finished windows are kept in {tmp_path / 'map.tif.parts'}" in message
    assert [p.name for p in tmp_path.iterdir()] == ["map.tif.parts"]
    made = predict(classified(), scene(), out, **SIZES)
    once = predict(classified(), scene(), tmp_path / "once.tif", **SIZES)
    for kind, path in once.items():
        assert path.read_bytes() == made[kind].read_bytes()


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(journal.Path, "mkdir", refused)
    with pytest.raises(
        OSError, match=r"cannot write .*map.tif.parts: Read-only file system. Choose an output in a folder"
    ):
        predict(failing_after(classified(), 0), scene(), tmp_path / "map.tif", **SIZES)


@pytest.fixture
def files(tmp_path):
    """Two bands on disk, and the scene that they are."""
    paths = []
    rng = np.random.default_rng(0)
    for name in ("B04", "B08"):
        paths.append(tmp_path / f"T33UUU_20240501T101559_{name}_10m.tif")
        write(paths[-1], rng.integers(1000, 9000, (1, 54, 66)).astype(np.uint16), name)
    return paths


def write(path, numbers, name) -> None:
    options = {"driver": "GTiff", "count": 1, "dtype": "uint16", "width": 66, "height": 54, "crs": "EPSG:32633"}
    with rasterio.open(path, "w", transform=Affine(10, 0, 600000, 0, -10, 5000000), nodata=0, **options) as file:
        file.write(numbers)
        file.set_band_description(1, name)


def opened(files):
    return open_scene([str(f) for f in files], sensor="sentinel-2-l2a", processing_baseline="04.00")


@pytest.mark.parametrize("deed", ["changes", "vanishes"])
def test_a_file_that_changes_or_vanishes_meanwhile(tmp_path, files, deed) -> None:
    class Raw:
        gsd_m, align_m, halo_m, names, probabilistic = 10.0, 10.0, 0.0, ("B04", "B08"), False

        def __call__(self, batch):
            (layer,) = batch.layers.values()
            if self.act and next(self.act, None) is None:
                self.act = None
                if deed == "changes":
                    write(files[1], np.full((1, 54, 66), 7000, np.uint16), "B08")
                    os.utime(files[1], (1, 1))
                else:
                    files[1].rename(tmp_path / "away")
            return layer.values

        act = None

    out = tmp_path / "raw.tif"
    meddling = Raw()
    meddling.act = iter([1, 2, 3])
    Raw.__qualname__ = "Raw"
    with pytest.raises(InputChanged, match=f"B08_10m.tif {'changed' if deed == 'changes' else 'vanished'} while"):
        predict(meddling, opened(files), out, threads=1, **SIZES)
    assert not out.exists()
    kept = list((tmp_path / "raw.tif.parts").glob("*.npy"))
    assert 1 <= len(kept) < 48
    if deed == "vanishes":
        (tmp_path / "away").rename(files[1])
    Raw.act = None
    made = predict(Raw(), opened(files), out, **SIZES)
    expected = opened(files).read()
    (layer,) = expected.layers.values()
    np.testing.assert_array_equal(read(made["features"]), layer.values[0].numpy())


def test_a_file_of_the_same_size_and_date_with_another_header_is_another(tmp_path, files) -> None:
    from everysat.mapping.source import SceneSource

    before = SceneSource(opened(files), 10.0).facts()
    stamp = files[0].stat()
    write(files[0], np.full((1, 54, 66), 5, np.uint16), "B04")
    os.utime(files[0], ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    after = SceneSource(opened(files), 10.0).facts()
    assert files[0].stat().st_size == stamp.st_size
    assert json.dumps(before) != json.dumps(after)


def test_ctrl_c_keeps_what_is_finished(tmp_path) -> None:
    left = iter(range(9, -1, -1))

    class Pressed(Classified):
        def __call__(self, batch):
            if next(left, None) == 0:
                import _thread

                _thread.interrupt_main()
            return super().__call__(batch)

    Pressed.__name__ = "Classified"
    out = tmp_path / "map.tif"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            predict(Pressed(**vars(classified())), scene(), out, **SIZES)
    finally:
        signal.signal(signal.SIGINT, before)
    kept = len(list((tmp_path / "map.tif.parts").glob("*.npy")))
    assert 0 < kept < 48
    predict(failing_after(classified(), 48 - kept), scene(), out, **SIZES)


def test_other_errors_do_not_hide(tmp_path) -> None:
    with pytest.raises(Interrupted):
        predict(failing_after(dense(), 3), scene(), tmp_path / "f.tif", **SIZES)
    assert CLASSES
    assert GeoBox
