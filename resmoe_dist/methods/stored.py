"""What methods share that store plain experts: fewer of them, or with fewer rows.

Legend: E experts of the group, I rows, D columns, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from resmoe_dist.checkpoints.entries import DROPPED
from resmoe_dist.codecs import DENSE, EncodedMatrix
from resmoe_dist.compression.encoding import GroupCodecs
from resmoe_dist.compression.losses import loss_against
from resmoe_dist.compression.permutations import identity_permutations
from resmoe_dist.design_matrix import from_rows
from resmoe_dist.methods.base import EncodedGroup, SourceGroup


def dense_codecs(wanted: GroupCodecs) -> GroupCodecs:
    """No centre, and experts as dense matrices; the budget stays."""
    return replace(wanted, center=None, residual=DENSE)


def encode_dense(matrix_ID: Tensor, codecs: GroupCodecs) -> EncodedMatrix:
    """A matrix as it is stored, rounded to the stored dtype."""
    return DENSE.codec.encode(matrix_ID, DENSE.config, codecs.dtype)


def encode_fewer_experts(
    group: SourceGroup,
    codecs: GroupCodecs,
    expert_map: Sequence[int],
    stored: Sequence[Tensor],
    *,
    permutations_EI: Tensor | None = None,
    biases: Sequence[Tensor] | None = None,
    objective: float = 0.0,
    encode: Callable[[Tensor, GroupCodecs], EncodedMatrix] = encode_dense,
) -> EncodedGroup:
    """A group of which every expert becomes one of `stored`, or is dropped.

    expert_map: the stored expert of each of the group's experts, or DROPPED. stored: matrices
    [I, D]. permutations_EI: the order of each expert's rows in which they match its stored one,
    which only the losses use; stored order by default. biases: output biases [H] of the stored
    experts. objective: of the alignment. encode: how a stored matrix is encoded.
    """
    if permutations_EI is None:
        permutations_EI = identity_permutations(group.experts_EID)
    aligned = group.aligned(permutations_EI)
    encoded = [encode(matrix_ID, codecs) for matrix_ID in stored]
    losses = [
        loss_against(
            aligned,
            k,
            None if number == DROPPED else encoded[number].decode(),
            kept=0 if number == DROPPED else group.shape.entries,
        )
        for k, number in enumerate(expert_map)
    ]
    return EncodedGroup(
        None,
        encoded,
        losses,
        objective,
        expert_map=list(expert_map),
        biases=None if biases is None else list(biases),
    )


def keep_experts(group: SourceGroup, codecs: GroupCodecs, kept: Sequence[int]) -> EncodedGroup:
    """A group of which only the experts `kept` remain, unchanged and in their order."""
    order = sorted(kept)
    numbers = {k: number for number, k in enumerate(order)}
    expert_map = [numbers.get(k, DROPPED) for k in range(len(group.experts_EID))]
    biases = None if group.biases_EH is None else list(group.biases_EH[order])
    return encode_fewer_experts(
        group, codecs, expert_map, [group.experts_EID[k] for k in order], biases=biases
    )


def encode_fewer_rows(
    group: SourceGroup,
    codecs: GroupCodecs,
    stored: Sequence[Tensor],
    restored: Sequence[Tensor],
    permutations_EI: Tensor | None = None,
) -> EncodedGroup:
    """A group whose experts are stored with fewer rows.

    stored: a matrix [fewer rows, D] per expert. restored: what each stands for, [I, D], in the
    order of `permutations_EI` (by default the stored order): the losses compare it with the expert.
    """
    if permutations_EI is None:
        permutations_EI = identity_permutations(group.experts_EID)
    aligned = group.aligned(permutations_EI)
    losses = [
        loss_against(aligned, k, restored_ID, kept=stored[k].numel())
        for k, restored_ID in enumerate(restored)
    ]
    return EncodedGroup(None, [encode_dense(each, codecs) for each in stored], losses, 0.0)


# Tokens that an expert runs on at a time.
BLOCK_TOKENS = 512


def expert_outputs(group: SourceGroup, expert: int, inputs_RH: Tensor) -> Tensor:
    """f_k(x): outputs [R, H] of an expert of the group, float32, before routing weights."""
    hidden_RI = neuron_activations(group, expert, inputs_RH)
    weights = group.projections(expert)
    bias_H = None if group.biases_EH is None else group.biases_EH[expert].float()
    return torch.nn.functional.linear(hidden_RI, weights[group.shape.output], bias_H)


def neuron_activations(group: SourceGroup, expert: int, inputs_RH: Tensor) -> Tensor:
    """Inputs [R, I] of an expert's output projection, float32."""
    return activations_of(group, group.experts_EID[expert], inputs_RH)


def activations_of(group: SourceGroup, matrix_ID: Tensor, inputs_RH: Tensor) -> Tensor:
    """The same of any expert with the group's shape."""
    assert group.activation is not None, "methods that run experts need samples"
    weights = from_rows(group.shape, matrix_ID.float())
    x_RH = inputs_RH.float()
    inputs = [
        torch.nn.functional.linear(x_RH, weights[name], weights.get(f"{name}_bias"))
        for name in group.shape.inputs
    ]
    return group.activation(*inputs)
