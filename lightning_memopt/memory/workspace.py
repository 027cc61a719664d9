"""What kernels allocate inside themselves, for runs on fake tensors, where no kernel runs.

A fake convolution makes its result and nothing else; the real one also takes room to reorder its inputs. The model of
that scratch is the kernel itself: it runs once on real tensors for each operator, shapes, dtypes and strides, with
the profiler watching the allocator. A call too large for that runs at smaller batch sizes and is extrapolated, which
is possible because no kernel below takes more than linearly in the batch.
"""

from math import prod
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from typing_extensions import override

from lightning_memopt.memory.allocator_events import AllocatorEvents
from lightning_memopt.memory.arguments import tensor_arguments

aten = torch.ops.aten

_MAX_REAL_BYTES = 32 * 2**20
"""Calls whose tensors together are larger run at a smaller batch size."""

_WITHOUT_SCRATCH = {
    *("sum", "mean", "amax", "amin", "max", "min", "any", "all", "argmax", "argmin", "linalg_vector_norm", "var"),
    *("copy_", "_to_copy", "clone", "cat", "stack", "fill_", "zero_", "detach", "index_select", "gather", "tril"),
    *("triu", "masked_fill", "bernoulli_", "uniform_", "normal_", "exponential_", "native_dropout"),
    *("new_zeros", "new_empty", "new_full", "new_ones", "empty_like", "zeros_like", "ones_like", "full_like"),
    *("slice_backward", "select_backward", "constant_pad_nd", "equal", "scatter_", "native_dropout_backward"),
    *("_local_scalar_dense", "split_with_sizes_copy", "random_", "flip", "repeat", "rand_like", "randn_like"),
}
"""Operators that write straight into their result (their CPU kernels in ATen/native; seen with the profiler)."""

_FREE_WHERE_CONTIGUOUS = {
    *("_log_softmax", "_log_softmax_backward_data", "_softmax", "_softmax_backward_data"),
    *("nll_loss_forward", "nll_loss_backward"),
    *("roll", "glu_backward", "rrelu_with_noise", "rrelu_with_noise_backward"),
}
"""Likewise, for arguments that lie in their own order; logits of images in ``channels_last`` do not.

Of what does not, the kernel makes a copy, or lays its result out in another order than its fake.
"""

