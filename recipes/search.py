# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Images found by a text or an image:
python recipes/search.py model=runs/quickstart/export/llm2clip images=photos query='a dog on the beach' html=out.html"""

import json
import sys

from llm2clip.command import run_command
from llm2clip.config import ConfigError, SearchConfig


def main(config: SearchConfig) -> None:
    from llm2clip.device import open_device
    from llm2clip.evaluation.gallery import write_search_page
    from llm2clip.files import printable
    from llm2clip.ranks import is_first, meet
    from llm2clip.search import IndexFormat, is_image, load_model, read_index, read_queries, search, update_index

    queries = read_queries(config.query)
    if not queries and config.images is None:
        raise ConfigError('query: expected a text or the path of an image, since there are no `images` to index')
    meet()
    model, fingerprint = load_model(config.model, open_device(config.device, config.precision),
                                    not all(map(is_image, queries)), config.precision, config.dim,
                                    config.trust_remote_code)
    how = IndexFormat(config.precision, config.dim, config.storage)
    index = read_index(config.index, fingerprint, config.images, how)
    said = update_index(index, model, config.batch_size, config.num_workers) if config.images is not None else None
    if not is_first():
        return
    if said is not None:
        print(printable(said), file=sys.stderr)
    elif index.missing:
        print(f'{index.file}: {index.missing:,} images are missing; give `images` to go on with them', file=sys.stderr)
    answers = list(zip(queries, search(index, model, queries, config.top)))
    for query, hits in answers:
        print(printable('\n'.join([query, *(f'  {score:.3f}  {path}' for path, score in hits)])))
    if config.html is not None:
        seen = f'The best of {len(index.entries):,} images in {index.images}, by {config.model}.'
        write_search_page(config.html, seen, answers)
        print(f'wrote {config.html}', file=sys.stderr)


def as_typed(arg: str) -> str:
    """An argument, with a text as it is typed: YAML would cut ``query=dog #1`` and read ``query=1`` as a number.

    What begins with a bracket or a quote is left to YAML.
    """
    value = arg.removeprefix('query=')
    return arg if value == arg or value.startswith(('[', '"', "'")) else f'query={json.dumps(value)}'


if __name__ == '__main__':
    run_command(SearchConfig, main, list(map(as_typed, sys.argv[1:])))
