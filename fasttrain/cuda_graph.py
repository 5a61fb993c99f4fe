"""A function of fixed shapes as one CUDA graph: recorded once, replayed with a single launch."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# torch's own graph helper warms up as often: lazy set-up and autotuning must be over before the recording.
WARM_UPS = 3


class CapturedCall:
    """`function(*inputs)` from a graph. It may write to fixed tensors (gradients), but not wait for the GPU.

    The outputs are the graph's own tensors: the next call overwrites them, in stream order. They should carry
    no gradient history: that would keep the gradients' accumulation on the stream of the recording.
    The warm-up and the recording run `function` for real; the caller undoes what that wrote.
    """

    def __init__(self, function: Callable[..., Any], examples: tuple[Tensor, ...]) -> None:
        self._inputs = tuple(example.detach().clone() for example in examples)
        side, current = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                function(*self._inputs)
        current.wait_stream(side)
        # A graph that nobody holds any more must not be taken down in the middle of a recording.
        gc.collect()
        self._graph = torch.cuda.CUDAGraph()
        # "thread_local": the threads that load data may take memory meanwhile.
        try:
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._outputs = function(*self._inputs)
        except BaseException:
            # torch leaves the stream of a failed recording behind as the current one.
            torch.cuda.set_stream(current)
            raise

    def __call__(self, *inputs: Tensor) -> Any:
        for fixed, new in zip(self._inputs, inputs, strict=True):
            fixed.copy_(new, non_blocking=True)
        self._graph.replay()
        return self._outputs
