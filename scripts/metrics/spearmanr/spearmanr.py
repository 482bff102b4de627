"""Spearman correlation: Pearson correlation of the ranks; 0 when one of them is constant."""

import datasets
import evaluate
import numpy as np
from scipy.stats import spearmanr


class Spearman(evaluate.Metric):
    """`evaluate.load("scripts/metrics/spearmanr")`."""

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float32")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions, references: numbers",
            features=datasets.Features(predictions=number, references=number),
        )

    def _compute(self, predictions: list, references: list) -> dict[str, float]:
        if np.ptp(predictions) == 0 or np.ptp(references) == 0:
            return {"spearmanr": 0.0}
        return {"spearmanr": float(spearmanr(predictions, references).statistic)}
