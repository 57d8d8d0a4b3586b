"""Models without weights: the code that will run on a GPU runs here on tensors that have a shape and no content, and is measured.

A weight is a `FakeTensor`; so is all that is computed from it. Token ids, masks and positions are real, so code that looks at
them takes its true path. Where code asks a fake tensor for a value it gets one that it can go on with: random positive numbers,
zeros for choices, yes for "is finite".
"""

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, fields
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from safetyneuron.tuning import trainer

aten = torch.ops.aten
GATHERS = ("embedding", "index", "index_select", "gather")  # read what they give, not the table
COPIES = (
    "_log_softmax",
    "_softmax",
)  # copy what does not lie in memory in order, inside the kernel
YES = ("isfinite",)  # questions about numbers that the answer keeps going; all others are denied
_FAKE = FakeTensorMode(allow_non_fake_inputs=True)


@dataclass(frozen=True)
class GPU:
    """What hours are reckoned from. memory in bytes, bandwidth in bytes a second, half and single in operations a second, launch in seconds a kernel."""

    name: str
    memory: int
    bandwidth: float
    half: float
    single: float
    launch: float = 15e-6  # between two kernels, from Python

    def seconds(self, operations, traffic, wide):
        """Time of one kernel: the longest of its arithmetic at `SHARE` of the peak, its reads and writes, and its launch."""
        peak = self.single if wide else self.half
        return max(operations / (SHARE * peak), traffic / self.bandwidth, self.launch)


SHARE = 0.4  # of the peak that arithmetic reaches
# Data sheets: H100 SXM5 and T4; memory as their driver reports it, dense operations, single precision without TF32.
GPUS = {
    "H100": GPU("H100 80 GB", int(79.1 * 2**30), 3.35e12, 989e12, 67e12),
    "T4": GPU(
        "T4 16 GB", int(14.7 * 2**30), 320e9, 8.1e12, 8.1e12
    ),  # it has no bfloat16: as single
}


@dataclass
class Cost:
    """What something takes: operations, bytes read and written, kernels, seconds on the GPU, and bytes at its peak."""

    operations: float = 0.0
    traffic: float = 0.0
    kernels: float = 0.0
    seconds: float = 0.0
    peak: float = 0.0

    def __add__(self, other):
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return Cost(**sums | {"peak": max(self.peak, other.peak)})

    def times(self, factor: float) -> "Cost":
        """The same done `factor` times, one after the other."""
        sums = {f.name: factor * getattr(self, f.name) for f in fields(self)}
        return Cost(**sums | {"peak": self.peak})


