# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Benchmark ONNX Runtime against PyTorch: milliseconds of one image or caption on one CPU core,
and recall@10.

ONNX Runtime's own tools write the models in float16 and int8.
python -m recipes.benchmarks.onnx_runtime [RUN DATASET]"""

import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, Optional

import onnx
import torch
from onnxruntime import InferenceSession, SessionOptions  # pyright: ignore[reportAttributeAccessIssue]
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
from onnxruntime.transformers.float16 import convert_float_to_float16

from llm2clip.data.images import Preprocessing, decode_pixels
from llm2clip.device import open_device
from llm2clip.evaluation.retrieval_results import evaluate_retrieval
from llm2clip.evaluation.retrieval_sets import open_retrieval_set
from llm2clip.export.onnx_models import export_onnx
from llm2clip.modeling.image_processing_llm2clip import normalize, resize_and_crop
from llm2clip.teacher.llm import cast_weights
from llm2clip.training.runs import Stage2Run
from recipes.benchmarks.measuring import BENCH_FOLDER, markdown_table, seconds_in_turns, write_result

QUICKSTART = 'runs/quickstart/stage2', 'runs/quickstart/data/emoji/unseen_style'
BATCH, CALIBRATION, LATENCY_ROUNDS = 32, 64, 31


class Calibration(CalibrationDataReader):
    """Training images, one at a time, for the ranges of a static quantisation."""

    def __init__(self, pixels: torch.Tensor) -> None:
        self.images = iter([{'pixel_values': image.numpy()} for image in pixels.split(1)])

    def get_next(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return next(self.images, None)


def smaller(model: Path, calibration: Optional[torch.Tensor] = None) -> dict[str, Path]:
    """Write a model in float16, in int8 by dynamic quantisation and, with images,
    in int8 by static quantisation."""
    paths = {kind: model.with_name(f'{model.stem}.{kind}.onnx')
             for kind in ('float16', 'int8', 'int8_static')}
    onnx.save(convert_float_to_float16(onnx.load(model), keep_io_types=True), paths['float16'])
    quantize_dynamic(model, paths['int8'], per_channel=True)
    if calibration is None:
        paths.pop('int8_static')
    else:
        quantize_static(model, paths['int8_static'], Calibration(calibration), per_channel=True,
                        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)
    return {'float32': model} | paths


def run_session(session: InferenceSession, **inputs: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(session.run(None, {name: x.numpy() for name, x in inputs.items()})[0])


def read_pixels(dataset: str, preprocessing: Preprocessing, first: Optional[int] = None) -> torch.Tensor:
    """Return the normalized pixels of the `first` images of a dataset; unset, of all."""
    images = open_retrieval_set(dataset)
    pixels = []
    for i, image_id in enumerate(images.image_ids[:first]):
        image = decode_pixels(images.read_image(i), image_id)
        pixels.append(resize_and_crop(image, preprocessing.image_size))
    return normalize(torch.stack(pixels), preprocessing.mean, preprocessing.std)


def table(results: dict[str, dict[str, Any]]) -> str:
    """Format one line per program."""
    rows = []
    for name, result in results.items():
        recalls = [f'{result[f"{direction}_retrieval_recall@10"]:.1f}' for direction in ('image', 'text')]
        rows.append([name.replace('_', ', ', 1), f'{result["milliseconds"]:.1f}', f'{result["MiB"] or 0:.0f}',
                     f'{result["cosine"]:.4f}', *recalls])
    return markdown_table(['one core', 'ms', 'MiB', 'cosine', 'R@10 text → image', 'R@10 image → text'], rows)


@torch.no_grad()
def main(run: str, dataset: str) -> None:
    if (run, dataset) == QUICKSTART:
        subprocess.run(['make', f'{run}/finished'], check=True)
    torch.set_num_threads(1)
    one_thread = SessionOptions()
    one_thread.intra_op_num_threads = 1
    trained = Stage2Run(run)
    model, config = trained.load_model(), trained.config
    source, = trained.teachers()
    teacher: Any = source.load(open_device('cpu'))
    cast_weights(teacher.module.llm, torch.float32)
    preprocessing = model.vision_encoder.preprocessing
    calibration = {
        'image': read_pixels(next(iter(config.train_data.streams.values())).local, preprocessing,
                             CALIBRATION),
        'caption': None}
    test = open_retrieval_set(dataset)
    order = sorted(range(len(test.texts)), key=lambda i: len(test.texts[i]))
    sorted_texts = [test.texts[i] for i in order]
    positions = torch.tensor(order).argsort()
    batches = {
        'image': [{'pixel_values': batch} for batch in read_pixels(dataset, preprocessing).split(BATCH)],
        'caption': [teacher.tokenizer(sorted_texts[start:start + BATCH])
                    for start in range(0, len(order), BATCH)]}

    def embed(modality: str, tower: Any) -> torch.Tensor:
        features = torch.cat([tower(**batch) for batch in batches[modality]])
        return features if modality == 'image' else model.get_text_features(features[positions])

    towers: dict[str, Any] = {'image': model.get_image_features, 'caption': teacher.module}
    exact = {modality: embed(modality, tower) for modality, tower in towers.items()}
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(model, config.model, trained.record, f'{folder}/onnx', run=config, teachers=[source])
        for modality, file in (('image', 'model.onnx'), ('caption', 'text_encoder.onnx')):
            files = smaller(Path(folder, 'onnx', file), calibration[modality])
            programs = {'PyTorch': towers[modality]}
            for kind, path in files.items():
                session = InferenceSession(path, one_thread, providers=['CPUExecutionProvider'])
                programs[kind] = partial(run_session, session)
            middle = batches[modality][len(batches[modality]) // 2]
            single = {name: x[:1] for name, x in middle.items()}
            seconds = seconds_in_turns(
                {kind: partial(program, **single) for kind, program in programs.items()}, LATENCY_ROUNDS)
            for kind, program in programs.items():
                features = exact[modality] if kind == 'PyTorch' else embed(modality, program)
                both = exact | {modality: features}
                recalls = evaluate_retrieval(test, both['image'], both['caption']).ranks.recalls()
                mib = files[kind].stat().st_size / 2**20 if kind in files else None
                cosine = (features * exact[modality]).sum(dim=1).mean().item()
                result = {'milliseconds': 1e3 * seconds[kind], 'cosine': cosine, 'MiB': mib} | recalls
                results[f'{modality}_{kind}'] = result
                print(f'{modality}, {kind}: {result}', flush=True)
            write_result(f'onnx_{modality}', f'milliseconds of one {modality} in ONNX Runtime, float32',
                         'PyTorch', seconds['float32'] / seconds['PyTorch'], results, at_most=1.0)
    text = table(results)
    (BENCH_FOLDER / 'onnx.md').write_text(text)
    print(text)


if __name__ == '__main__':
    main(*(sys.argv[1:] or QUICKSTART))
