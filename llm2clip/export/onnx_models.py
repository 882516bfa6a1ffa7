# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Export for ONNX Runtime: the vision tower, the text adapter and, if wanted,
the LLM that embeds captions."""

import copy
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional, Union

import torch
import torch.nn as nn
from composer.devices import DeviceCPU
from peft import PeftModel
from transformers import AutoImageProcessor

from llm2clip.config import ModelConfig, Stage2Config
from llm2clip.errors import ConfigError, missing_extra
from llm2clip.export.check import check_pictures, check_same, noise
from llm2clip.export.model_card import model_card
from llm2clip.export.vision import save_image_processor, upright_source
from llm2clip.io.files import write_json
from llm2clip.io.folders import atomic_folder
from llm2clip.modeling.checks import keep_readable
from llm2clip.modeling.image_processing_llm2clip import upright_rgb
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.teacher.caption_teacher import TeacherSource
from llm2clip.teacher.fingerprint import TeacherRecord
from llm2clip.teacher.llm import cast_weights
from llm2clip.teacher.sources import LLMTeacher

try:
    import onnxruntime
    import onnxscript  # noqa: F401  # torch.onnx needs it
except ImportError as error:
    raise missing_extra('format: onnx', 'onnx', error) from None

KIND = 'ONNX export'
_OPSET = 18  # the one that torch.onnx writes without conversion
# Relative to the largest value; up to 10,000 dimensions, the cosine is then above 0.9999.
_TOLERANCE = 1e-4
_TEXTS = ['a dog', 'two children in red coats on a beach',
          'a sign in front of a shop that is closed all winter']


class _Method(nn.Module):
    """A method of a module as a module of its own."""

    def __init__(self, method: Any) -> None:
        super().__init__()
        self.module, self.method = method.__self__, method

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.method(*inputs)


def _write(
    path: Path, subject: str, method: Callable[..., torch.Tensor], output: str,
    inputs: Callable[[int], dict[str, torch.Tensor]], *dims: str,
) -> Callable[..., torch.Tensor]:
    """Write a method of a module as an ONNX model, compare both, and return a function that runs the model.

    `inputs` makes arguments for a batch of any size; their first dimensions, named by `dims`, may vary.
    """
    examples = inputs(2)
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)  # hundreds of lines about optimisations of the graph
    try:
        torch.onnx.export(
            _Method(method).eval(), tuple(examples.values()), path, dynamo=True, verbose=False,
            external_data=False, opset_version=_OPSET, input_names=list(examples), output_names=[output],
            dynamic_shapes=(tuple(dict(enumerate(dims)) for _ in examples),))
        session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    except Exception as error:
        reason = str(error.__cause__ or error).strip().split('\n')[0]
        message = f'onnx, opset {_OPSET}, cannot express {subject} ({reason})'
        raise ConfigError(message, key='format') from error
    finally:
        logging.disable(level)

    def run(*values: torch.Tensor) -> torch.Tensor:
        arrays = {name: value.numpy() for name, value in zip(examples, values)}
        return torch.from_numpy(session.run(None, arrays)[0])

    larger = inputs(3).values()
    check_same(lambda _: run(*larger), lambda _: method(*larger), torch.empty(0), path.name, _TOLERANCE)
    return run


def export_onnx(
    model: LLM2CLIP, config: ModelConfig, record: TeacherRecord, out: Union[str, Path],
    projection: bool = True, run: Optional[Stage2Config] = None, wise_ft_alpha: float = 1.0,
    teachers: Sequence[TeacherSource] = (),
) -> str:
    """Write ``model.onnx`` for images, ``adapter.onnx`` for text embeddings,
    and with a teacher ``text_encoder.onnx``.

    The folder appears only if ONNX Runtime computes the features of `model` from it.  Arguments are those of
    `export_vision`.  Without `projection`, ``model.onnx`` gives the tower's pooled features,
    and there is no adapter.

    Returns:
        Names of the files.

    Raises:
        ConfigError: ONNX cannot express a part, `teachers` is not one LLM or none, or features differ.
    """
    teacher: Any = teachers[0].load(DeviceCPU()) if len(teachers) == 1 else None
    if teachers and not isinstance(teacher, LLMTeacher):
        raise ConfigError(f'{", ".join(source.name for source in teachers)}, expected one LLM; leave it out, '
                          'and embed texts by the library of the teacher', key='teacher')
    model = copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format)
    preprocessing = model.vision_encoder.preprocessing
    size = preprocessing.image_size
    if projection:
        features, output = model.get_image_features, 'image_features'
    else:
        features, output = model.vision_encoder.forward, 'pooled'
    with atomic_folder(out, KIND) as partial:
        exported = _write(partial / 'model.onnx', f'the vision tower {config.vision.name}', features, output,
                          lambda n: {'pixel_values': noise(n, 3, size, size)}, 'batch')
        save_image_processor(preprocessing, partial)
        processor: Any = AutoImageProcessor.from_pretrained(partial, trust_remote_code=False)
        check_pictures(lambda image: exported(processor(upright_rgb(image),
                                                        return_tensors='pt')['pixel_values']),
                       features, preprocessing, 'model.onnx', _TOLERANCE)
        if projection:
            _write(partial / 'adapter.onnx', f'the adapter {config.adapter.name}', model.get_text_features,
                   'text_features', lambda n: {'text_embedding': noise(n, record.llm_embed_dim)}, 'batch')
        if teacher is not None:
            cast_weights(teacher.module.llm, torch.float32)
            if isinstance(teacher.module.llm, PeftModel):  # beside bfloat16, LoRA is not merged
                teacher.module.llm = teacher.module.llm.merge_and_unload()
            tokenizer = teacher.tokenizer
            _write(partial / 'text_encoder.onnx', f'the LLM {teachers[0].name}', teacher.module.forward,
                   'text_embedding', lambda n: tokenizer(_TEXTS[:n]), 'batch', 'length')
            tokenizer.tokenizer.save_pretrained(partial)
            keep_readable(partial)
            room = tokenizer.max_length - len(tokenizer.header) - len(tokenizer.footer)
            write_json(partial / 'tokens.json', {'header': tokenizer.header, 'footer': tokenizer.footer,
                                                 'pad': tokenizer.pad_id, 'max_caption_tokens': room})
        card = model_card(config, record.teacher, run, wise_ft_alpha, template='onnx.md.j2',
                          title='LLM2CLIP, ONNX', library_name='onnx',
                          pipeline_tag='image-feature-extraction', projection=projection,
                          teachers=[source.name for source in teachers], text_encoder=teacher is not None,
                          upright_source=upright_source())
        card.save(partial / 'README.md')
        return ', '.join(sorted(path.name for path in partial.glob('*.onnx')))
