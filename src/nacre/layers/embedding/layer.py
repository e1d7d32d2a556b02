"""The Embedding layer and its functional form."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from nacre.core import check, choice
from nacre.core.choice import FLOATS, cpp_kernel, sizes_decide, torch_instead, torch_is_ahead, unserved
from nacre.core.dispatch import PLAIN
from nacre.core.op import Op
from nacre.core.tracing import Proxy, as_torchs_layer, traced
from nacre.layers.embedding import formula

_INDICES = (torch.int64, torch.int32)
_FEW_TOKENS, _SMALL_TABLE = 256, 1 << 20  # below both, torch's own was measured faster
_UNDER = f"{_FEW_TOKENS} tokens of a table of {_SMALL_TABLE:,} values"


def _naming_the_index(lookup: Callable[..., Any]) -> Callable[..., Any]:
    """A lookup with an error that names the index: here, where an op is given values, is where it can be seen."""

    def named(weight: Tensor, indices: Tensor, *options: Any) -> Any:
        try:
            return lookup(weight, indices, *options)
        except IndexError:
            if torch._C._are_functorch_transforms_active():
                raise  # a batch of indices does not give its values away
            raise _out_of_range(weight, indices) from None

    return named


_op = Op(
    "embedding(Tensor weight, Tensor indices, SymInt num_embeddings, SymInt padding_idx, bool scale_grad_by_freq,"
    " bool sparse) -> Tensor output",
    forward=formula.forward,
    backward=formula.backward,
    # the number of rows stands in for the table, which may then change between forward and backward
    saved=("indices", "num_embeddings", "padding_idx", "scale_grad_by_freq", "sparse"),
    gradients=("weight",),
    explained=_naming_the_index,
    kernels=[
        cpp_kernel(
            {
                "a dense gradient": lambda *arguments: not arguments[-1],
            }
        ),
    ],
)


class Embedding(torch.nn.Embedding):
    r"""Looks up a learned row of features for every token.

    .. math:: y_n = W_{x_n}

    Args:
        num_embeddings: rows of the table, V; tokens are integers from 0 to V - 1.
        embedding_dim: features of a row, D.
        padding_idx: a token whose row starts at zero and has no gradient; a negative one counts from the end.
            Default: none.
        max_norm: largest norm of a row; rows that are longer are shortened to it in place, in the table, when they are
            looked up. Default: no largest norm.
        norm_type: the p of that p-norm. Default: 2.
        scale_grad_by_freq: divide the gradient of a row by the number of times it was looked up. Default: False.
        sparse: make the gradient of the table a sparse tensor of the rows looked up, for optimisers that take one
            (``torch.optim.SparseAdam``, ``SGD``, ``Adagrad``). Default: False.
        device: where the table is made. Default: torch's default device.
        dtype: of the table. Default: torch's default dtype.

    ``weight`` (V, D) starts standard normal. ``Embedding.from_pretrained(table)`` starts from a given table, which does
    not learn unless ``freeze=False``.

    Shape:
        - input: int32 or int64 tokens of any shape (\*)
        - output: (\*, D)

    Numerics:
        The lookup is exact. Gradients of repeated tokens are added in the order of the tokens, so that the same bits
        come out on every run and any number of threads; float16 and bfloat16 are summed in float32 and rounded once.

    Raises:
        IndexError: a token is negative or not below V (on a GPU, as with torch, an assertion of the device).
        RuntimeError: tokens are not int32 or int64, or lie on another device than the table.
        AssertionError: ``padding_idx`` is not a row of the table.

    Cost:
        V D parameters, no FLOPs, N rows read and written for N tokens; backward a dense gradient of V D values, or N
        rows with ``sparse=True``; N indices kept for the backward.

    Paper:
        Bengio, Ducharme, Vincent, Jauvin, "A Neural Probabilistic Language Model", JMLR 3, 2003.

    Example:
        >>> import torch, nacre
        >>> layer = nacre.Embedding.from_pretrained(torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
        >>> layer(torch.tensor([1, 0, 1]))
        tensor([[2., 3.],
                [0., 1.],
                [2., 3.]])
        >>> layer(torch.tensor([0, 2]))
        Traceback (most recent call last):
        IndexError: index out of range in self, a table of 2 rows with indices from 0 to 1; got index 2 at position 1.
        Did you mean Embedding(3, 2)?
    """

    __prepare_scriptable__ = as_torchs_layer

    def forward(self, input: Tensor) -> Tensor:
        if (
            type(input) is Tensor
            and choice.unwatched
            and not is_dynamo_compiling()
            and self.max_norm is None
            and input.numel() < _FEW_TOKENS
            and self.weight.numel() < _SMALL_TABLE
        ):
            try:
                return _by_torch(input, self.weight, self.padding_idx, self.scale_grad_by_freq, self.sparse)
            except (AssertionError, IndexError, RuntimeError):
                pass  # what follows says more clearly what is wrong
        if type(input) is not Tensor and isinstance(input, Proxy):
            return traced(self, input)
        return embedding(
            input, self.weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse
        )


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Looks up rows of a table; see :class:`nacre.Embedding`.

    Args:
        input: int32 or int64 tokens of any shape.
        weight: a table of shape (V, D).
        padding_idx: a token without gradient; a negative one counts from the end. Default: none.
        max_norm: rows which are looked up and longer than this are shortened to it, in place. Default: none.
        norm_type: the p of that p-norm. Default: 2.
        scale_grad_by_freq: divide a row's gradient by its number of tokens. Default: False.
        sparse: make the gradient of ``weight`` a sparse tensor. Default: False.

    Raises:
        IndexError: a token is negative or not below V.
        RuntimeError: ``weight`` is no table, tokens are not int32 or int64, or devices do not match.
        AssertionError: ``padding_idx`` is not a row of the table.

    Example:
        >>> import torch, nacre
        >>> nacre.functional.embedding(torch.tensor(1), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        tensor([3., 4.])
    """
    if max_norm is None and sizes_decide(input) and _is_small(input, weight) and torch_is_ahead("embedding", _UNDER):
        try:
            return _by_torch(input, weight, padding_idx, scale_grad_by_freq, sparse)
        except (AssertionError, IndexError, RuntimeError):
            pass  # what follows says more clearly what is wrong
    if not _plain(input, weight, padding_idx, sparse):
        if reason := _unusual(input, weight, padding_idx, scale_grad_by_freq and sparse):
            function = torch.nn.functional.embedding
            options = (padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
            return torch_instead("embedding", reason, function, input, weight, *options)
        _validate(input, weight, padding_idx)
    num_embeddings = weight.shape[0]
    if padding_idx is None:
        padding_idx = -1
    elif padding_idx < 0:
        padding_idx += num_embeddings
    if max_norm is not None:
        _shorten_rows(weight.detach(), input, max_norm, norm_type)
    return _op(weight, input, num_embeddings, padding_idx, scale_grad_by_freq, sparse)


def _is_small(input: Any, weight: Any) -> bool:
    """Whether a few tokens are looked up in a table so small that a gradient of its size is quickly made."""
    if not (isinstance(input, Tensor) and isinstance(weight, Tensor)) or weight.dim() != 2:
        return False
    return input.numel() < _FEW_TOKENS and weight.numel() < _SMALL_TABLE


def _by_torch(input: Tensor, weight: Tensor, padding_idx: int | None, scaled: bool, sparse: bool) -> Tensor:
    if padding_idx is None:
        return torch.embedding(weight, input, -1, scaled, sparse)
    return torch.nn.functional.embedding(input, weight, padding_idx, None, 2.0, scaled, sparse)


def _plain(input: Any, weight: Any, padding_idx: Any, sparse: bool) -> bool:
    """Whether this is the call that nearly every one is, about which nothing else needs to be asked."""
    return (
        type(input) is Tensor
        and type(weight) in PLAIN
        and padding_idx is None
        and not sparse
        and input.dtype in _INDICES
        and weight.dtype in FLOATS
        and weight.dim() == 2
        and weight.shape[0] > 0
        and weight.device == input.device
        and weight.layout is input.layout is torch.strided
        and not (weight.is_nested or input.is_nested)
    )


def _unusual(input: Any, weight: Any, padding_idx: Any, scaled_and_sparse: bool) -> str:
    """Why a call is left to torch, which serves or refuses it; empty for those that the op serves."""
    if not (isinstance(input, Tensor) and isinstance(weight, Tensor)):
        return f"indices of type {type(input).__name__} and a table of type {type(weight).__name__}"
    if input.is_nested or input.layout is not torch.strided:
        return "nested or sparse indices"
    if input.dtype in _INDICES and (reason := unserved(weight)):
        return reason
    if isinstance(padding_idx, bool) or not isinstance(padding_idx, (int, torch.SymInt, type(None))):
        return f"a padding_idx of type {type(padding_idx).__name__}"
    if scaled_and_sparse:
        return "a sparse gradient scaled by frequency, which torch's backward refuses"
    return ""


def _shorten_rows(weight: Tensor, indices: Tensor, max_norm: float, norm_type: float) -> None:
    """Scales the rows which are looked up and longer than ``max_norm`` to that norm, in place."""
    with torch.no_grad():
        rows = _op(weight, indices, weight.shape[0], -1, False, False)
        norms = torch.linalg.vector_norm(rows, norm_type, -1, keepdim=True).double()
        # torch adds the same small number to the norm
        factors = torch.full_like(norms, max_norm) / (norms + 1e-7)
        factors = factors.to(torch.promote_types(rows.dtype, torch.float32))
        shortened = torch.where(norms > max_norm, rows * factors, rows).to(rows.dtype)
        # a row that is looked up twice is written twice with the same values
        weight.index_put_((indices,), shortened)


def _validate(input: Tensor, weight: Tensor, padding_idx: int | None) -> None:
    if input.dtype not in _INDICES:
        swapped = input.is_floating_point() and weight.dtype in _INDICES
        raise check.error(
            RuntimeError,
            "Expected tensor for argument 'indices' of embedding to have scalar type Long (int64) or Int (int32)",
            f"indices of dtype {input.dtype}",
            "Did you mean embedding(weight, input)?" if swapped else "Did you mean input.long()?",
        )
    if weight.dim() != 2:
        raise check.error(
            RuntimeError,
            "the weight of embedding is a table of shape (num_embeddings, embedding_dim)",
            f"a weight of shape {check.shape(weight)}",
        )
    num_embeddings = weight.shape[0]
    if padding_idx is not None and not -num_embeddings <= padding_idx < max(num_embeddings, 1):
        raise check.error(
            AssertionError,
            f"padding_idx is a row of the table, from {-num_embeddings} to {num_embeddings - 1}",
            f"padding_idx = {padding_idx}",
        )
    if num_embeddings == 0 and input.numel() > 0:
        raise check.error(
            RuntimeError,
            "a table without rows has nothing to look up",
            f"{input.numel()} indices",
            "Is the vocabulary empty?",
        )
    check.same_device("embedding", input=input, weight=weight)


def _out_of_range(weight: Tensor, indices: Tensor) -> Exception:
    rows, features = weight.shape
    place = tuple(((indices < 0) | (indices >= rows)).nonzero()[0].tolist())
    index = int(indices[place])
    where = f" at position {place[0] if len(place) == 1 else place}" if place else ""
    meant = f"Did you mean Embedding({int(indices.max()) + 1}, {features})?"
    return check.error(
        IndexError,
        f"index out of range in self, a table of {rows} rows with indices from 0 to {rows - 1}",
        f"index {index}{where}",
        "Indices do not count from the end." if index < 0 else meant,
    )
