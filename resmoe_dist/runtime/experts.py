"""The experts one rank owns, compressed: a row range of their centres and residuals, and the MLP.

Legend: L local experts, R received rows (tokens), N copies (a token to an expert), n copies of one
expert, J jobs, C rows of centres (a token to a centre), M = C + N, H hidden, S rows of this rank's
shard of an expert, D columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resmoe_dist.checkpoints.compressed import CompressedCheckpoint, GroupFile, LayerEntry
from resmoe_dist.codecs import EncodedResidual, Weights
from resmoe_dist.design_matrix import ExpertShape, from_rows, row_range
from resmoe_dist.parallel.dispatcher import DispatchedTokens
from resmoe_dist.parallel.topology import Topology
from resmoe_dist.runtime.execution import Execution

# Restored rows that stay in a CPU's last-level cache while they are used.
_BLOCK_BYTES = 8 << 20
# Products of all copies with so many rows at a time are kept: activations, not weights.
_PRODUCT_BYTES = 16 << 20


class ExpertGroup(nn.Module):
    """The local experts of one group: center [S, D] (None counts as zero) and a residual each.

    experts: their numbers in the layer; the lists go with them. output_biases: [H] per expert, or
    empty.
    """

    center: Tensor | None

    def __init__(
        self,
        experts: list[int],
        center_SD: Tensor | None,
        residuals: list[EncodedResidual],
        output_biases: list[Tensor],
    ) -> None:
        super().__init__()
        self.experts = experts
        self.register_buffer("center", center_SD, persistent=False)
        self.residuals = nn.ModuleList(residuals)
        biases = torch.stack(output_biases) if output_biases else None
        self.register_buffer("output_biases", biases, persistent=False)

    @classmethod
    def read(cls, file: GroupFile, experts: list[int], start: int, stop: int) -> ExpertGroup:
        """Rows [start, stop) of some of a group's experts, from its file."""
        biases = [file.read_output_bias(k) for k in experts]
        return cls(
            experts,
            file.read_center(start, stop),
            [file.read_residual(k, start, stop) for k in experts],
            [bias for bias in biases if bias is not None],
        )


@dataclass(frozen=True)
class CenterCopies:
    """Which tokens the centres are multiplied with: each once, whichever of the experts want it.

    groups: those with a centre and some token; counts of their tokens; row_C: the row of each.
    index_N: which of the C each copy takes, -1 where its group has no centre.
    """

    groups: list[int]
    counts: list[int]
    row_C: Tensor
    index_N: Tensor
    everywhere: bool

    @classmethod
    def of(
        cls, groups: list[ExpertGroup], group_of_L: list[int], tokens: DispatchedTokens
    ) -> CenterCopies:
        """Of what was dispatched to local experts of the groups `group_of_L`."""
        row_N, device = tokens.row_N, tokens.row_N.device
        if len(groups) == 1 and groups[0].center is not None:
            rows = len(tokens.x_RH)
            return cls([0], [rows], torch.arange(rows, device=device), row_N, True)
        counts_L = torch.tensor(tokens.counts_L, device=device)
        group_N = torch.tensor(group_of_L, device=device).repeat_interleave(counts_L)
        index_N = torch.full_like(row_N, -1)
        used, counts, parts = [], [], [row_N[:0]]
        for g, group in enumerate(groups):
            copies_N = group_N == g
            if group.center is None or not bool(copies_N.any()):
                continue
            row_c, place = row_N[copies_N].unique(return_inverse=True)
            index_N[copies_N] = place + sum(counts)
            used.append(g)
            counts.append(len(row_c))
            parts.append(row_c)
        everywhere = all(g.center is not None for g in groups)
        return cls(used, counts, torch.cat(parts), index_N, everywhere)

    def add_to(self, pre_NC: Tensor, pre_CC: Tensor) -> None:
        """To each copy's products, those of its centre."""
        if self.everywhere:
            pre_NC += pre_CC[self.index_N]
        elif len(self.row_C):
            with_center_N = self.index_N >= 0
            pre_NC[with_center_N] += pre_CC[self.index_N[with_center_N]]

    def sum_of(self, h_NS: Tensor) -> Tensor:
        """For each centre and token the sum over its copies: [C, S]."""
        h_CS = h_NS.new_zeros(len(self.row_C), h_NS.shape[1])
        if self.everywhere:
            return h_CS.index_add_(0, self.index_N, h_NS)
        with_center_N = self.index_N >= 0
        return h_CS.index_add_(0, self.index_N[with_center_N], h_NS[with_center_N])


