"""Record a function with inputs of fixed shapes as a CUDA graph, which a single launch replays."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Lazy initialisation and autotuning must finish before the recording. torch.cuda.make_graphed_callables warms
# up three times as well.
WARM_UPS = 3


def is_recordable(device: torch.device) -> bool:
    """Return whether work on `device` can be recorded."""
    return device.type == "cuda"


def recover() -> None:
    """Check that the GPU can be used after a failed recording; raise RuntimeError if it cannot.

    PyTorch ends a recording in the driver first. If that fails, its allocator continues as if the recording
    were under way. It then refuses to release memory, here and in the next shortage of memory.
    """
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


class CapturedCall:
    """A function that is called by replaying a CUDA graph.

    `function` may write to fixed tensors, such as gradients, but must not wait for the GPU. The returned
    tensors belong to the graph, and the next call overwrites them in stream order. `function` should detach
    them, because autograd history would tie the accumulation of gradients to the stream of the recording.
    Warm-up and recording execute `function`, so the caller must reset the tensors that it writes to.

    Raises RuntimeError if the recording fails. PyTorch's allocator may then be unusable (see `recover`).
    """

    def __init__(self, function: Callable[..., Any], examples: tuple[Tensor, ...]) -> None:
        self._inputs = tuple(example.detach().clone() for example in examples)
        side, current = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                function(*self._inputs)
        current.wait_stream(side)
        # Destroying an unreferenced graph during the recording would be an error.
        gc.collect()
        self._graph = torch.cuda.CUDAGraph()
        # With "thread_local", other threads, which load data, may allocate memory during the recording.
        try:
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._outputs = function(*self._inputs)
        except BaseException:
            # After a failed recording, torch leaves the recording's stream as the current one.
            torch.cuda.set_stream(current)
            raise

    def __call__(self, *inputs: Tensor) -> Any:
        for fixed, new in zip(self._inputs, inputs, strict=True):
            fixed.copy_(new, non_blocking=True)
        self._graph.replay()
        return self._outputs
