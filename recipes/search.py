# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Search images by text or image:
python recipes/search.py model=runs/custom/export/llm2clip images=photos query='a dog on the beach'"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from llm2clip.command import run_command
from llm2clip.config import SearchConfig
from llm2clip.errors import ConfigError


def main(config: SearchConfig) -> None:
    from llm2clip.device import get_device, set_up_process
    from llm2clip.io.files import printable
    from llm2clip.search import embed_images, embed_query, is_image, load_model, nearest

    queries: list[Any] = []
    if isinstance(config.query, list):
        queries = config.query
    elif config.query is not None:
        queries = [config.query]
    for query in queries:
        is_text = isinstance(query, str) and query.strip() != ''
        is_missing = is_text and is_image(query) and not os.path.isfile(query)
        if not is_text or is_missing:
            raise ConfigError(f'expected a text or the path of an image file, found {query!r}', key='query')
    device = get_device(config.device)
    set_up_process(device, config.precision)
    model, fingerprint = load_model(config, device, queries)
    paths, images = embed_images(config, model, fingerprint)
    for query in queries:
        features = embed_query(model, Path(query) if is_image(query) else query)
        print(printable(query))
        for i, score in nearest(images, features, config.top):
            print(f'  {score:.3f}  {printable(paths[i])}')


def quoted(argument: str) -> str:
    """Quote a query, since YAML would cut ``query=dog #1``; not a list, a mapping or a text in quotes."""
    query = argument.removeprefix('query=')
    if query == argument or query.startswith(('[', '{', '"', "'")):
        return argument
    return f'query={json.dumps(query)}'


if __name__ == '__main__':
    run_command(SearchConfig, main, [quoted(argument) for argument in sys.argv[1:]])
