# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Images found by a text or an image:
python recipes/search.py model=runs/quickstart/export/llm2clip images=photos query='a dog on the beach' html=out.html"""

import sys

from llm2clip.command import run_command
from llm2clip.config import ConfigError, SearchConfig
from llm2clip.search.arguments import literal_queries


def main(config: SearchConfig) -> None:
    from llm2clip.search.answers import Searcher, answer_lines, check_queries, read_queries
    from llm2clip.search.exported import ExportedModel
    from llm2clip.search.index import Index
    from llm2clip.search.page import write_page
    from llm2clip.search.prompt import typed_answers
    from llm2clip.search.update import update_index

    queries = read_queries(config.query)
    if config.top < 1:
        raise ConfigError(f'top: {config.top} is less than 1')
    model, index = ExportedModel(config.model, config.device), Index(config.index)
    check_queries(queries, index, model)
    if config.images is not None:
        update = update_index(index, model, config.images, config.precision, config.batch_size, config.num_workers,
                              config.replace)
        print(f'{config.index}:', '\n'.join(update.lines()), file=sys.stderr)
    searcher = Searcher(index, model)
    if not index.finished:
        print(f'{config.index}: not finished; give `images` to go on with it', file=sys.stderr)

    answers = searcher.answer(queries, config.top)
    for answer in answers:
        print('\n'.join(answer_lines(answer)))
    about = f'{len(searcher.paths):,} images of {searcher.about.images}, {config.model}'
    if config.html is not None and answers:
        write_page(config.html, answers, about, config.html_embed)
        print(f'wrote {config.html}', file=sys.stderr)
    if not queries and sys.stdin.isatty():
        for answer in typed_answers(lambda queries: searcher.answer(queries, config.top)):
            answers.insert(0, answer)
            if config.html is not None:
                write_page(config.html, answers, about, config.html_embed)


if __name__ == '__main__':
    run_command(SearchConfig, main, literal_queries(sys.argv[1:]))
