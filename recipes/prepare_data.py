# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Raw files -> MDS datasets: python recipes/prepare_data.py yamls/data/quickstart_emoji.yaml [key=value …]"""

import sys

from llm2clip.builders import build_source
from llm2clip.config import PrepareConfig
from llm2clip.config_files import load_config, save_config
from llm2clip.data.convert.writer import is_complete, write_splits
from llm2clip.runs import timed


def main(config: PrepareConfig) -> None:
    if is_complete(config.out):
        print(f'{config.out} is complete')
        return
    splits, dropped = build_source(config.source)
    about = {'source': config.source}
    written = write_splits(splits, dropped, config.out, config.size_limit, config.max_dropped, about)
    save_config(config, config.out)
    print(f'wrote {written}; left out: {dropped.counts() or "nothing"}')


if __name__ == '__main__':
    config = load_config(PrepareConfig, sys.argv[1:])
    with timed(config.out):
        main(config)