class Meter(TorchDispatchMode):
    """Counts what runs in a `with` block. cost: so far; live: bytes of all tensors that are alive and were made or held here."""

    def __init__(self, gpu: GPU):
        super().__init__()
        self.gpu, self.cost, self.live, self.laps = gpu, Cost(), 0, []
        self._alive = {}

    def hold(self, tensors) -> None:
        """Count tensors that were there before, for as long as they live."""
        for tensor in tensors:
            self._hold(tensor.untyped_storage())

    @contextlib.contextmanager
    def without(self, *models) -> Iterator[None]:
        """Weights of these models count as put aside for the length of a `with` block."""
        moved = sum(map(weight_bytes, models))
        self.live -= moved
        try:
            yield
        finally:
            self.live += moved
            self.cost.peak = max(self.cost.peak, self.live)

    def lap(self) -> None:
        """Close a part of the run: its cost goes to `laps`."""
        self.laps.append(self.cost)
        self.cost = Cost(peak=self.live)

    def _hold(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive:
            self._alive[key] = weakref.ref(storage, lambda _: self._release(key, size))
            self.live += size
            self.cost.peak = max(self.cost.peak, self.live)

    def _release(self, key, size):
        del self._alive[key]
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return invented(args[0]).item()
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        if func._overloadpacket not in flop_registry:
            with self:  # what is made of several kernels is counted by them
                result = func.decompose(*args, **kwargs)
                if result is not NotImplemented:
                    return result
        if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            args = (args[0], places(args[1]), *args[2:])
        result = func(*args, **kwargs)
        self._count(func, args, kwargs, result)
        name = func._overloadpacket.__name__
        if name.endswith("_like") or name.startswith("new_"):
            return (
                result if result.is_floating_point() else func(_blank(args[0]), *args[1:], **kwargs)
            )
        decided = torch.ones_like if name in YES else torch.zeros_like
        return tree_map_only(FakeTensor, lambda x: _decide(x, decided), result)

    def _count(self, func, args, kwargs, result):
        made = [x for x in tree_leaves(result) if torch.is_tensor(x)]
        for tensor in made:
            self._hold(tensor.untyped_storage())
        if func.is_view or not made:
            return
        read = [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)]
        if func._overloadpacket.__name__ in GATHERS:
            read = made
        if func._overloadpacket.__name__ in COPIES and not read[0].is_contiguous():
            copied = read[0].numel() * read[0].element_size()
            self.cost.peak = max(self.cost.peak, self.live + copied)
        traffic = sum(stored_bytes(x) for x in (*read, *made))
        known = flop_registry.get(func._overloadpacket)
        operations = known(*args, **kwargs, out_val=result) if known else 0
        wide = made[0].dtype in (torch.float32, torch.float64)
        self.cost.operations += operations
        self.cost.traffic += traffic
        self.cost.kernels += 1
        self.cost.seconds += self.gpu.seconds(operations, traffic, wide)


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of a model's weights."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def stored_bytes(tensor: torch.Tensor) -> int:
    """Bytes that reading a tensor moves: an expanded one is read once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def places(indices):
    """Indices with every mask written as the places where it is true, which a fake tensor can be asked for."""
    found = []
    for index in indices:
        masks = torch.is_tensor(index) and index.dtype == torch.bool
        found += index.nonzero().unbind(1) if masks else [index]
    return found


def _decide(tensor, decided):
    """A fake choice or yes/no as a real one; numbers stay fake."""
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor
    return decided(_blank(tensor))


def _blank(tensor):
    """A real tensor of any content."""
    return (
        torch.empty(tensor.shape, dtype=tensor.dtype) if isinstance(tensor, FakeTensor) else tensor
    )


def imagine(tensor: torch.Tensor) -> torch.Tensor:
    """A fake tensor of the shape of a real one."""
    return tensor if isinstance(tensor, FakeTensor) else _FAKE.from_tensor(tensor)


def invented(tensor: torch.Tensor) -> torch.Tensor:
    """A real tensor of the shape of a fake one: positive random numbers, without touching the global random state."""
    draw = torch.Generator().manual_seed(tensor.numel())
    return torch.rand(tensor.shape, generator=draw).to(tensor.dtype)


class _Answers(TorchFunctionMode):
    """Code that takes a fake tensor off the GPU gets a real one."""

    TAKEN = (torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.numpy)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if args and isinstance(args[0], FakeTensor):
            if func in self.TAKEN:
                return func(invented(args[0]), *args[1:], **(kwargs or {}))
            if func is torch.Tensor.__deepcopy__:
                return _copied(*args)
        return func(*args, **(kwargs or {}))


def _copied(tensor, memo):
    """A deep copy, which torch would make of the content."""
    if id(tensor) not in memo:
        new = tensor.detach().clone()
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        memo[id(tensor)] = torch.nn.Parameter(new, tensor.requires_grad) if is_parameter else new
    return memo[id(tensor)]


@contextlib.contextmanager
def imagining(gpu: GPU) -> Iterator[Meter]:
    """Run code on fake tensors for the length of a `with` block; yields the meter. Parameters made inside are fake too."""
    meter, make = Meter(gpu), torch.nn.Parameter.__new__

    def imagined(cls, data, requires_grad=True):
        if not isinstance(data, FakeTensor):
            data = _FAKE.from_tensor(data)
            meter.hold([data])
        return make(cls, data, requires_grad)

    stay = mock.patch.object(torch.nn.Module, "to", lambda module, *_, **__: module)
    fresh = mock.patch.object(torch.nn.Parameter, "__new__", imagined)
    moved = mock.patch.object(trainer, "aside", meter.without)
    with stay, fresh, moved, _Answers(), meter:
        yield meter


def imagine_model(
    shape: dict, dtype: torch.dtype, kind: type = AutoModelForCausalLM
) -> PreTrainedModel:
    """A model of a shape (the fields of its config.json) whose weights have no content and take no memory."""
    config = AutoConfig.for_model(**shape)
    with _FAKE, contextlib.ExitStack() as back:
        back.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(dtype)
        model = kind.from_config(config)
    return model.eval()
