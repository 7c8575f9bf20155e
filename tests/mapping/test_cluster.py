"""Windows on a real cluster of Ray: two processes, one of which is killed. Its start alone takes ten seconds."""

from __future__ import annotations

import os
import signal
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from test_predict import classified, dense, scene
from test_workers import SIZES, assert_same, images, work

from everysat.mapping import workers
from everysat.mapping.workers import Work, local
from everysat.predict import predict


@pytest.fixture(scope="module")
def ray():
    pytest.importorskip("ray")
    tests = Path(__file__).resolve().parent
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own
        patch.setenv("PYTHONPATH", f"{tests}{os.pathsep}{tests.parent}")
        with workers.cluster(None, 2) as connected:
            yield connected


@dataclass(frozen=True)
class SlowScene:
    """A source that takes its time, and notes who read; the note of a process is its number in a file."""

    source: object
    folder: str
    pause: float = 0.05

    def __getattr__(self, name):
        if name.startswith("__") or name == "source":
            raise AttributeError(name)
        return getattr(self.source, name)

    def read(self, *box):
        with open(os.path.join(self.folder, f"{os.getpid()}-{box[0]}-{box[2]}"), "w"):
            pass
        time.sleep(self.pause)
        return self.source.read(*box)


@pytest.mark.filterwarnings("ignore")
def test_a_worker_that_is_killed_is_replaced_and_the_map_is_the_same(ray, tmp_path, capsys) -> None:
    job = work()
    slow = Work(job.mapper, SlowScene(job.source, str(tmp_path)), job.plan)
    once, found, killed = images(local(job, job.plan.windows(), threads=1)), {}, None
    for window, image in workers.on_ray(slow, job.plan.windows(), workers=2, address=None):
        found[window.index] = np.array(image)
        if killed is None and len(found) == 5:
            killed = int(next(tmp_path.iterdir()).name.split("-")[0])
            os.kill(killed, signal.SIGKILL)
    assert_same(once, found)
    readers = {name.name.split("-")[0] for name in tmp_path.iterdir()}
    assert len(readers) == 3, "two, and one instead of the killed"
    assert str(os.getpid()) not in readers
    assert "its worker died" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_an_error_in_a_worker_is_the_error_here(ray) -> None:
    job = work()
    broken = Work(dense(chip_m=100.0), job.source, job.plan)
    with pytest.raises(ValueError, match="chip_m=100 is not a multiple of token_m=30"):
        images(workers.on_ray(broken, job.plan.windows(), workers=2, address=None))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_map_by_two_workers_is_the_map_of_one(ray, tmp_path) -> None:
    a = predict(classified(), scene(), tmp_path / "a.tif", **SIZES)
    b = predict(classified(), scene(), tmp_path / "b.tif", workers=2, **SIZES)
    for kind in a:
        assert a[kind].read_bytes() == b[kind].read_bytes()
