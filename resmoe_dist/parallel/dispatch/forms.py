"""The forms of dispatch by name, and the choice between them."""

from __future__ import annotations

from resmoe_dist.errors import UserError
from resmoe_dist.parallel.dispatch.auto import AutoDispatcher, StepSizes
from resmoe_dist.parallel.dispatch.base import Dispatcher, LocalDispatcher
from resmoe_dist.parallel.dispatch.decode import DecodeDispatcher
from resmoe_dist.parallel.dispatch.exchange import ExchangeDispatcher
from resmoe_dist.parallel.dispatch.shared_batch import SharedBatchDispatcher
from resmoe_dist.parallel.topology import Topology

FORMS = (
    AutoDispatcher.name,
    ExchangeDispatcher.name,
    DecodeDispatcher.name,
    SharedBatchDispatcher.name,
)


def check_form(form: str, topology: Topology) -> None:
    """Raise UserError for an unknown form, or one that this grid cannot use."""
    if form not in FORMS:
        raise UserError(f"--dispatch {form}: choose one of {', '.join(FORMS)}")
    if form == SharedBatchDispatcher.name and topology.replica_lanes > 1:
        raise UserError(
            f"--dispatch {form}: all ranks of a replica must carry the same batch; "
            f"give --lanes {topology.dp}"
        )


def dispatcher_for(
    num_experts: int,
    topology: Topology,
    form: str = AutoDispatcher.name,
    steps: StepSizes | None = None,
    *,
    leads: bool = True,
) -> Dispatcher:
    """The dispatcher of one layer.

    steps: of the layers that see the same tokens; None for a layer by itself. leads: whether the
    layer is the first of them. Raises UserError as `check_form` does.
    """
    check_form(form, topology)
    if topology.linked_size == 1:
        return LocalDispatcher(num_experts, topology)
    if form == ExchangeDispatcher.name and topology.replica_size > 1:
        return ExchangeDispatcher(num_experts, topology)
    if topology.replica_lanes == 1:
        return SharedBatchDispatcher(num_experts, topology)
    steps = steps or StepSizes.for_form(form)
    return AutoDispatcher(num_experts, topology, steps, leads=leads)
