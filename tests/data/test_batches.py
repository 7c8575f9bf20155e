"""Which places a step takes depends on (seed, step) alone, and everything is taken equally often."""

from __future__ import annotations

import pickle
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from everysat.data import pastis
from everysat.data.batches import POOL, Broken, Joined, Plan, Subset, Tolerant, in_order, observations, prefetch, shard
from everysat.data.synthetic import build


def plan(sizes=(20, 7), weights=(3, 1), **changes):
    return Plan(sizes, weights, **{"batch_size": 4, "accumulate": 2, "steps": 200, "seed": 5, **changes})


def same(a, b, steps):
    return all(
        a.datasets[s] == b.datasets[s]
        and all(np.array_equal(x, y) for x, y in zip(a.places(s), b.places(s), strict=True))
        for s in steps
    )


def test_steps_can_be_asked_for_in_any_order_and_a_longer_run_begins_alike():
    backwards = range(199, -1, -1)
    assert same(plan(), plan(), backwards)
    assert same(plan(), plan(steps=1000), range(200))
    assert not same(plan(), plan(seed=6), range(10))


def test_datasets_are_drawn_by_weight():
    assert abs((plan(steps=4000).datasets == 0).mean() - 0.75) < 0.03
    assert (plan(weights=(0, 1)).datasets == 1).all()


def test_an_epoch_sees_every_place_once_and_then_in_another_order():
    p = plan((8,), (1,), accumulate=1, steps=40)
    epochs = [np.concatenate([p.places(2 * e)[0], p.places(2 * e + 1)[0]]) for e in range(20)]
    assert all(sorted(e) == list(range(8)) for e in epochs)
    assert len({tuple(e) for e in epochs}) > 10
    assert p.epochs(4) == [2.0]


def test_no_place_twice_in_a_batch_unless_the_dataset_is_smaller():
    p = plan((7,), (1,))
    assert all(len(set(batch)) == 4 for s in range(200) for batch in p.places(s))
    counts = np.bincount(np.concatenate([b for s in range(200) for b in p.places(s)]), minlength=7)
    assert counts.min() > 0.8 * counts.mean()
    small = plan((3,), (1,), batch_size=8).places(0)[0]
    assert len(small) == 8
    assert set(small) == {0, 1, 2}


@pytest.mark.parametrize("count", [3, 4, 7, 16])
def test_parts_of_processes_make_up_the_batch(count):
    parts = [shard(range(count), rank, 3) for rank in range(3)]
    assert [i for part in parts for i in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_too_small_a_batch_for_the_processes_is_refused():
    with pytest.raises(ValueError, match="raise batch_size"):
        shard([1], 0, 2)


@pytest.mark.parametrize(
    ("sizes", "weights"), [((), ()), ((0,), (1,)), ((3,), (0,)), ((3,), (1, 1)), ((3, 3), (2, -1))]
)
def test_impossible_plans_are_refused(sizes, weights):
    with pytest.raises(ValueError, match=r"sizes=|weights="):
        plan(sizes, weights)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_prefetch_keeps_order_raises_errors_and_leaves_no_thread(workers):
    before = threading.active_count()
    assert list(prefetch(lambda i: i * i, range(50), workers=workers)) == [i * i for i in range(50)]

    def broken(i):
        if i == 3:
            raise OSError("no such file")
        return i

    results = prefetch(broken, range(10), workers=workers)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="no such file"):
        next(results)
    abandoned = prefetch(lambda i: i, range(1000), workers=workers)
    next(abandoned)
    abandoned.close()
    assert threading.active_count() == before


def test_prefetch_works_ahead_but_not_far():
    made = []
    results = prefetch(lambda i: made.append(i), range(1000), workers=1, ahead=4)
    next(results)
    results.close()
    assert len(made) <= 6


def test_subset_and_order():
    data = build(places=5)
    part = Subset(data, [4, 1])
    assert len(part) == 2
    batches = list(in_order(part, 1))
    assert [
        b.raster("label").values.equal(data[i].raster("label").values) for b, i in zip(batches, (4, 1), strict=True)
    ] == [True, True]
    assert [len(b) for b in in_order(data, 2)] == [2, 2, 1]


