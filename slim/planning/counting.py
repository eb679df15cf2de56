"""Count the memory, FLOPs and calls of a training step without running it: float tensors are fake, integers are real.

Integers (plans, indices, lengths) determine shapes, so operations on integers and booleans only are computed. Tensors
of floats are fake: they have a shape and a type, but no data. If the code reads a value of a fake tensor, it gets 1
(True), and a boolean index computed from floats selects everything.

Memory is the sum of all live storages, each rounded up to 512 bytes as in CUDA's allocator. It does not include memory
that kernels allocate while they run, fragmentation, or the CUDA context. FLOPs are counted as in
`torch.utils.flop_counter`, with two for a multiply and an add: matrix products and attention, including backward passes
and recomputation.

A call is an operation of torch that a GPU carries out with a kernel; each costs the process some microseconds to
launch. Views, allocations without a value and reads of one value are no calls. A read is counted as a wait, because the
process has to wait for the GPU.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper

BLOCK = 512  # bytes: unit in which the allocator provides memory
_aten = torch.ops.aten


def _attention(q: torch.Size, k: torch.Size, v: torch.Size, *_args: Any, **_kwargs: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _varlen_shapes(q: Tensor, k: Tensor, q_bound: Tensor, k_bound: Tensor) -> tuple[torch.Size, torch.Size]:
    """Shapes of queries and keys of one segment that has as many pairs of both as all segments together."""
    pairs = int((q_bound.diff().long() * k_bound.diff().long()).sum())
    return torch.Size((1, q.shape[1], 1, q.shape[2])), torch.Size((1, k.shape[1], pairs, k.shape[2]))


def _varlen(q: Tensor, k: Tensor, v: Tensor, q_bound: Tensor, k_bound: Tensor, *_args: Any, **_kwargs: Any) -> int:
    q_shape, k_shape = _varlen_shapes(q, k, q_bound, k_bound)
    return sdpa_flop_count(q_shape, k_shape, k_shape)


def _varlen_backward(_grad: Tensor, q: Tensor, k: Tensor, _v: Tensor, *rest: Any, **_kwargs: Any) -> int:
    _out, _logsumexp, q_bound, k_bound, *_ = rest
    q_shape, k_shape = _varlen_shapes(q, k, q_bound, k_bound)
    return sdpa_backward_flop_count(q_shape, q_shape, k_shape, k_shape)


def _attention_backward(
    grad: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, *_args: Any, **_kwargs: Any
) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


# Torch counts attention kernels of GPUs only. On the CPU, the same formula is used, from the shapes.
CPU_ATTENTION: dict[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
_COUNTS = flop_registry | {packet: shape_wrapper(count) for packet, count in CPU_ATTENTION.items()}
# Attention over segments of different lengths, as on a GPU, by the names of its operations.
_VARLEN: dict[str, Callable[..., int]] = {
    "torch_attn::_varlen_attn": _varlen,
    "torch_attn::_varlen_attn_backward": _varlen_backward,
}
_CHOOSES = {_aten.index.Tensor, _aten.index_put_.default, _aten._index_put_impl_.default}
# Torch's backward passes apply these operations to a tensor of zeros: normally in place, but to a copy inside a mode.
_IN_PLACE = {_aten.index_put.default: _aten.index_put_.default}
_NO_KERNEL = {
    _aten.empty,
    _aten.empty_like,
    _aten.empty_strided,
    _aten.new_empty,
    _aten.new_empty_strided,
    _aten.lift_fresh,
    _aten._unsafe_view,
    _aten._local_scalar_dense,
}
_NO_KERNELS = ("prim", "profiler")  # namespaces of operations on the CPU
_WAITS = {_aten._local_scalar_dense, _aten.nonzero, _aten.equal}


def is_call(operation: Any) -> bool:
    """Whether a GPU carries out an operation with a kernel."""
    packet = operation._overloadpacket
    return not (operation.is_view or packet in _NO_KERNEL or operation.namespace in _NO_KERNELS)


class _FakeMode(FakeTensorMode):
    def __deepcopy__(self, memo: dict) -> _FakeMode:
        """Return the same mode, because fake tensors of two modes cannot be combined."""
        return self


class Footprint(TorchDispatchMode):
    """Context manager that counts memory and FLOPs by part of the step.

    Attributes
    ----------
    live : Counter
        Bytes of live storages, by the part that made them.
    peak : int
        Peak memory in bytes.
    at_peak : Counter
        Bytes at the peak, by part.
    peaks : dict
        Bytes at the peak of each moment of each part. The caller increments `moment`.
    flops : Counter
        FLOPs by part.
    calls : Counter
        Calls by part.
    stands_for : int
        What is computed now stands for so many computations one after the other, of which each has the same calls, and
        which have as many FLOPs together. With more than one, the peak is not counted.
    waits : Counter
        By part, how often the process reads a value, or a number of rows, that a GPU has to compute first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = _FakeMode()
        self.part = "states"
        self.live: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self._total = 0
        self.restart()
        self._known: dict[int, tuple[weakref.ref, str, int]] = {}

    def restart(self) -> None:
        """Reset peaks, FLOPs and calls, but keep the record of live storages."""
        self.moment, self.stands_for = 0, 1
        self._highest = {(self.part, 0): self._total}
        self.peaks = {(self.part, 0): self.live.copy()}
        self.flops.clear()
        self.calls.clear()
        self.waits.clear()

    @property
    def peak(self) -> int:
        return max(self._highest.values())

    @property
    def at_peak(self) -> Counter[str]:
        return self.peaks[max(self._highest, key=self._highest.__getitem__)]

    @contextmanager
    def called(self, part: str) -> Iterator[None]:
        """Context in which storages and FLOPs are counted under this name."""
        outer, self.part = self.part, part
        try:
            yield
        finally:
            self.part = outer

    def add(self, tensor: Tensor) -> Tensor:
        """Count a tensor made outside, and return it, as a fake tensor if it holds floats."""
        return self._take(tensor)

    def ignore(self, tensor: Tensor) -> None:
        """Do not count the bytes of a tensor that is used in place of others that are counted."""
        self._take(tensor)
        key = tensor.untyped_storage()._cdata
        alive, part, size = self._known[key]
        self._known[key] = (alive, part, 0)
        self.live[part] -= size
        self._total -= size

    def rename(self, tensor: Tensor, part: str) -> None:
        """Count the bytes of a tensor under this name from now on."""
        storage = tensor.untyped_storage()
        alive, before, size = self._known[storage._cdata]
        self._known[storage._cdata] = (alive, part, size)
        self.live[before] -= size
        self.live[part] += size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._count_call(func, args)
        if func is _aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return True if args[0].dtype == torch.bool else 1
        func = _IN_PLACE.get(func, func)
        if func in _CHOOSES:
            args = (args[0], _chosen(args[1]), *args[2:])
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        fake = not given or any(isinstance(tensor, FakeTensor) for tensor in given)
        if func._overloadpacket._qualified_op_name in _VARLEN:  # its FLOPs depend on values: the bounds of segments
            self.flops[self.part] += _VARLEN[func._overloadpacket._qualified_op_name](*args, **kwargs)
        if fake:
            args, kwargs = tree_map_only(Tensor, self._shape_of, (args, kwargs))
            with self.fake:
                out = func(*args, **kwargs)
        if not fake or (not given and not any(map(_is_float, tree_leaves(out)))):  # new integers are real, too
            out = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in _COUNTS:
            self.flops[self.part] += _COUNTS[packet](*args, **kwargs, out_val=out)
        return tree_map_only(Tensor, self._take, out)

    def _count_call(self, func: Any, args: Any) -> None:
        chooses = func in _CHOOSES and any(_is_bool(index) for index in args[1])
        self.waits[self.part] += self.stands_for * (chooses or func._overloadpacket in _WAITS)
        self.calls[self.part] += self.stands_for * is_call(func)

    def _shape_of(self, tensor: Tensor) -> FakeTensor:
        """A fake tensor for a real operand. `FakeTensorMode` would make it more slowly and without caching."""
        if isinstance(tensor, FakeTensor):
            return tensor
        shape = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        return FakeTensor(self.fake, shape, tensor.device)

    def _take(self, tensor: Tensor) -> Tensor:
        if _is_float(tensor) and not isinstance(tensor, FakeTensor):
            tensor = self.fake.from_tensor(tensor)
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            size = -(-storage.nbytes() // BLOCK) * BLOCK
            self._known[key] = (weakref.ref(storage, partial(self._gone, key)), self.part, size)
            self.live[self.part] += size
            self._total += size
            moment = self.part, self.moment
            if self.stands_for == 1 and self._total > self._highest.get(moment, -1):
                self._highest[moment], self.peaks[moment] = self._total, self.live.copy()
        return tensor

    def _gone(self, key: int, _dead: weakref.ref) -> None:
        _, part, size = self._known.pop(key)
        self.live[part] -= size
        self._total -= size


def _is_bool(item: Any) -> bool:
    return isinstance(item, Tensor) and item.dtype == torch.bool


def _is_float(item: Any) -> bool:
    return isinstance(item, Tensor) and item.is_floating_point()


def _chosen(indices: Any) -> list[Tensor | None]:
    """Convert boolean indices to rows: the selected rows of a real index, all rows of a fake one."""
    rows: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype != torch.bool:
            rows.append(index)
        else:
            real = torch.ones(index.shape, dtype=torch.bool) if isinstance(index, FakeTensor) else index
            rows += real.nonzero(as_tuple=True)
    return rows
