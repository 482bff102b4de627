"""F1: harmonic mean of precision and recall."""

import datasets
import evaluate
from sklearn.metrics import f1_score


class F1(evaluate.Metric):
    """`evaluate.load("scripts/metrics/f1")`; configuration `"multilabel"` takes a 0/1 vector per text."""

    def _info(self) -> evaluate.MetricInfo:
        label = datasets.Value("int32")
        if self.config_name == "multilabel":
            label = datasets.Sequence(label)
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions, references: class numbers; average: as in scikit-learn",
            features=datasets.Features(predictions=label, references=label),
        )

    def _compute(self, predictions: list, references: list, average: str = "macro") -> dict[str, float]:
        return {"f1": float(f1_score(references, predictions, average=average, zero_division=0))}
