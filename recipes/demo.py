# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Open a page in the browser that searches a folder of images, and classifies images by labels that you type:
python recipes/demo.py model=runs/quickstart/export/llm2clip images=photos"""

import functools
import os
import socket
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from llm2clip.command import run_command
from llm2clip.config import ConfigError, DemoConfig

if TYPE_CHECKING:
    import torch
    from gradio import Blocks

    from llm2clip.evaluation.models import TrainedLLM2CLIP

CSS = '''
@media (max-width: 640px) { .grid-container { grid-template-columns: repeat(2, minmax(0, 1fr)) !important } }
'''


def main(config: DemoConfig) -> None:
    try:
        socket.create_server((config.host, config.port)).close()
    except OSError as error:
        reason = (error.strerror or '').partition(' (')[0]
        raise ConfigError(f'host, port: {config.host}:{config.port} cannot be used ({reason}), expected an address of '
                          'this machine and a free port') from None
    # Gradio reports its use and keeps a history of the queries unless told otherwise, and asks its own server.
    os.environ.update(GRADIO_ANALYTICS_ENABLED='False', GRADIO_RUN_HISTORY='False', no_proxy='*')
    try:
        import gradio
    except ImportError as error:
        raise ConfigError(f'the page needs gradio: pip install "llm2clip[demo]" ({error})') from None
    from llm2clip.device import open_device
    from llm2clip.search import embed_images, load_model

    model, fingerprint = load_model(config, open_device(config.device, config.precision), ['a text'])
    paths, images = embed_images(config, model, fingerprint)
    with TemporaryDirectory() as folder:  # receives uploads and thumbnails, the only files that are served
        os.environ['GRADIO_TEMP_DIR'] = folder
        page = make_page(config, model, paths, images)
        font = gradio.themes.LocalFont('Source Sans Pro', weights=(400, 700))
        page.launch(server_name=config.host, server_port=config.port, share=False, quiet=True,
                    prevent_thread_lock=True, theme=gradio.themes.Default(primary_hue='blue', font=[font, 'sans-serif']),
                    css=CSS, footer_links=[])
        print(f'{len(paths):,} images: open {page.local_url}, Ctrl-C ends it', flush=True)
        page.block_thread()


def make_page(config: DemoConfig, model: 'TrainedLLM2CLIP', paths: list[str], images: 'torch.Tensor') -> 'Blocks':
    """Return a page with three tabs: search by text, search by image, and zero-shot classification."""
    import gradio as gr
    from PIL import Image

    from llm2clip.data.images import decode_pixels
    from llm2clip.files import printable
    from llm2clip.search import classify, embed_query, nearest

    def found(query: 'torch.Tensor') -> list[tuple[Image.Image, str]]:
        """Thumbnails of the nearest images, each with its similarity and path."""
        results = []
        for i, score in nearest(images, query, config.top):
            pixels = decode_pixels(Path(paths[i]).read_bytes(), paths[i], at_least=640)
            thumbnail = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            thumbnail.thumbnail((960, 960))
            results.append((thumbnail, f'{score:.3f}  {printable(os.path.relpath(paths[i], config.images))}'))
        return results

    def by_text(text: str) -> Any:
        if not text.strip():
            raise ConfigError('Type a text first.')
        return found(embed_query(model, text))

    def by_image(image: Any) -> Any:
        return found(embed_query(model, Path(image))) if image else []

    def by_labels(image: Any, text: str) -> Any:
        labels = [label.strip() for label in text.strip().split('\n' if '\n' in text.strip() else ',')]
        labels = [*dict.fromkeys(filter(None, labels))]
        if not image or len(labels) < 2:
            raise ConfigError('Type at least two labels.' if image else 'Choose an image first.')
        return classify(model, Path(image), labels)

    def answers(function: Callable[..., Any]) -> dict[str, Any]:
        """Arguments of an event that shows what the function returns, or its error as a message."""
        @functools.wraps(function)
        def answer(*inputs: Any) -> Any:
            try:
                return function(*inputs)
            except (OSError, ValueError) as error:
                gr.Warning(printable(str(error)))
                return None

        return {'fn': answer, 'concurrency_id': 'model', 'api_visibility': 'private'}

    def gallery() -> gr.Gallery:
        return gr.Gallery(show_label=False, columns=5, object_fit='cover', height='max-content', format='jpeg',
                          buttons=[])

    def image_input() -> gr.Image:
        image = gr.Image(label='Image', type='filepath', sources=['upload', 'clipboard'], height=240, buttons=[])
        image.preprocess = lambda payload: payload and payload.path  # the model decodes it, and says if it cannot
        gr.Examples([[path] for path in paths[::-(-len(paths) // 6)]], image, label='From the folder')
        return image

    with gr.Blocks(title='LLM2CLIP', analytics_enabled=False) as page:
        gr.Markdown(f'# LLM2CLIP\n{len(paths):,} images of `{config.images}`, model `{config.model}`')
        with gr.Tab('Text search'):
            with gr.Row(equal_height=True):
                text = gr.Textbox(label='Text', show_label=False, placeholder='a dog on the beach', scale=6, autofocus=True)
                button = gr.Button('Search', variant='primary', min_width=120)
            gr.on([text.submit, button.click], inputs=text, outputs=gallery(), **answers(by_text))
        with gr.Tab('Image search'), gr.Row():
            with gr.Column(min_width=280):
                image = image_input()
            with gr.Column(scale=3):
                image.change(inputs=image, outputs=gallery(), **answers(by_image))
        with gr.Tab('Zero-shot'), gr.Row():
            with gr.Column(min_width=280):
                image = image_input()
            with gr.Column(scale=2):
                labels = gr.Textbox(label='Labels, separated by commas or lines', placeholder='dog, cat', lines=3)
                button = gr.Button('Classify', variant='primary')
                answer = gr.Label(label='Probabilities')
            button.click(inputs=[image, labels], outputs=answer, **answers(by_labels))
    return page


if __name__ == '__main__':
    run_command(DemoConfig, main)
