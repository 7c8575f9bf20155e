"""Which places a step takes depends on (seed, step) alone, and everything is taken equally often."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from everysat.data.batches import Joined, Plan, Subset, in_order, prefetch, shard
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
