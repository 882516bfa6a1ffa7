# docker build -t your/llm2clip .
# Image for clusters: the packages of `make install`, from the same lock file.  PyTorch's wheels include CUDA, so a
# machine needs only NVIDIA's driver and container toolkit.  Python is 3.13.
FROM debian:13-slim
# torch.compile needs a compiler and Python's headers; NCCL needs libibverbs for InfiniBand.
RUN apt-get update && apt-get install --yes --no-install-recommends \
        ca-certificates gcc git ibverbs-providers libc6-dev libibverbs1 make python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /llm2clip
COPY pyproject.toml uv.lock Makefile README.md LICENSE ./
COPY llm2clip llm2clip
RUN make install && rm -rf ~/.cache
COPY . .
ENV PATH=/llm2clip/.venv/bin:$PATH
CMD ["composer", "--help"]
