# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Queries and what an index answers."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from llm2clip.config import ConfigError
from llm2clip.search.exported import ExportedModel
from llm2clip.search.files import IMAGE_SUFFIXES
from llm2clip.search.index import Index

__all__ = ['Answer', 'Hit', 'Query', 'Searcher', 'answer_lines', 'check_queries', 'read_queries']


class Query(NamedTuple):
    """What is looked for."""

    text: str
    """A text, or the path of an image file."""
    is_image: bool


class Hit(NamedTuple):
    """An image that was found."""

    path: str
    """From the working directory if it is below it, else absolute."""
    score: float
    """Cosine of the angle between its vector and the query's."""


class Answer(NamedTuple):
    """A query's best images, best first."""

    query: Query
    hits: list[Hit]


def read_queries(value: Any) -> list[Query]:
    """The configuration's ``query``: nothing, a text, the path of an image file, or a list of them.

    What ends like an image file is one.

    Raises:
        ConfigError: There is no such image, a text is empty, or YAML has read something else than a text.
    """
    values = value if isinstance(value, list) else [] if value is None else [value]
    return [_read_query(value) for value in values]


def _read_query(value: Any) -> Query:
    if not isinstance(value, str):
        raise ConfigError(f'query: expected texts, and YAML reads {value!r}; put quotes around it')
    text = value.strip()
    if not text:
        raise ConfigError('query: a text is empty')
    is_image = text.lower().endswith(IMAGE_SUFFIXES)
    if is_image and not os.path.isfile(text):
        raise ConfigError(f'query: there is no image file {text}')
    return Query(text, is_image)


def check_queries(queries: Sequence[Query], index: Index, model: ExportedModel) -> None:
    """Make sure that texts can be answered, before the index is made.

    Raises:
        ConfigError: One is new to the index, and the model has no teacher.
    """
    texts = [query.text for query in queries if not query.is_image]
    about = index.about()
    known = index.texts(texts) if about is not None and about.model == model.fingerprint else {}
    if any(text not in known for text in texts):
        model.check_teacher()


class Searcher:
    """Answers queries from an index that it holds in memory.

    Args:
        index: Of the images.
        model: Which the index was made with; loaded only for images and for texts that are new to the index.

    Raises:
        ConfigError: There is no index, it is empty, or it was made with another model.
    """

    def __init__(self, index: Index, model: ExportedModel) -> None:
        about = index.about()
        if about is None:
            raise ConfigError(f'index: there is none in {index.folder}; give the folder of `images` to make one')
        index.claim(about._replace(model=model.fingerprint, model_folder=str(model.folder)))
        self.index = index
        self.model = model
        self.about = about
        self.paths, self.vectors = index.load()
        if not self.paths:
            raise ConfigError(f'index: {index.folder} has no image that could be read')

    def answer(self, queries: Sequence[Query], top: int) -> list[Answer]:
        """The best `top` images for each query, equally good ones in the order of their paths.

        Raises:
            ConfigError: A query is an image that cannot be read, or a new text and the model has no teacher.
        """
        if not queries:
            return []
        scores = self._embed(queries) @ self.vectors.T
        best = np.argsort(-scores, axis=1, kind='stable')[:, :top]
        return [Answer(query, [Hit(self._path(i), float(row[i])) for i in order])
                for query, row, order in zip(queries, scores, best)]

    def _path(self, place: int) -> str:
        path = os.path.join(self.about.images, self.paths[place])
        below = os.path.relpath(path)
        return path if below.startswith(os.pardir) else below

    def _embed(self, queries: Sequence[Query]) -> np.ndarray:
        """``(Q, D)``."""
        vectors = {query: vector for query, vector in [
            *self._embed_texts([query for query in queries if not query.is_image]),
            *self._embed_images([query for query in queries if query.is_image])]}
        return np.stack([vectors[query] for query in queries])

    def _embed_texts(self, queries: list[Query]) -> list[tuple[Query, np.ndarray]]:
        vectors = self.index.texts([query.text for query in queries])
        new = list(dict.fromkeys(query.text for query in queries if query.text not in vectors))
        if new:
            found = self.model.embed_texts(new)
            self.index.put_texts(new, found)
            vectors.update(zip(new, found))
        return [(query, vectors[query.text]) for query in queries]

    def _embed_images(self, queries: list[Query]) -> list[tuple[Query, np.ndarray]]:
        vectors = []
        for batch in self.model.embed_images('', [query.text for query in queries], self.about.precision):
            for place, why in batch.unreadable.items():
                raise ConfigError(f'query: {queries[place].text} {why.reason}')
            vectors += [(queries[place], vector) for place, vector in zip(batch.places, batch.vectors)]
        return vectors


def answer_lines(answer: Answer) -> list[str]:
    """For the terminal."""
    return [answer.query.text, *(f'  {hit.score:.3f}  {hit.path}' for hit in answer.hits)]
