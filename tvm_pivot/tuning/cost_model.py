"""Cost models of searches: MetaSchedule's XGBoost, and predicted cycles that it corrects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.meta_schedule.cost_model import PyCostModel
from tvm.s_tir.meta_schedule.runner import RunnerResult

from .features import ChoiceFeatures

WARM_UP = 8


def xgb_model(extractor: Any) -> Any:
    """MetaSchedule's cost model, that learns from few trials on."""
    return ms.cost_model.XGBModel(
        extractor=extractor,
        num_warmup_samples=WARM_UP,
        num_tuning_cores=1,
        early_stopping_rounds=20,
        verbose_eval=0,
    )


@derived_object
class CorrectedPredictions(PyCostModel):  # type: ignore[misc]
    """The target's predicted cycles, and XGBoost for how much longer than these a candidate takes.

    A few dozen trials cannot teach what a prediction knows already, but where it is wrong.
    """

    def __init__(self, extractor: ChoiceFeatures) -> None:
        super().__init__()
        self.extractor = extractor
        self.corrections = xgb_model(extractor)

    def update(
        self, context: Any, candidates: Sequence[Any], results: Sequence[RunnerResult]
    ) -> None:
        """Learn from candidates of one task; those without a prediction teach nothing."""
        predicted = self.extractor.predictions(context, candidates)
        known = [i for i, cycles in enumerate(predicted) if cycles is not None]
        over = [_over(results[i], predicted[i] or 1.0) for i in known]
        self.corrections.update(context, [candidates[i] for i in known], over)

    def predict(self, context: Any, candidates: Sequence[Any]) -> npt.NDArray[np.float64]:
        """Scores, higher for faster candidates."""
        cycles = [p or 1.0 for p in self.extractor.predictions(context, candidates)]
        # Scores may be negative: what is closer to zero then, is not faster.
        scores = np.maximum(self.corrections.predict(context, candidates), 0.0)
        return np.asarray(scores / np.array(cycles), np.float64)


def _over(result: RunnerResult, cycles: float) -> RunnerResult:
    """Times over predicted cycles; a candidate that has failed has none."""
    seconds = [float(value) / cycles for value in result.run_secs or []]
    return RunnerResult(seconds or None, result.error_msg)
