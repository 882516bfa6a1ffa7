# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""GPUs that a run is planned for, as their vendor describes them."""

from dataclasses import dataclass

__all__ = ['GPUS', 'GPU']

# What is left of a GPU's memory beside CUDA's context, NCCL's buffers and the gaps between tensors.
_USABLE = 0.9


@dataclass(frozen=True)
class GPU:
    """One kind of GPU.

    Attributes:
        memory: GiB that torch sees.
        bf16: Dense peak in bfloat16 or float16, TFLOP/s.
        fp32: Peak in float32 without TF32, TFLOP/s.
    """

    memory: float
    bf16: float
    fp32: float

    def fits(self, peak: int) -> bool:
        """Whether so many bytes are not more than nine tenths of the memory."""
        return peak <= _USABLE * self.memory * 2**30


# NVIDIA's data sheets, SXM boards: A100 80GB, H100, H200, B200 (HGX).
GPUS = {'A100': GPU(79, 312, 19.5), 'H100': GPU(79, 989, 67), 'H200': GPU(139, 989, 67), 'B200': GPU(178, 2250, 75)}
