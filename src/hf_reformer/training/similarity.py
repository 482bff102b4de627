"""Similarity of texts by their words, for baselines."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer


def word_similarity(corpus: Iterable[str]) -> Callable[[str, Sequence[str]], np.ndarray] | None:
    """Make a function that returns the similarities of several texts (second argument) to one, by TF-IDF on `corpus`.

    Returns None if the corpus contains no word.
    """
    vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    try:
        vectorizer.fit(corpus)
    except ValueError:
        return None
    return lambda text, others: (vectorizer.transform(others) @ vectorizer.transform([text]).T).toarray().ravel()
