"""Where `decode` stops to pay, measured on the ranks themselves when a model is loaded."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from resmoe_dist.parallel.collectives import Group, gather
from resmoe_dist.parallel.dispatch.auto import AutoDispatcher
from resmoe_dist.parallel.dispatch.base import Dispatcher

# Tokens [T, H], top_k_index [T, K] and top_k_weights [T, K].
Call = tuple[Tensor, Tensor, Tensor]

# Tokens per lane that are tried, each four times as many.
_SIZES = (4, 16, 64, 256)
_REPEATS = 3


def measure_decode_limit(
    dispatcher: AutoDispatcher, hidden: int, top_k: int, dtype: torch.dtype, device: torch.device
) -> int:
    """Tokens of the largest lane up to which `decode` is not slower than `exchange`.

    Both are run with random tokens and without experts. Collective over the replica; the answer is
    the same on all its ranks.
    """
    limit = 0
    for tokens in _SIZES:
        dispatcher.decode.capacity = tokens
        call = random_call(tokens, hidden, dispatcher.num_experts, top_k, dtype, device)
        decode, exchange = (
            _seconds(form, call) for form in (dispatcher.decode, dispatcher.exchange)
        )
        if decode > exchange:
            break
        # Halfway to the next size, on the scale of the sizes.
        limit = 2 * tokens
    return limit


def random_call(
    tokens: int,
    hidden: int,
    num_experts: int,
    top_k: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Call:
    """Arguments of `dispatch`: tokens [T, H] and a random routing [T, K], the same on all ranks."""
    generator = torch.Generator().manual_seed(tokens)
    x_TH = torch.randn(tokens, hidden, generator=generator).to(device, dtype)
    scores_TE = torch.rand(tokens, num_experts, generator=generator)
    index_TK = scores_TE.topk(min(top_k, num_experts)).indices.to(device)
    return x_TH, index_TK, torch.ones(index_TK.shape, device=device)


def least_seconds(call: Callable[[], None], device: torch.device) -> float:
    """The least time of a call on this rank: other processes only make it longer."""
    found = []
    for _ in range(_REPEATS + 1):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - began)
    # The first round sets up connections.
    return min(found[1:])


def round_trip(form: Dispatcher, call: Call) -> None:
    """Dispatch and combine without experts. Collective over the replica."""
    routed, metadata = form.dispatch(*call)
    form.combine(torch.zeros_like(routed.x_RH), metadata)


def slowest_rank(seconds: float, group: Group, device: torch.device) -> float:
    """The largest of the ranks' times."""
    return float(gather(torch.tensor([seconds], dtype=torch.float64, device=device), group).max())


def _seconds(form: Dispatcher, call: Call) -> float:
    """The time of a round trip, on the slowest rank."""
    device, replica = call[0].device, form.topology.replica_group
    assert replica is not None
    return slowest_rank(least_seconds(partial(round_trip, form, call), device), replica, device)
