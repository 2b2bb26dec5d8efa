"""numpy in cupy's place: the calls of DeepSpeed's 1-bit optimizers, so that they run over gloo on CPU.

Only for tests, by PYTHONPATH=tests/onebit. The compression, the error feedback and the communication stay
DeepSpeed's own; what is replaced packs and unpacks bits, which numpy does in the same order.
"""

from __future__ import annotations

from typing import Any

import numpy
import torch.distributed
import torch.utils.dlpack
from numpy import packbits, split, unpackbits, zeros

from . import cuda

__all__ = ["cuda", "from_dlpack", "packbits", "split", "unpackbits", "zeros"]


def from_dlpack(capsule: Any) -> numpy.ndarray[Any, Any]:
    """cupy takes a bare capsule, numpy does not, torch does: the array shares the tensor's memory."""
    return torch.utils.dlpack.from_dlpack(capsule).numpy()


def all_gather(tensor_list: list[torch.Tensor], tensor: torch.Tensor, *rest: Any, **options: Any) -> Any:
    """NCCL gathers a number without dimensions into tensors of one element, gloo insists on equal shapes."""
    return strict_all_gather(tensor_list, tensor.reshape(tensor_list[0].shape), *rest, **options)


strict_all_gather = torch.distributed.all_gather
torch.distributed.all_gather = all_gather