def test_datasets_may_have_batches_of_their_own_size():
    plan = Plan([10, 30], [1, 1], batch_size=[2, 5], accumulate=1, steps=40, seed=0)
    sizes = {(int(d), len(plan.places(step)[0])) for step, d in enumerate(plan.datasets)}
    assert sizes == {(0, 2), (1, 5)}
    taken = np.bincount(plan.datasets, minlength=2)
    assert plan.epochs(40) == [taken[0] * 2 / 10, taken[1] * 5 / 30]
    with pytest.raises(ValueError, match="one per dataset"):
        Plan([10, 30], [1, 1], batch_size=[2], accumulate=1, steps=1, seed=0)


def test_joined_datasets_follow_each_other():
    joined = Joined([build("images", places=2), build("images", places=3, seed=1)])
    assert len(joined) == 5
    assert torch.equal(joined[3].raster("fine").values, joined.datasets[1][1].raster("fine").values)
    with pytest.raises(IndexError):
        joined[5]


# --- batches of places of similar length -----------------------------------------------------------------------------

LENGTHS = np.random.default_rng(3).integers(5, 80, 1003)


def by_length(**changes):
    return plan((1003,), (1,), **{"accumulate": 1, "steps": 750, "batch_size": 8, "lengths": [LENGTHS], **changes})


def spread_of(p, steps=125):
    """Mean difference between the longest and the shortest place of a batch."""
    return np.mean([np.ptp(LENGTHS[p.places(step)[0]]) for step in range(steps)])


def test_places_of_a_batch_are_of_similar_length():
    assert spread_of(by_length()) < 3
    assert spread_of(by_length(lengths=None)) > 40
    padded = lambda p: sum(LENGTHS[b].max() * len(b) - LENGTHS[b].sum() for s in range(125) for b in p.places(s))  # noqa: E731
    assert padded(by_length()) < 0.05 * padded(by_length(lengths=None))


def test_bucketed_epochs_still_see_every_place_once_in_another_order_and_other_company():
    p = by_length()
    per_epoch = 1003 // 8
    epochs = [[p.places(e * per_epoch + i)[0] for i in range(per_epoch)] for e in range(6)]
    for epoch in epochs:
        taken = np.concatenate(epoch)
        assert len(set(taken.tolist())) == len(taken) == per_epoch * 8
    left_out = [set(range(1003)) - set(np.concatenate(epoch).tolist()) for epoch in epochs]
    assert len(set.union(*left_out)) > 10  # not the same places each time
    company = {frozenset(batch.tolist()) for epoch in epochs for batch in epoch}
    assert len(company) > 0.99 * 6 * per_epoch


def test_bucketed_batches_are_a_function_of_seed_and_step():
    assert same(by_length(), by_length(), range(749, -1, -1))
    assert same(by_length(), by_length(steps=4000), range(750))
    assert not same(by_length(), by_length(seed=6), range(10))


def test_neither_batches_nor_places_in_them_come_in_the_order_of_length():
    p = by_length()
    means = np.array([LENGTHS[p.places(step)[0]].mean() for step in range(125)])
    assert abs(np.corrcoef(means, np.arange(125))[0, 1]) < 0.3
    firsts = np.mean([LENGTHS[p.places(s)[0]][:4].mean() - LENGTHS[p.places(s)[0]][4:].mean() for s in range(750)])
    assert abs(firsts) < 0.2  # so that no process always gets the short ones
    assert POOL * 8 < 1003


def test_bucketing_takes_all_places_about_as_often_and_small_sets_repeat_as_before():
    counts = np.bincount(np.concatenate([b for s in range(750) for b in by_length().places(s)]), minlength=1003)
    assert counts.max() <= 6
    assert counts.min() >= 4
    small = plan((3,), (1,), batch_size=8, lengths=[np.array([1, 2, 3])]).places(0)[0]
    assert set(small) == {0, 1, 2}
    assert len(small) == 8


def test_one_dataset_may_be_bucketed_and_another_not():
    two = plan((1003, 50), (1, 1), lengths=[LENGTHS, None], accumulate=1)
    plain = plan((1003, 50), (1, 1), accumulate=1)
    steps = [s for s in range(200) if two.datasets[s] == 1]
    assert same(two, plain, steps)
    for wrong in ([LENGTHS], [LENGTHS, LENGTHS], [LENGTHS[:9], None]):
        with pytest.raises(ValueError, match="one array per dataset"):
            plan((1003, 50), (1, 1), lengths=wrong)


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_the_order_is_the_same_with_any_number_of_workers(workers):
    p = by_length()
    steps = prefetch(lambda step: p.places(step)[0].tolist(), range(200), workers=workers)
    assert list(steps) == [by_length().places(step)[0].tolist() for step in range(200)]


