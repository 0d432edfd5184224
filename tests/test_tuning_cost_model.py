"""The cost model of searches: predictions, corrected by what was measured."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from tuned_layers import AVX2, conv_layer, task_of
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.meta_schedule.runner import RunnerResult

from tvm_pivot.schedules.choices import Choice
from tvm_pivot.schedules.problems import PlanesTile
from tvm_pivot.tuning.cost_model import WARM_UP, CorrectedPredictions
from tvm_pivot.tuning.explore import without_intrinsics
from tvm_pivot.tuning.features import ChoiceFeatures
from tvm_pivot.tuning.space import Points, candidate, task_module

TASK = task_of(conv_layer(size=14))
POINTS = Points(TASK.choices)
with without_intrinsics():
    CONTEXT = ms.TuneContext(mod=task_module(TASK.key), num_threads=1)


def candidates(choices: Sequence[Choice]) -> list[ms.search_strategy.MeasureCandidate]:
    return [
        ms.search_strategy.MeasureCandidate(candidate(TASK, POINTS, choice), [])
        for choice in choices
    ]


def model_of(choices: Sequence[Choice], cost: Callable[[Choice], float]) -> CorrectedPredictions:
    """A model that was told the times of some choices."""
    features = ChoiceFeatures(AVX2)
    name = str(CONTEXT.mod["main"].attrs["pivot.task"])
    features.add(name, TASK.choices)
    model = CorrectedPredictions(features)
    if choices:
        times = [RunnerResult([cost(choice)] * 3, None) for choice in choices]
        model.update(CONTEXT, candidates(choices), times)
    return model


def as_predicted(choice: Choice) -> float:
    return 1e-9 * TASK.choices[choice]


def scores(model: CorrectedPredictions, choices: Sequence[Choice]) -> npt.NDArray[np.float64]:
    return np.asarray(model.predict(CONTEXT, candidates(choices)))


def drawn(count: int, seed: int = 0) -> list[Choice]:
    return random.Random(seed).sample(list(TASK.choices), count)


def test_what_is_as_predicted_is_ranked_as_predicted() -> None:
    choices = drawn(120)
    found = scores(model_of(drawn(16), as_predicted), choices)
    predicted = np.array([TASK.choices[choice] for choice in choices])
    assert predicted.max() > 1.1 * predicted.min()
    order = np.argsort(-found, kind="stable")
    assert np.all(np.diff(predicted[order]) >= -1e-3 * predicted.min())


def test_what_takes_longer_than_predicted_is_learnt() -> None:
    def panels_are_slow(choice: Choice) -> float:
        assert isinstance(choice.tile, PlanesTile)
        return as_predicted(choice) * (1.5 if choice.tile.panel else 1.0)

    known, rest = drawn(160)[:48], drawn(160)[48:]
    times = np.array([panels_are_slow(choice) for choice in rest])
    found = scores(model_of(known, panels_are_slow), rest)
    before = scores(model_of(known, as_predicted), rest)
    assert times[found.argmax()] < 1.05 * times.min()
    correlation = [np.corrcoef(one, 1 / times)[0, 1] for one in (found, before)]
    assert correlation[0] > 0.9 > correlation[1]


def test_before_anything_is_known_scores_are_random() -> None:
    choices = drawn(WARM_UP)
    one = model_of([], as_predicted)
    assert not np.array_equal(scores(one, choices), scores(one, choices))
