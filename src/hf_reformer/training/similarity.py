"""How similar texts are in their words: what baselines choose by."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer


def word_similarity(corpus: Iterable[str]) -> Callable[[str, Sequence[str]], np.ndarray] | None:
    """A function that tells how similar each of several texts (its second argument) is to one, by TF-IDF on `corpus`.

    None where the corpus has not one word.
    """
    vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    try:
        vectorizer.fit(corpus)
    except ValueError:
        return None
    return lambda text, others: (vectorizer.transform(others) @ vectorizer.transform([text]).T).toarray().ravel()
