"""Forms of dispatch: tokens to the ranks that own their experts, and the sums back."""

from resmoe_dist.parallel.dispatch.auto import AutoDispatcher, StepSizes
from resmoe_dist.parallel.dispatch.base import Dispatcher, LocalDispatcher
from resmoe_dist.parallel.dispatch.decode import DecodeDispatcher
from resmoe_dist.parallel.dispatch.exchange import ExchangeDispatcher
from resmoe_dist.parallel.dispatch.forms import FORMS, check_form, dispatcher_for
from resmoe_dist.parallel.dispatch.measure import measure_decode_limit
from resmoe_dist.parallel.dispatch.shared_batch import SharedBatchDispatcher

__all__ = [
    "FORMS",
    "AutoDispatcher",
    "DecodeDispatcher",
    "Dispatcher",
    "ExchangeDispatcher",
    "LocalDispatcher",
    "SharedBatchDispatcher",
    "StepSizes",
    "check_form",
    "dispatcher_for",
    "measure_decode_limit",
]