class CompressedExperts(nn.Module):
    """The local experts of one layer.

    groups: of one codec. execution: the mode, and memory that layers share. Inference only. With
    tensor parallelism the output is this rank's partial sum.
    """

    def __init__(
        self,
        shape: ExpertShape,
        groups: list[ExpertGroup],
        activation: nn.Module,
        execution: Execution | None = None,
        *,
        adds_output_bias: bool = True,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.groups = nn.ModuleList(groups)
        # Tokens come sorted by expert, while neighbours among the experts may be of any groups.
        places = {k: (g, i) for g, group in enumerate(groups) for i, k in enumerate(group.experts)}
        self.places = [places[k] for k in sorted(places)]
        self.codec = type(groups[0].residuals[0])
        self.rows = groups[0].residuals[0].rows
        self.activation = activation
        self.execution = execution or Execution()
        # Biases come at the end of rows, which kernels for whole MLPs do not wait for.
        kernel = None if shape.row_bias else getattr(activation, "kernel", None)
        self._activation_kernel: str | None = kernel
        # Whole experts by place and whether with their centre: made once, as modules are slow.
        self._whole: dict[tuple[tuple[int, int], bool], Weights] = {}
        # In a cache that layers share. Not `id(self)`, which a later layer may have again.
        self._key = object()
        # Exactly one rank of a TP group adds the output bias, or the sum would hold it tp times.
        self.adds_output_bias = adds_output_bias

    @classmethod
    def load(
        cls,
        checkpoint: CompressedCheckpoint,
        layer: LayerEntry,
        topology: Topology,
        activation: nn.Module,
        execution: Execution | None = None,
    ) -> CompressedExperts:
        """Read this rank's experts and rows, opening only the files that hold them.

        Raises UserError when the experts do not divide over the grid, or a file is damaged.
        """
        start, stop = row_range(layer.rows, topology.tp_rank, topology.tp)
        owned = topology.owned_experts(layer.num_experts)
        groups = []
        for group in layer.groups:
            experts = [k for k in group.experts if k in owned]
            if experts:
                file = checkpoint.open_group(layer, group)
                groups.append(ExpertGroup.read(file, experts, start, stop))
        return cls(
            layer.shape,
            groups,
            activation,
            execution,
            adds_output_bias=topology.tp_rank == 0,
        )

    @property
    def center_bytes(self) -> int:
        """Bytes of the live centre tensors."""
        return sum(g.center.nbytes for g in self.groups if g.center is not None)

    @property
    def residual_bytes(self) -> int:
        """Bytes of all other live expert tensors: values, indices, output biases."""
        return sum(buffer.nbytes for buffer in self.groups.buffers()) - self.center_bytes

    @torch.no_grad()
    def forward(self, tokens: DispatchedTokens) -> Tensor:
        """Partial sums y_RH over the local experts of each token, weighted."""
        x_RH = tokens.x_RH
        if not len(tokens.row_N):
            return torch.zeros_like(x_RH)
        # What is stored whole needs no restoring, and has nothing to share.
        mode = self.execution.choose(self, tokens) if self.codec.uses_center else "restore"
        if mode == "shared":
            y_RH = self.run_shared(tokens)
        elif mode == "tiled":
            y_RH = self.run_tiled(tokens)
        else:
            y_RH = self.run_restored(tokens)
        if self.shape.output_bias and self.adds_output_bias:
            bias_LH = torch.stack([self.groups[g].output_biases[i] for g, i in self.places])
            counts_L = torch.tensor(tokens.counts_L, device=x_RH.device)
            bias_NH = bias_LH.float().repeat_interleave(counts_L, 0)
            y_RH.index_add_(0, tokens.row_N, bias_NH * tokens.weight_N.unsqueeze(1))
        return y_RH.to(x_RH.dtype)

    def run_restored(self, tokens: DispatchedTokens) -> Tensor:
        """One expert after the other, dense: y_RH in float32."""
        x_RH = tokens.x_RH
        y_RH = torch.zeros(x_RH.shape, dtype=torch.float32, device=x_RH.device)
        begin = 0
        for place, count in zip(self.places, tokens.counts_L, strict=True):
            copies = slice(begin, begin + count)
            begin += count
            if count:
                row_n, weight_n = tokens.row_N[copies], tokens.weight_N[copies]
                y_nH = self._run_dense(place, x_RH[row_n])
                y_RH.index_add_(0, row_n, y_nH * weight_n.unsqueeze(1))
        return y_RH

    def _run_dense(self, place: tuple[int, int], x_nH: Tensor) -> Tensor:
        """The whole expert on some tokens, block of rows by block of rows: [n, H], float32."""
        y_nH = torch.zeros(x_nH.shape, dtype=torch.float32, device=x_nH.device)
        for block_SD in self._dense_blocks(place, x_nH):
            weights = from_rows(self.shape, block_SD)
            inputs = [
                F.linear(x_nH, weights[name], weights.get(f"{name}_bias"))
                for name in self.shape.inputs
            ]
            y_nH += F.linear(self.activation(*inputs), weights[self.shape.output])
        return y_nH

    def _dense_blocks(self, place: tuple[int, int], like: Tensor) -> Iterator[Tensor]:
        """The restored rows of an expert, in blocks; each is gone when the next is asked for."""
        group, index = self.groups[place[0]], place[1]
        center, residual = group.center, group.residuals[index]
        if not residual.uses_center:
            # Stored whole: decoding is no work, and takes no memory.
            yield residual.decode()
            return
        columns = self.shape.columns
        if self.execution.cache is not None:

            def restore() -> Tensor:
                dense_SD = torch.empty(self.rows, columns, dtype=like.dtype, device=like.device)
                residual.restore(center, dense_SD)
                return dense_SD

            nbytes = self.rows * columns * like.itemsize
            kept = self.execution.cache.get((self._key, *place), nbytes, restore)
            if kept is not None:
                yield kept
                return
        # On a CPU a block that stays in the caches need not be written to memory and read again.
        rows = self.rows
        if like.device.type == "cpu":
            rows = min(rows, max(1, _BLOCK_BYTES // (columns * like.itemsize)))
        for first in range(0, self.rows, rows):
            block_SD = self.execution.workspace.matrix(
                min(rows, self.rows - first), columns, like.dtype, like.device
            )
            residual.restore(center, block_SD, first)
            yield block_SD

    def run_shared(self, tokens: DispatchedTokens) -> Tensor:
        """The centre once per token, on the way in and out, residuals per copy: y_RH in float32.

        With C = [C_in | C_out] and the residuals alike, over the experts k of a token, weights g:

            h_k = act(C_in x + R_k,in x)
            y   = Σ g_k (C_out + R_k,out) h_k = C_out (Σ g_k h_k) + Σ g_k R_k,out h_k
        """
        if self._fuses_mlp(tokens.x_RH):
            return self._run_fused(tokens, shares_centers=True)
        group_of_L = [g for g, _ in self.places]
        return self._run_products(tokens, CenterCopies.of(list(self.groups), group_of_L, tokens))

    def run_tiled(self, tokens: DispatchedTokens) -> Tensor:
        """Centre plus residual per copy, added up inside the products: y_RH in float32."""
        if self._fuses_mlp(tokens.x_RH):
            return self._run_fused(tokens, shares_centers=False)
        return self._run_products(tokens, None)

    def _fuses_mlp(self, x_RH: Tensor) -> bool:
        kernel = self._activation_kernel
        return kernel is not None and self.codec.fuses_mlp(x_RH.device, x_RH.dtype, kernel)

    def _run_fused(self, tokens: DispatchedTokens, *, shares_centers: bool) -> Tensor:
        """Products, activations and sums in one kernel."""
        every = slice(0, self.rows)
        jobs, counts, center_J = [], [], []
        centers: dict[int, Tensor] = {}
        for place, count in zip(self.places, tokens.counts_L, strict=True):
            if not count:
                continue
            whole = self._weights(place, every, with_center=True)
            center = -1
            if shares_centers and whole.center is not None:
                centers.setdefault(place[0], whole.center)
                center = list(centers).index(place[0])
                whole = self._weights(place, every, with_center=False)
            jobs.append(whole)
            counts.append(count)
            center_J.append(center)
        return self.codec.mlp(
            tokens.x_RH,
            tokens.row_N,
            tokens.weight_N,
            counts,
            jobs,
            list(centers.values()),
            center_J,
            len(self.shape.inputs),
            self._activation_kernel,
        )

    def _run_products(self, tokens: DispatchedTokens, centers: CenterCopies | None) -> Tensor:
        x_RH, hidden, inputs = tokens.x_RH, self.shape.hidden, len(self.shape.inputs)
        # 1. Centres first, each with the tokens that have a copy in its group; then the experts.
        active = [place for place, n in zip(self.places, tokens.counts_L, strict=True) if n]
        counts = [n for n in tokens.counts_L if n]
        row_M, counts_J, C = tokens.row_N, counts, 0
        if centers is not None:
            C = len(centers.row_C)
            row_M = torch.cat([centers.row_C, row_M])
            counts_J = centers.counts + counts
        y_RH = torch.zeros(x_RH.shape, dtype=torch.float32, device=x_RH.device)
        for rows in self._row_ranges(len(row_M)):
            jobs = []
            if centers is not None:
                jobs = [Weights(self.groups[g].center[rows], None) for g in centers.groups]
            jobs += [self._weights(place, rows, centers is None) for place in active]
            # 2. All products with the hidden state.
            pre_MC = self.codec.project_in(x_RH, row_M, counts_J, jobs, inputs)
            pre_NC = pre_MC[C:]
            if centers is not None:
                centers.add_to(pre_NC, pre_MC[:C])
            if self.shape.row_bias:
                copies = torch.tensor(counts, device=x_RH.device)
                pre_NC += self._bias(active, rows).repeat_interleave(copies, 0)
            # 3. Activations, weighted; for each centre and token the sum over its copies.
            h_MS = self.activation(*pre_NC.chunk(inputs, 1)) * tokens.weight_N.unsqueeze(1)
            if centers is not None:
                h_MS = torch.cat([centers.sum_of(h_MS), h_MS])
            # 4. All products back.
            y_RH += self.codec.project_out(
                h_MS.to(x_RH.dtype), row_M, counts_J, jobs, inputs, len(x_RH), hidden
            )
        return y_RH

    def _row_ranges(self, copies: int) -> Iterator[slice]:
        """All rows, in one range unless the products of so many copies would take much memory."""
        rows = max(64, _PRODUCT_BYTES // (copies * len(self.shape.inputs) * 4))
        for first in range(0, self.rows, rows):
            yield slice(first, min(first + rows, self.rows))

    def _weights(self, place: tuple[int, int], rows: slice, with_center: bool) -> Weights:
        """Some rows of an expert, or of its residual alone."""
        whole = self._whole.get((place, with_center))
        if whole is None:
            group = self.groups[place[0]]
            whole = Weights(group.center if with_center else None, group.residuals[place[1]])
            self._whole[place, with_center] = whole
        if rows.stop - rows.start == self.rows:
            return whole
        center = None if whole.center is None else whole.center[rows]
        return Weights(center, whole.residual.slice_rows(rows.start, rows.stop))

    def _apply(self, *args: Any, **kwargs: Any) -> CompressedExperts:
        # Tensors move to another device or dtype.
        self._whole.clear()
        self._key = object()
        return super()._apply(*args, **kwargs)

    def _bias(self, places: list[tuple[int, int]], rows: slice) -> Tensor:
        """Biases of the input projections of some experts: [len(places), inputs·S], float32."""
        inputs = len(self.shape.inputs)
        biases = []
        for g, i in places:
            group = self.groups[g]
            bias_Si = torch.empty(
                rows.stop - rows.start, inputs, dtype=self.dtype, device=self.device
            )
            first_column = self.shape.columns - inputs
            group.residuals[i].restore(group.center, bias_Si, rows.start, first_column)
            biases.append(bias_Si.T.flatten())
        return torch.stack(biases).float()

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self._values.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._values.device

    @property
    def _values(self) -> Tensor:
        return next(tensor for tensor in self.groups.buffers() if tensor.is_floating_point())
