# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Convert raw files to MDS datasets: python recipes/prepare_data.py yamls/quickstart/steps.yaml"""

from llm2clip.command import run_command
from llm2clip.config import PrepareConfig
from llm2clip.config.loading import save_config


def main(config: PrepareConfig) -> None:
    from llm2clip.data.convert.writer import is_written, write_splits
    from llm2clip.io.files import read_json
    from llm2clip.io.remotes import OutputFolder
    from llm2clip.registry import build_source

    out = OutputFolder(config.out, config.out_remote)
    description = {'source': config.source}
    if is_written(out, description, config):
        save_config(config, config.out)  # a killed call may have written all but that
        print(f'{out} is complete; convert new input files into another `out`')
        return
    splits, dropped = build_source(config.source)
    written = write_splits(splits, dropped, out, config, description)
    if written is None:
        print('this machine is done; another one writes the index when all are')
        return
    save_config(config, config.out)
    left_out = read_json(out.local / 'dataset.json', dict)['dropped']
    samples = ', '.join(f'{split} {n:,}' for split, n in written.items())
    print(f'wrote {out}, samples: {samples}; left out: '
          f'{", ".join(f"{n} {reason}" for reason, n in left_out.items()) or "none"}')


if __name__ == '__main__':
    run_command(PrepareConfig, main)
