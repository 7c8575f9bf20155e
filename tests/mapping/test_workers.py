"""Windows computed by threads and by processes, some of which die: the same bits, whoever computed what."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from test_predict import classified, dense, scene

from everysat.mapping import workers
from everysat.mapping.source import open_source
from everysat.mapping.windows import Window
from everysat.mapping.workers import NOTHING, Work, local, observed, ready
from everysat.nn.mappers import Classified
from everysat.predict import plan_of, predict

SIZES = {"window_m": 90.0, "quiet": True}


def work(mapper=None, valid=None, **options) -> Work:
    mapper = mapper or classified()
    source = open_source(scene(valid), 10.0)
    return Work(mapper, source, plan_of(mapper, source, 90.0, None, None, False), **options)


def images(finished) -> dict[int, np.ndarray]:
    return {window.index: image for window, image in finished}


def assert_same(a: dict[int, np.ndarray], b: dict[int, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for index, image in a.items():
        np.testing.assert_array_equal(image, b[index])


def test_any_number_of_threads_and_any_order_give_the_same_bits() -> None:
    job = work()
    once = images(local(job, job.plan.windows(), threads=1))
    assert len(once) == 48
    assert_same(once, images(local(job, reversed(list(job.plan.windows())), threads=3)))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert_same(once, images(local(job, job.plan.windows(), threads=2)))
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)


def test_each_window_is_computed_by_one_thread_with_networks_in_eval_mode() -> None:
    job = work()
    encoder = job.mapper.features.encoder.train()
    found = []

    class Watched(Classified):
        def __call__(self, batch):
            found.append((torch.get_num_threads(), encoder.training, encoder.proj.training))
            return super().__call__(batch)

    mapper = Watched(**vars(job.mapper))
    images(local(Work(mapper, job.source, job.plan), job.plan.windows(), threads=2))
    assert set(found) == {(1, False, False)}
    assert encoder.training
    assert encoder.proj.training


def test_reading_overlaps_computing_and_stays_bounded() -> None:
    """Every window but the last ones sees another being read while it is computed; never more are held than agreed."""
    job, held, lock = work(), [], threading.Lock()
    reads, taken = threading.Semaphore(0), Counter()

    class Watched:
        def __getattr__(self, name):
            return getattr(job.source, name)

        def read(self, *box):
            with lock:
                taken["read"] += 1
                held.append(taken["read"] - taken["computed"])
            reads.release()
            return job.source.read(*box)

    class Waiting(Classified):
        def __call__(self, batch):
            with lock:
                last = taken["read"] == 48
            assert last or reads.acquire(timeout=20), "nothing is read while this is computed"
            return super().__call__(batch)

    for _ in local(Work(Waiting(**vars(job.mapper)), Watched(), job.plan), job.plan.windows(), threads=1):
        taken["computed"] += 1
    assert max(held) <= 1 + 2 + 1
    assert max(held) >= 2


def test_a_window_without_enough_observations_is_not_computed() -> None:
    valid = torch.ones(1, 2, 54, 66, dtype=torch.bool)
    valid[..., :18, :27] = False
    valid[..., 3, 3] = True  # of the first window one pixel of 81
    valid[..., :9, 18:27] = True
    runs = []

    class Counting(Classified):
        def __call__(self, batch):
            runs.append(1)
            return super().__call__(batch)

    def empty(job: Work) -> set[int]:
        return {i for i, image in images(local(job, job.plan.windows())).items() if image.shape == NOTHING.shape}

    job = work(Counting(**vars(classified())), valid)
    assert empty(job) == {1, 8, 9, 10}
    assert len(runs) == 48 - 4
    assert empty(work(job.mapper, valid, min_valid=0.02)) == {0, 1, 8, 9, 10}
    assert empty(work(job.mapper, valid, min_valid=1.0)) == {0, 1, 8, 9, 10}


def test_what_any_layer_or_date_observed_counts_as_observed() -> None:
    valid = torch.zeros(1, 2, 54, 66, dtype=torch.bool)
    valid[0, 1, 5, 7] = True
    batch = scene(valid)
    seen = observed(batch, 10.0, (54, 66))
    assert np.argwhere(seen).tolist() == [[5, 7]]
    assert np.argwhere(observed(batch, 30.0, (18, 22))).tolist() == [[1, 2]]
    assert observed(batch, 5.0, (108, 132)).sum() == 4


def test_a_failing_window_is_tried_again_and_the_real_error_is_shown(capsys, monkeypatch) -> None:
    monkeypatch.setattr(workers.time, "sleep", lambda _: None)
    job, tries = work(), Counter()

    @dataclass
    class Flaky:
        times: int

        def __getattr__(self, name):
            return getattr(job.source, name)

        def read(self, *box):
            tries[box] += 1
            if box[0] == 0 and tries[box] <= self.times:
                raise OSError("the server is tired")
            return job.source.read(*box)

    once = images(local(job, job.plan.windows()))
    assert_same(once, images(local(Work(job.mapper, Flaky(2), job.plan), job.plan.windows())))
    assert "the server is tired" in capsys.readouterr().err
    tries.clear()
    kept = []
    with pytest.raises(OSError, match="the server is tired") as failed:
        kept.extend(local(Work(job.mapper, Flaky(9), job.plan), job.plan.windows()))
    assert "failed 3 times" in failed.value.__notes__[0]
    assert max(tries.values()) == 3


def test_what_is_wrong_with_the_data_is_not_tried_again() -> None:
    job, runs = work(), []

    class Wrong(Classified):
        def __call__(self, batch):
            runs.append(1)
            raise ValueError("no such band")

    with pytest.raises(ValueError, match="no such band"):
        images(local(Work(Wrong(**vars(job.mapper)), job.source, job.plan), job.plan.windows(), threads=1))
    assert len(runs) <= 3


def test_modes_of_networks_come_back_after_an_error() -> None:
    mapper = dense()
    mapper.encoder.train()

    def fails() -> None:
        with ready(mapper):
            assert not mapper.encoder.training
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert mapper.encoder.training


def test_without_ray_there_is_a_word_about_it(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'everysat\[cluster\]'"):
        predict(classified(), scene(), tmp_path / "a.tif", workers=2, **SIZES)
    predict(classified(), scene(), tmp_path / "a.tif", workers=1, **SIZES)


def test_windows_can_be_sent() -> None:
    import pickle

    window = work().plan.at(5)
    assert isinstance(window, Window)
    assert pickle.loads(pickle.dumps(window)) == window