def test_lengths_are_asked_for_or_counted(tmp_path: Path):
    pastis.fake(tmp_path, places=5)
    data = pastis.build(root=tmp_path, fold=[1, 2, 3, 4, 5], modalities=["s2", "s1-des", "spot"])
    told = observations(data)
    assert told.tolist() == observations(Subset(_Silent(data), range(5))).tolist()
    assert told.tolist() == [9] * 5  # 5 dates, 3 dates and a photograph
    synthetic = build(places=6)
    counted = observations(Joined([Subset(synthetic, [3, 0]), data, Tolerant(synthetic)]))
    each = [sum(len(synthetic[i].layers[n].row) for n in synthetic[i].layers if n != "label") for i in range(6)]
    assert counted.tolist() == [each[3], each[0], *told, *each]


class _Silent:
    """A dataset that does not tell how many observations it has; places in ``broken`` raise."""

    def __init__(self, dataset, broken=None):
        self.dataset, self.broken_ = dataset, broken or {}

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        if index in self.broken_:
            raise self.broken_[index]
        return self.dataset[index]


# --- places that cannot be read --------------------------------------------------------------------------------------


def pixels(batch):
    return {name: layer.values.sum().item() for name, layer in batch.layers.items()}


def test_a_broken_place_is_replaced_by_the_next_and_said():
    data = build(places=10)
    broken = {3: OSError("x_3.npy ends"), 4: KeyError("no band in x_4.h5"), 9: ValueError("x_9.npy holds (3,)")}
    tolerant = Tolerant(_Silent(data, broken), most=0.5)
    with pytest.warns(UserWarning, match=r"place 3 is skipped: x_3.npy ends|place 4 is skipped: no band in x_4.h5"):
        assert pixels(tolerant[3]) == pixels(data[5])
    with pytest.warns(UserWarning, match="place 9"):
        assert pixels(tolerant[9]) == pixels(data[0])
    assert tolerant.broken == {3: "x_3.npy ends", 4: "no band in x_4.h5", 9: "x_9.npy holds (3,)"}
    with warnings.catch_warnings(action="error"):  # said once
        assert [pixels(tolerant[i]) for i in (0, 3, 4, 9)] == [pixels(data[i]) for i in (0, 5, 5, 0)]
    assert len(tolerant) == 10
    for outside in (-1, 10):
        with pytest.raises(IndexError):
            tolerant[outside]


@pytest.mark.filterwarnings("ignore:place")
def test_what_is_put_in_place_does_not_depend_on_order_or_threads():
    data = build(places=30)
    broken = {i: OSError("ends") for i in (2, 3, 11, 29)}
    forward = Tolerant(_Silent(data, broken), most=0.2)
    expected = [pixels(forward[i]) for i in range(30)]
    backward = Tolerant(_Silent(data, broken), most=0.2)
    assert [pixels(backward[i]) for i in reversed(range(30))] == expected[::-1]
    shared = Tolerant(_Silent(data, broken), most=0.2)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda i: pixels(shared[i]), range(30))) == expected
    assert shared.broken.keys() == broken.keys()
    assert pixels(pickle.loads(pickle.dumps(shared))[2]) == expected[2]


@pytest.mark.filterwarnings("ignore:place")
def test_too_many_broken_places_are_an_error_and_so_are_other_mistakes():
    data = build(places=100)
    tolerant = Tolerant(_Silent(data, {i: OSError(f"{i} ends") for i in range(3)}), most=0.02)
    assert pixels(Tolerant(_Silent(data, {0: OSError("ends")}))[0]) == pixels(data[1])
    with pytest.raises(Broken, match=r"more than 2 of 100 places cannot be read\. The last: 2 ends"):
        tolerant[0]
    every = Tolerant(_Silent(build(places=2), {0: OSError("a"), 1: OSError("b")}), most=1)
    with pytest.raises(Broken, match="none of 2 places can be read"):
        every[0]
    for error in (ConnectionError("away"), TimeoutError("silent"), MemoryError(), ZeroDivisionError()):
        with pytest.raises(type(error)):
            Tolerant(_Silent(data, {0: error}), most=1)[0]
    with pytest.raises(ValueError, match="most=0"):
        Tolerant(data, most=0)


def test_it_tells_what_the_dataset_tells(tmp_path: Path):
    pastis.fake(tmp_path)
    data = pastis.build(root=tmp_path)
    assert Tolerant(data).fingerprint() == data.fingerprint()
    assert not hasattr(Tolerant(_Silent(data)), "fingerprint")
    assert not hasattr(Tolerant(data), "root")
