# The cluster image: MosaicML's PyTorch with the project on top. Python 3.12, CUDA 12.8.
# It installs what `make` installs, from the same lock file.
FROM mosaicml/pytorch:2.7.0_cu128-python3.12-ubuntu22.04

WORKDIR /workspace/llm2clip
COPY pyproject.toml uv.lock Makefile README.md LICENSE ./
COPY llm2clip llm2clip
# The image brings its own build of torch and torchvision for its CUDA; NVIDIA's packages come with it.
RUN make install-beside-torch
COPY . .
CMD ["composer", "--help"]
