"""Metrics of classification and regression in one module for `evaluate`, which needs no download.

`evaluate.load("…/hf_reformer/training/metrics.py", name)` loads the score `name`: accuracy, f1, matthews_correlation,
pearsonr or spearmanr. Predictions and references are class numbers, 0/1 vectors of several labels, or (for the
correlations) numbers. Further arguments of `compute` go to scikit-learn.
"""

from functools import partial

import datasets
import evaluate
import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

CORRELATIONS = {"pearsonr": pearsonr, "spearmanr": spearmanr}
SCORES = {
    "accuracy": accuracy_score,
    "f1": partial(f1_score, average="macro", zero_division=0),
    "matthews_correlation": matthews_corrcoef,
}


class Score(evaluate.Metric):
    """The metric that the configuration names."""

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in CORRELATIONS | SCORES:
            raise ValueError(f"There is no metric {self.config_name!r}; choose of {', '.join(CORRELATIONS | SCORES)}.")
        label, number = datasets.Value("int32"), datasets.Value("float32")
        kinds = [number] if self.config_name in CORRELATIONS else [label, datasets.Sequence(label)]
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions, references",
            features=[datasets.Features(predictions=kind, references=kind) for kind in kinds],
        )

    def _compute(self, predictions: list, references: list, **options: object) -> dict[str, float]:
        if self.config_name in SCORES:
            score = SCORES[self.config_name](references, predictions, **options)
        elif np.ptp(predictions) == 0 or np.ptp(references) == 0:
            score = 0.0  # a correlation with a constant is not defined
        else:
            score = CORRELATIONS[self.config_name](predictions, references).statistic
        return {self.config_name: float(score)}
