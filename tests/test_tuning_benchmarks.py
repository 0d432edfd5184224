"""The arithmetic of the scripts that measure tuning."""

import pytest
from tuned_layers import conv_layer, dense_layer, task_of

from benchmarks.tuning_curves import LEARNED, RANDOM, best_so_far, chosen, drawn, lead, verdict
from benchmarks.tuning_gain import mean_gain
from benchmarks.tuning_optimum import BATCH, batches, small
from tvm_pivot.tuning.cost_model import WARM_UP


def test_the_best_time_so_far_never_rises() -> None:
    assert best_so_far([3.0, 4.0, 2.0, 5.0, 1.0]) == [3.0, 3.0, 2.0, 2.0, 1.0]
    assert best_so_far([]) == []


@pytest.mark.parametrize(
    ("learned", "random", "ratio", "ahead"),
    [
        ([1.0, 1.0], [2.0, 1.0], 1.5, LEARNED),
        ([2.0, 2.0], [1.0, 1.0], 0.5, RANDOM),
        ([1.0, 1.0], [1.01, 1.0], 1.005, "same"),
    ],
)
def test_who_is_ahead_counts_all_trials_but_the_shared_ones(learned, random, ratio, ahead) -> None:
    shared = [9.0] * WARM_UP
    task = {"curves": {LEARNED: shared + learned, RANDOM: shared + random}}
    assert lead(task) == pytest.approx(ratio)
    assert verdict(task) == ahead


def test_random_search_draws_every_point_once() -> None:
    task = task_of(conv_layer(size=14))
    points = drawn(task, 0)
    assert sorted(map(repr, points)) == sorted(map(repr, task.choices))
    assert points == drawn(task, 0) != drawn(task, 1)


def test_the_slowest_tasks_are_chosen() -> None:
    large, small = task_of(conv_layer(size=14)), task_of(dense_layer())
    assert chosen([small, large], 1) == [large]
    assert chosen([small, large], 5) == [large, small]


def test_every_layer_counts_in_the_mean() -> None:
    layers = [{"gain": 4.0, "layers": 1}, {"gain": 1.0, "layers": 3}]
    assert mean_gain(layers) == pytest.approx(4.0**0.25)


def test_small_spaces_are_measured_whole_and_best_predictions_first() -> None:
    tasks = [task_of(conv_layer(size=14)), task_of(dense_layer())]
    sizes = sorted(len(task.choices) for task in tasks)
    assert 1 < sizes[0] < sizes[1]
    assert [len(task.choices) for task in small(tasks, sizes[0])] == sizes[:1]
    (task,) = small(tasks, sizes[0])
    points = [choice for batch in batches(task) for choice in batch]
    assert all(len(batch) <= BATCH for batch in batches(task))
    assert sorted(map(repr, points)) == sorted(map(repr, task.choices))
    cycles = [task.choices[choice] for choice in points]
    assert cycles == sorted(cycles)
