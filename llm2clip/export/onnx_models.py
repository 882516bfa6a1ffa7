# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Export for ONNX Runtime: the vision tower, the text adapter and, if wanted, the LLM that embeds captions."""

import copy
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional, Union

import torch
import torch.nn as nn
from composer.devices import DeviceCPU
from transformers import AutoImageProcessor

from llm2clip.config import ConfigError, ModelConfig, Stage2Config
from llm2clip.data.image_processing_llm2clip import upright_rgb
from llm2clip.export.check import check_pictures, check_same, noise
from llm2clip.export.model_card import model_card
from llm2clip.export.vision import save_image_processor, upright_source
from llm2clip.files import write_json
from llm2clip.folders import atomic_folder
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.vision_encoder import split_frozen_batch_norms
from llm2clip.remote_code.checks_llm2clip import keep_readable
from llm2clip.teacher.caption_teacher import TeacherSource
from llm2clip.teacher.fingerprint import TeacherRecord
from llm2clip.teacher.llm import cast_weights
from llm2clip.teacher.sources import LLMTeacher

try:
    import onnxruntime
    import onnxscript  # noqa: F401  # torch.onnx needs it
except ImportError as error:
    raise ConfigError(f"format: onnx needs onnxruntime and onnxscript: pip install '.[onnx]' ({error})") from None

__all__ = ['KIND', 'export_onnx']

KIND = 'ONNX export'
# Relative to the largest value.  It implies a cosine above 0.9999 for up to 10,000 dimensions.
_TOLERANCE = 1e-4
_TEXTS = ['a dog', 'two children in red coats run along a beach at low tide', 'a sign in front of a shop']


class _Method(nn.Module):
    """A method of a module as a module of its own, for `torch.onnx`."""

    def __init__(self, method: Any) -> None:
        super().__init__()
        self.module, self.method = method.__self__, method

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.method(*inputs)


def _write(
    path: Path, opset: int, what: str, method: Any, inputs: dict[str, torch.Tensor], output: str, *dims: str
) -> Callable[..., torch.Tensor]:
    """Write a method of a module as an ONNX model; return a function that runs it.

    Args:
        path: File to write.
        opset: Version of ONNX's operators.
        what: Name of the part, for the error message.
        method: Method of tensors.
        inputs: Name -> example of each argument.
        output: Name of the result.
        dims: Names of the inputs' first dimensions, which may have any size.
    """
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)  # hundreds of lines about graph optimisations
    try:
        torch.onnx.export(
            _Method(method).eval(), tuple(inputs.values()), path, dynamo=True, verbose=False, external_data=False,
            opset_version=opset, input_names=list(inputs), output_names=[output],
            dynamic_shapes=(tuple(dict(enumerate(dims)) for _ in inputs),))
        session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    except Exception as error:
        reason = str(error.__cause__ or error).strip().split('\n')[0]
        raise ConfigError(f'format: onnx cannot express {what} with opset {opset} ({reason})') from error
    finally:
        logging.disable(level)
    return lambda *values: torch.from_numpy(
        session.run(None, {name: value.numpy() for name, value in zip(inputs, values)})[0])


def export_onnx(
    model: LLM2CLIP, config: ModelConfig, record: TeacherRecord, out: Union[str, Path], projection: bool = True,
    run: Optional[Stage2Config] = None, wise_ft_alpha: float = 1.0, opset: int = 20,
    teachers: Sequence[TeacherSource] = (),
) -> str:
    """Write ``model.onnx`` for images, with the projection ``adapter.onnx`` for text embeddings, and with a teacher
    ``text_encoder.onnx`` for tokens.

    The folder is read back by ONNX Runtime, and appears only if it gives the features of `model` and of the teacher.

    Args:
        model: Trained model in evaluation mode.
        config: Configuration of the model.
        record: Record of the teachers in training, for the model card.
        out: Output folder.
        projection: Include the projection and L2 normalisation; otherwise write the tower's pooled features.
        run: Configuration of the run, for the model card.
        wise_ft_alpha: Weight of the trained weights in the WiSE-FT average, for the model card.
        opset: Version of ONNX's operators.
        teachers: The LLM to export; empty to export none.

    Returns:
        Names of the files.

    Raises:
        ConfigError: ONNX cannot express a part, the teacher is not one LLM, or the export gives other features.
    """
    teacher: Any = teachers[0].load(DeviceCPU()) if len(teachers) == 1 else None
    if teachers and not isinstance(teacher, LLMTeacher):
        raise ConfigError(f'teacher: {", ".join(source.name for source in teachers)}, expected one LLM; leave it out, '
                          'and embed texts by the library of the teacher')
    model = copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format)
    split_frozen_batch_norms(model.vision_encoder.trunk)  # torch.onnx folds them into constants
    preprocessing, width = model.vision_encoder.preprocessing, record.llm_embed_dim
    size, texts = preprocessing.image_size, model.get_text_features
    images: Any = model.get_image_features if projection else model.vision_encoder.forward
    with atomic_folder(out, KIND) as partial:
        found = _write(partial / 'model.onnx', opset, f'the vision tower {config.vision.name}', images,
                       {'pixel_values': noise(2, 3, size, size)}, 'image_features' if projection else 'pooled', 'batch')
        check_same(found, images, noise(3, 3, size, size), 'model.onnx', _TOLERANCE)
        save_image_processor(preprocessing, partial)
        processor: Any = AutoImageProcessor.from_pretrained(partial, trust_remote_code=False)
        check_pictures(lambda image: found(processor(upright_rgb(image), return_tensors='pt')['pixel_values']), images,
                       preprocessing, 'model.onnx', _TOLERANCE)
        if projection:
            found = _write(partial / 'adapter.onnx', opset, f'the adapter {config.adapter.name}', texts,
                           {'text_embedding': noise(2, width)}, 'text_features', 'batch')
            check_same(found, texts, noise(3, width), 'adapter.onnx', _TOLERANCE)
        if teacher is not None:
            cast_weights(teacher.module.llm, torch.float32)
            tokenizer = teacher.tokenizer
            found = _write(partial / 'text_encoder.onnx', opset, f'the LLM {teachers[0].name}', teacher.module.forward,
                           tokenizer(_TEXTS[:2]), 'text_embedding', 'batch', 'length')
            inputs = tokenizer(_TEXTS)
            check_same(lambda _: found(*inputs.values()), lambda _: teacher.embed(_TEXTS).vectors,
                       inputs['input_ids'], 'text_encoder.onnx', _TOLERANCE)
            tokenizer.tokenizer.save_pretrained(partial)
            keep_readable(partial)
            frame = {'header': tokenizer.header, 'footer': tokenizer.footer}
            write_json(partial / 'tokens.json', {**frame, 'pad': tokenizer.pad_id, 'max_caption_tokens':
                                                 tokenizer.max_length - sum(map(len, frame.values()))})
        card = model_card(config, record.teacher, run, wise_ft_alpha, template='onnx.md.j2', title='LLM2CLIP, ONNX',
                          library_name='onnx', pipeline_tag='image-feature-extraction', projection=projection,
                          teachers=[source.name for source in teachers], text_encoder=bool(teachers),
                          upright_source=upright_source())
        card.save(partial / 'README.md')
        return ', '.join(sorted(path.name for path in partial.glob('*.onnx')))
