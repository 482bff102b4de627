"""Share of right predictions; for several labels per text, share of texts whose set of labels is right."""

import datasets
import evaluate
from sklearn.metrics import accuracy_score


class Accuracy(evaluate.Metric):
    """`evaluate.load("scripts/metrics/accuracy")`; configuration `"multilabel"` takes a 0/1 vector per text."""

    def _info(self) -> evaluate.MetricInfo:
        label = datasets.Value("int32")
        if self.config_name == "multilabel":
            label = datasets.Sequence(label)
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions, references: class numbers",
            features=datasets.Features(predictions=label, references=label),
        )

    def _compute(self, predictions: list, references: list) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}
