"""Peak memory and FLOPs of a training step, counted without running it: floats are fake, integers are real.

Integers (plans, indices, lengths) decide shapes, so operations on integers and booleans alone are carried out. All that
holds floats is a fake tensor: it has a shape and a type, but no bytes, and costs no arithmetic. Where the code asks a
fake tensor for a value, the answer is 1 (True), and a boolean index that depends on floats chooses everything.

Memory is that of all live storages, each rounded up to 512 bytes as CUDA's allocator does. Not in it: what a kernel
allocates for itself while it runs, fragmentation of the allocator's pool, the CUDA context. FLOPs are those of
`torch.utils.flop_counter`, a multiply and an add being two: matrix products and attention, backward passes and
recomputation included.
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

BLOCK = 512  # bytes: what memory is given out in
_aten = torch.ops.aten


def _attention(q: torch.Size, k: torch.Size, v: torch.Size, *_args: Any, **_kwargs: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _attention_backward(
    grad: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, *_args: Any, **_kwargs: Any
) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


# The counter of torch knows the kernels of GPUs only; a product is counted alike in all of them. From shapes.
CPU_ATTENTION: dict[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
_COUNTS = flop_registry | {packet: shape_wrapper(count) for packet, count in CPU_ATTENTION.items()}
_CHOOSES = {_aten.index.Tensor, _aten.index_put_.default, _aten._index_put_impl_.default}
# What torch's backward passes do to a tensor of zeros: in place in earnest, to a copy while a mode looks on.
_IN_PLACE = {_aten.index_put.default: _aten.index_put_.default}


class _FakeMode(FakeTensorMode):
    def __deepcopy__(self, memo: dict) -> _FakeMode:
        """A module's copy holds fakes of the same mode: those of two modes do not mix."""
        return self


class Footprint(TorchDispatchMode):
    """What is computed inside is counted, by part of the step.

    Attributes
    ----------
    live : Counter, bytes of the storages that are alive, by the part that made them
    peak : int, bytes; at_peak : the same by part
    peaks : the same at the peak of each moment of each part; whoever drives the step counts `moment` on
    flops : Counter, by part
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = _FakeMode()
        self.part = "states"
        self.live: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()
        self._total = 0
        self.restart()
        self._known: dict[int, tuple[weakref.ref, str, int]] = {}

    def restart(self) -> None:
        """Forget peaks and FLOPs; what is alive stays known."""
        self.moment = 0
        self._highest = {(self.part, 0): self._total}
        self.peaks = {(self.part, 0): self.live.copy()}
        self.flops.clear()

    @property
    def peak(self) -> int:
        return max(self._highest.values())

    @property
    def at_peak(self) -> Counter[str]:
        return self.peaks[max(self._highest, key=self._highest.__getitem__)]

    @contextmanager
    def called(self, part: str) -> Iterator[None]:
        """Count what is made inside under this name."""
        outer, self.part = self.part, part
        try:
            yield
        finally:
            self.part = outer

    def add(self, tensor: Tensor) -> Tensor:
        """Count a tensor made elsewhere; it is returned, fake if it holds floats."""
        return self._take(tensor)

    def rename(self, tensor: Tensor, part: str) -> None:
        """Count the bytes of a tensor under this name from now on."""
        storage = tensor.untyped_storage()
        alive, before, size = self._known[storage._cdata]
        self._known[storage._cdata] = (alive, part, size)
        self.live[before] -= size
        self.live[part] += size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return True if args[0].dtype == torch.bool else 1
        func = _IN_PLACE.get(func, func)
        if func in _CHOOSES:
            args = (args[0], _chosen(args[1]), *args[2:])
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        fake = not given or any(isinstance(tensor, FakeTensor) for tensor in given)
        if fake:
            args, kwargs = tree_map_only(Tensor, self._shape_of, (args, kwargs))
            with self.fake:
                out = func(*args, **kwargs)
        if not fake or (not given and not any(map(_is_float, tree_leaves(out)))):  # integers from nothing are real, too
            out = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in _COUNTS:
            self.flops[self.part] += _COUNTS[packet](*args, **kwargs, out_val=out)
        return tree_map_only(Tensor, self._take, out)

    def _shape_of(self, tensor: Tensor) -> FakeTensor:
        """A fake of a real operand; `FakeTensorMode` makes one more slowly, and does not cache what is done with it."""
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
            if self._total > self._highest.get(moment, -1):
                self._highest[moment], self.peaks[moment] = self._total, self.live.copy()
        return tensor

    def _gone(self, key: int, _dead: weakref.ref) -> None:
        _, part, size = self._known.pop(key)
        self.live[part] -= size
        self._total -= size


def _is_float(item: Any) -> bool:
    return isinstance(item, Tensor) and item.is_floating_point()


def _chosen(indices: Any) -> list[Tensor | None]:
    """Boolean indices as rows: those of a real one as they are, all of a fake one."""
    rows: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype != torch.bool:
            rows.append(index)
        else:
            real = torch.ones(index.shape, dtype=torch.bool) if isinstance(index, FakeTensor) else index
            rows += real.nonzero(as_tuple=True)
    return rows
