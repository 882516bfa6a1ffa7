# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Export of a teacher as a sentence-transformers folder that contains the code to load it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Optional, Union

from llm2clip.errors import missing_extra
from llm2clip.export.model_card import teacher_card
from llm2clip.io.files import write_json
from llm2clip.io.folders import atomic_folder, check_replaceable
from llm2clip.modeling import copy_code
from llm2clip.teacher.llm import teacher_config, teacher_fingerprint

try:
    from sentence_transformers import SentenceTransformer

    from llm2clip.modeling.caption_encoder import CaptionEncoder
except ImportError as error:
    raise missing_extra('this export', 'sentence-transformers', error) from None

KIND = 'sentence-transformers model'


def export_sentence_transformers(
    teacher: Union[str, Path], out: Union[str, Path], prompts: Optional[Mapping[str, str]] = None
) -> None:
    """Write a folder for `SentenceTransformer(out, trust_remote_code=True)`,
    which does not need this package.

    Args:
        teacher: Folder that stage 1 wrote.
        out: Output folder.
        prompts: Name -> instruction.  Unset, ``query`` is the teacher's own instruction, if it has one.

    Raises:
        ConfigError: The folder is not a teacher, or `out` holds something else.
        LoadError: The teacher is damaged.
    """
    check_replaceable(out, KIND)
    instruction = teacher_config(teacher).instruction
    if prompts is None:
        prompts = {'query': instruction} if instruction else {}
    model = SentenceTransformer(modules=[CaptionEncoder.load(str(teacher))], prompts=dict(prompts),
                                similarity_fn_name='cosine', device='cpu')
    with atomic_folder(out, KIND) as partial:
        model.save(str(partial), create_model_card=False)
        copy_code(['caption_encoder', 'checks', 'text_encoder'], partial)
        write_json(partial / 'modules.json', [{
            'idx': 0, 'name': '0', 'path': '', 'type': 'caption_encoder.CaptionEncoder'}])
        teacher_card(teacher, teacher_fingerprint(partial)).save(partial / 'README.md')