_KEEPS_ROOM_FOR_UNREDUCED = {"mse_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "soft_margin_loss"}

_KEEPS_ROOM_FOR_INPUT = {"col2im"}
"""Makes its result as large as its input before it takes the right shape (``F.fold``, ``nn.Fold``)."""


def _first_of(*arguments: int) -> dict[int, int]:
    return dict.fromkeys(arguments, 0)


_BATCH_DIMENSIONS: dict[str, dict[int, int]] = {
    "convolution": _first_of(0),
    "convolution_backward": _first_of(0, 1),
    "native_batch_norm": _first_of(0),
    "_native_batch_norm_legit": _first_of(0),
    "native_batch_norm_backward": _first_of(0, 1),
    "native_group_norm": _first_of(0),
    "native_layer_norm": _first_of(0),
    "native_layer_norm_backward": _first_of(0, 1, 3, 4),
    "embedding": _first_of(1),
    "embedding_dense_backward": _first_of(0, 1),
    "_safe_softmax": _first_of(0),
    "cumsum": _first_of(0),
    "mean": _first_of(0),
    "sum": _first_of(0),
    "mm": _first_of(0),
    "addmm": _first_of(1),
    "bmm": _first_of(0, 1),
    "baddbmm": _first_of(0, 1, 2),
    "_scaled_dot_product_flash_attention_for_cpu": _first_of(0, 1, 2),
    "_scaled_dot_product_flash_attention_for_cpu_backward": _first_of(0, 1, 2, 3, 4, 5),
    "max_pool2d_with_indices": _first_of(0),
    "max_pool2d_with_indices_backward": _first_of(0, 1, 7),
    "_adaptive_avg_pool2d": _first_of(0),
    "_adaptive_avg_pool2d_backward": _first_of(0, 1),
    **{f"{mode}_pad{d}d": _first_of(0) for mode in ("reflection", "replication") for d in (1, 2, 3)},
    **{f"{mode}_pad{d}d_backward": _first_of(0, 1) for mode in ("reflection", "replication") for d in (1, 2, 3)},
    "channel_shuffle": _first_of(0),
    "col2im": _first_of(0),
    "glu_backward": _first_of(0, 1),
    "roll": _first_of(0),
    "upsample_nearest2d": _first_of(0),
    "upsample_bilinear2d": _first_of(0),
    "mse_loss": _first_of(0, 1),
    "smooth_l1_loss": _first_of(0, 1),
    "huber_loss": _first_of(0, 1),
    "topk": _first_of(0),
    "sort": _first_of(0),
    # Always time first, whatever batch_first says: nn.LSTM transposes before it calls the kernel.
    "mkldnn_rnn_layer": {0: 1, 5: 0, 6: 0},
    "mkldnn_rnn_layer_backward": {0: 1, 5: 0, 6: 0, 7: 1, 8: 0, 9: 0, 10: 1, 11: 0, 12: 0},
}
"""Which arguments carry the batch, and in which dimension, for calls that are run smaller than they are."""

_HEAD_DIMENSIONS: dict[str, dict[int, int]] = {
    "_scaled_dot_product_flash_attention_for_cpu": {0: 1, 1: 1, 2: 1},
    "_scaled_dot_product_flash_attention_for_cpu_backward": dict.fromkeys(range(6), 1),
}
"""Likewise for the heads of attention, where even one sample of them all is too large."""


class TensorSpec(NamedTuple):
    """A tensor's shape without its bytes."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def make(self) -> torch.Tensor:
        """A real tensor of this shape, all zeros: a valid index, and no denormals to slow arithmetic."""
        tensor = torch.empty_strided(self.shape, self.stride, dtype=self.dtype)
        return tensor.zero_()

    @property
    def size_bytes(self) -> int:
        """Bytes of its elements."""
        return prod(self.shape) * self.dtype.itemsize

    def resized(self, dimension: int, size: int) -> "TensorSpec":
        """The same with another size in one dimension, laid out in the same order."""
        return self.in_shape((*self.shape[:dimension], size, *self.shape[dimension + 1 :]))

    def in_shape(self, shape: tuple[int, ...]) -> "TensorSpec":
        """The same with other sizes, laid out in the same order."""
        if shape == self.shape:
            return self
        order = sorted(range(len(self.shape)), key=lambda d: (self.stride[d], self.shape[d]))
        stride, step = [0] * len(shape), 1
        for each in order:
            if self.stride[each]:
                stride[each] = step
                step *= shape[each]
        return TensorSpec(shape, tuple(stride), self.dtype)


class SparseSpec(NamedTuple):
    """Likewise a sparse tensor's, in COO layout."""

    shape: tuple[int, ...]
    indices: TensorSpec
    values: TensorSpec
    is_coalesced: bool

    def make(self) -> torch.Tensor:
        """A real tensor with as many elements, all of them zeros at the first place."""
        return torch.sparse_coo_tensor(
            self.indices.make(), self.values.make(), self.shape, is_coalesced=self.is_coalesced
        )

    @property
    def size_bytes(self) -> int:
        """Bytes of its indices and values."""
        return self.indices.size_bytes + self.values.size_bytes


class Call(NamedTuple):
    """An operator and its arguments, tensors as :class:`TensorSpec` or :class:`SparseSpec`.

    ``grad_enabled`` is the gradient mode of the call: without gradients the fused LSTM keeps no workspace.
    """

    operator: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    grad_enabled: bool

    @property
    def name(self) -> str:
        """Its name, without the overload (``"convolution"``)."""
        return self.operator._schema.name.split("::")[-1]

    @property
    def key(self) -> str:
        """Equal for equal calls."""
        return f"{self.operator}{self.arguments}{self.keywords}{self.grad_enabled}"

    @property
    def size_bytes(self) -> int:
        """Bytes of its tensor arguments."""
        leaves = tree_leaves((self.arguments, self.keywords), is_leaf=_is_spec)
        return sum(leaf.size_bytes for leaf in leaves if _is_spec(leaf))


def describe_call(operator: Any, arguments: Any, keywords: Any) -> Call | None:
    """What :class:`Workspace` needs to know of a call; None where the operator takes no scratch."""
    tensors = tensor_arguments(arguments, keywords)
    if not tensors or operator.namespace not in ("aten", "bitsandbytes") or _is_free(operator, tensors):
        return None

    def spec(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.layout is torch.sparse_coo:
            parts = _spec(leaf._indices()), _spec(leaf._values())
            return SparseSpec(tuple(leaf.shape), *parts, leaf.is_coalesced())
        return _spec(leaf) if isinstance(leaf, torch.Tensor) else leaf

    return Call(
        operator, tree_map(spec, tuple(arguments)), tree_map(spec, dict(keywords or {})), torch.is_grad_enabled()
    )


def _spec(tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)


def _is_dense(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided


def _is_free(operator: Any, tensors: list[torch.Tensor]) -> bool:
    name = operator._schema.name.split("::")[-1]
    if name in ("sum", "mean") and tensors[0].dtype in (torch.float16, torch.bfloat16):
        return False  # summed in 32 bits, of a copy
    if name in _WITHOUT_SCRATCH or operator.is_view or name.startswith(("_foreach", "_fused")):
        return True
    if name in _FREE_WHERE_CONTIGUOUS:
        return all(tensor.is_contiguous() for tensor in tensors)
    one_dtype = len({tensor.dtype for tensor in tensors if tensor.dim() > 0}) <= 1
    is_complex = any(map(torch.is_complex, tensors))  # `abs` makes complex numbers beside its result
    if torch.Tag.pointwise in operator.tags and not is_complex:
        return (one_dtype or name == "where") and all(map(_is_dense, tensors))
    if name in ("mm", "addmm", "bmm", "baddbmm"):
        return tensors[0].dtype in (torch.float32, torch.float64) and all(map(_suits_blas, tensors[-2:]))
    return False


def _suits_blas(matrix: torch.Tensor) -> bool:
    """Whether BLAS takes the matrix as it lies; otherwise it is copied first."""
    *_, rows, columns = matrix.shape
    *_, row_stride, column_stride = matrix.stride()
    by_rows = column_stride == 1 and row_stride >= max(1, columns)
    by_columns = row_stride == 1 and column_stride >= max(1, rows)
    return by_rows or by_columns


class Need(NamedTuple):
    """What a call takes.

    Attributes:
        scratch_bytes: Beside its results while it runs.
        result_bytes: For its results.
        unknown: Why neither could be told; empty if they could.
        results: How its results lie, of a run that may have been smaller.
    """

    scratch_bytes: int
    result_bytes: int
    unknown: str = ""
    results: tuple[TensorSpec, ...] = ()


class Workspace:
    """Measures what operators take, each once.

    Args:
        known: What was found before, to which is added; several runs may share it.

    Attributes:
        unknown: Names of the operators whose scratch could not be told, with the reason.
    """

    def __init__(self, known: dict[str, Need] | None = None) -> None:
        self._known = {} if known is None else known
        self.unknown: dict[str, str] = {}

    def scratch_bytes(self, call: Call) -> int:
        """The most that ``call`` holds beside its results while it runs, in bytes."""
        return self._need(call).scratch_bytes

    def complete(self, call: Call, result: Any) -> Any:
        """``result`` of a fake call, with what the fake kernel gets wrong put right.

        The fused LSTM's has no workspace, batch norm's keeps the statistics of a 16-bit input in 16 bits and lays out
        what it makes like an input that was transposed, and a reduced loss is 4 bytes, where the real kernel reduces
        into the first element of its unreduced result. Others lay out their results in another order (padding's
        backward in ``channels_last``), and what follows would then run kernels that take other scratch. A result with
        values, as of what a module computes beside its fakes, is what the kernel made, and stays.
        """
        if not any(isinstance(leaf, FakeTensor) for leaf in tree_leaves(result)):
            return result
        if call.name == "mkldnn_rnn_layer":
            *outputs, workspace = result
            missing = self._need(call).result_bytes - sum(output.nbytes for output in result)
            return (*outputs, workspace.new_empty(max(0, missing)))
        if call.name == "native_batch_norm":
            output, *statistics = result
            dtype = call.arguments[1].dtype if _is_spec(call.arguments[1]) else None
            return (
                _laid_out_for(call.arguments[0], output),
                *(each.new_empty(each.shape, dtype=dtype) for each in statistics),
            )
        if call.name == "native_batch_norm_backward":
            by_input, *others = result
            return (_laid_out_for(call.arguments[1], by_input), *others)
        if call.name in _KEEPS_ROOM_FOR_UNREDUCED and result.dim() == 0:
            elements = self._need(call).result_bytes // result.itemsize
            return result.new_empty(max(1, elements)).as_strided((), ())
        if call.name in _KEEPS_ROOM_FOR_INPUT:
            elements = self._need(call).result_bytes // result.itemsize
            room = result.new_empty(max(result.numel(), elements))
            return room.as_strided(result.shape, result.stride())
        return result if call.operator._schema.is_mutable else _laid_out_as(self._need(call).results, result)

    def notes(self) -> list[str]:
        """A sentence for each operator in :attr:`unknown`."""
        return [
            f"what {name} allocates inside itself is not counted: {reason}" for name, reason in self.unknown.items()
        ]

    def _need(self, call: Call) -> Need:
        key = call.key
        need = self._known.get(key)
        if need is None:
            need = self._known[key] = self._find(call)
        if need.unknown:
            self.unknown[call.name] = need.unknown
        return need

    def _find(self, call: Call) -> Need:
        if call.size_bytes <= _MAX_REAL_BYTES:
            return self._run(call)
        scales = [scale for table in (_BATCH_DIMENSIONS, _HEAD_DIMENSIONS) if (scale := _scale_of(call, table))]
        if not scales:
            return Need(0, 0, "it is too large to try, and nothing is known of how it grows")
        return self._extrapolate(call, scales)

    def _extrapolate(self, call: Call, scales: list[dict[int, int]]) -> Need:
        """From two smaller sizes along the first of the ``scales``, found along the others if still too large."""
        if not scales or call.size_bytes <= _MAX_REAL_BYTES:
            return self._run(call)
        scale, *others = scales
        argument, dimension = next(iter(scale.items()))
        whole = call.arguments[argument].shape[dimension]
        large = max(2, whole * _MAX_REAL_BYTES // call.size_bytes)
        small = max(1, large // 2)
        if large >= whole:
            return self._extrapolate(call, others)
        at_large, at_small = (self._extrapolate(_resized(call, scale, size), others) for size in (large, small))
        scratch_bytes, result_bytes = (
            a + (a - b) * (whole - large) // (large - small) for a, b in zip(at_large[:2], at_small[:2], strict=True)
        )
        return Need(scratch_bytes, result_bytes, at_large.unknown or at_small.unknown, at_large.results)

    def _run(self, call: Call) -> Need:
        random_state = torch.default_generator.get_state()
        try:
            with _disable_current_modes():  # nobody counts what is only tried
                return _measure(call)
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            return Need(0, 0, f"it does not run on zeros ({error})")
        finally:
            torch.default_generator.set_state(random_state)


class GpuWorkspace(Workspace):
    """Of runs on fake tensors of a CPU that stand for a GPU's, whose kernels take none of what the CPU's take.

    What a fused LSTM keeps for its backward is kept on both.
    """

    @override
    def _find(self, call: Call) -> Need:
        return super()._find(call) if call.name.startswith("mkldnn_rnn_layer") else Need(0, 0)


def _scale_of(call: Call, table: dict[str, dict[int, int]]) -> dict[int, int]:
    """Which of the call's tensors can be smaller, in which dimension; none where they differ in it."""
    scale = {
        index: dimension
        for index, dimension in table.get(call.name, {}).items()
        if index < len(call.arguments) and _is_spec(call.arguments[index])
    }
    sizes = {call.arguments[index].shape[dimension] for index, dimension in scale.items()}
    return scale if table is _BATCH_DIMENSIONS or len(sizes) == 1 else {}


def _measure(call: Call) -> Need:
    arguments, keywords = tree_map(
        lambda leaf: leaf.make() if _is_spec(leaf) else leaf, (call.arguments, call.keywords), is_leaf=_is_spec
    )
    if call.name == "mkldnn_rnn_layer_backward":
        arguments = (*arguments[:-1], _lstm_workspace(arguments))
    events = AllocatorEvents()
    if not events.start():
        raise RuntimeError("another profiler is running")
    try:
        result = call.operator(*arguments, **keywords)
    finally:
        allocations = events.stop()
    held = peak = 0
    live = set[int]()
    for allocation in allocations:
        # Of what was there before, its release is told where an earlier profile saw that address.
        if allocation.size_bytes < 0 and allocation.address not in live:
            continue
        live ^= {allocation.address}
        held += allocation.size_bytes
        peak = max(peak, held)
    # The result is alive until here, so that what it holds counted as held.
    results = tuple(_spec(leaf) for leaf in tree_leaves(result) if _is_dense(leaf))
    return Need(peak - held, held, results=results)


def _laid_out_for(spec: TensorSpec, result: Any) -> Any:
    """``result`` as batch norm's kernels lay it out for an input: in ``channels_last`` or contiguous, never else."""
    if result is None:
        return None
    with _disable_current_modes():
        input = torch.empty_strided(spec.shape, spec.stride, device="meta")
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    own = formats.get(input.dim(), torch.contiguous_format)
    kept = own if input.is_contiguous(memory_format=own) else torch.contiguous_format
    return torch.empty_like(result, memory_format=kept)


def _laid_out_as(specs: tuple[TensorSpec, ...], result: Any) -> Any:
    """``result`` with its tensors in the order of those that the kernel made, where these are as many."""
    leaves, structure = tree_flatten(result)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if len(tensors) != len(specs) or any(len(s.shape) != t.dim() for s, t in zip(specs, tensors, strict=True)):
        return result
    like = iter(specs)
    placed = [_placed(leaf, next(like)) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    return tree_unflatten(placed, structure)


def _placed(tensor: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    stride = spec.in_shape(tuple(tensor.shape)).stride
    steps = zip(tensor.shape, tensor.stride(), stride, strict=True)
    differs = any(size > 1 and ours != kernels for size, ours, kernels in steps)
    return tensor.new_empty_strided(tensor.shape, stride) if differs and tensor.numel() else tensor


def _lstm_workspace(arguments: Any) -> torch.Tensor:
    """Only the forward can make what the backward of a fused LSTM reads."""
    tensors, (reverse, mode, hidden_size, layers, has_biases, train, bidirectional, batch_sizes, batch_first) = (
        arguments[:7],
        arguments[13:22],
    )
    with torch.enable_grad():  # without, the forward makes none
        return aten.mkldnn_rnn_layer(
            *tensors, reverse, batch_sizes, mode, hidden_size, layers, has_biases, bidirectional, batch_first, train
        )[3]


def _resized(call: Call, dimensions: dict[int, int], size: int) -> Call:
    def resize(index: int, argument: Any) -> Any:
        return argument.resized(dimensions[index], size) if index in dimensions else argument

    return call._replace(arguments=tuple(resize(index, argument) for index, argument in enumerate(call.arguments)))


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, TensorSpec | SparseSpec)
