"""Matthews correlation: +1 is perfect, 0 no better than chance, also with unbalanced classes."""

import datasets
import evaluate
from sklearn.metrics import matthews_corrcoef


class MatthewsCorrelation(evaluate.Metric):
    """`evaluate.load("scripts/metrics/matthews_correlation")`."""

    def _info(self) -> evaluate.MetricInfo:
        label = datasets.Value("int32")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions, references: class numbers",
            features=datasets.Features(predictions=label, references=label),
        )

    def _compute(self, predictions: list, references: list) -> dict[str, float]:
        return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}
