# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Search images by text or image:
python recipes/search.py model=runs/quickstart/export/llm2clip images=photos query='a dog on the beach'"""

import json
import os
import sys
from pathlib import Path

from llm2clip.command import run_command
from llm2clip.config import ConfigError, SearchConfig


def main(config: SearchConfig) -> None:
    from llm2clip.device import open_device
    from llm2clip.files import printable
    from llm2clip.search import embed_images, embed_query, is_image, load_model, nearest

    queries = config.query if isinstance(config.query, list) else [config.query] if config.query is not None else []
    for query in queries:
        if not isinstance(query, str) or not query.strip() or is_image(query) and not os.path.isfile(query):
            raise ConfigError(f'query: expected a text or the path of an image file, found {query!r}')
    model, fingerprint = load_model(config, open_device(config.device, config.precision), queries)
    paths, images = embed_images(config, model, fingerprint)
    for query in queries:
        found = nearest(images, embed_query(model, Path(query) if is_image(query) else query), config.top)
        print(printable(query))
        for i, score in found:
            print(f'  {score:.3f}  {printable(paths[i])}')


if __name__ == '__main__':
    # Quote the query, since YAML would cut ``query=dog #1``.  YAML reads lists, mappings and quoted texts.
    run_command(SearchConfig, main, [f'query={json.dumps(arg[6:])}' if arg.startswith('query=') and arg[6:7] not in
                                     ('[', '{', '"', "'") else arg for arg in sys.argv[1:]])
