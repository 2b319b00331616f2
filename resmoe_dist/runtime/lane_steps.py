"""Keeps the lanes of a replica in step: every forward pass exchanges tokens between them.

A lane whose texts have ended goes on with passes of one token, until those of all lanes have. The
lanes agree on that with one small message between peers per step, and only if a text can end
before its last step. Replicas share nothing, so they need not agree.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria
from transformers.modeling_outputs import MoEModelOutput

from resmoe_dist.parallel.collectives import gather
from resmoe_dist.parallel.topology import Topology
from resmoe_dist.runtime.decoding import TextEnds


class LaneSteps(StoppingCriteria):
    """Counts the steps of one batch, after `ends` has looked at its tokens. Stops nothing itself.

    limit: steps of a lane whose texts do not end before; the same on all lanes. has_prompts:
    whether this lane has texts to wait for. moments: when each step ended, in seconds of
    `time.perf_counter`.
    """

    def __init__(self, ends: TextEnds, limit: int, topology: Topology, has_prompts: bool) -> None:
        self._ends, self._limit, self._has_prompts = ends, limit, has_prompts
        self._peers = topology.peer_group
        self._over = False
        self.moments: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        """Note a step with new tokens [B, S]; collective over the peers. No row ends: [B]."""
        self._finish_step(input_ids.device)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def wait_for_lanes(self, model: PreTrainedModel) -> None:
        """Run the steps that other lanes still need. Collective over the replica."""
        if self._peers is None:
            return
        while not self._over:
            _idle_pass(model)
            self._finish_step(model.device)

    def _finish_step(self, device: torch.device) -> None:
        self.moments.append(time.perf_counter())
        self._over = len(self.moments) >= self._limit
        if self._over or self._peers is None or not self._ends.can_end:
            return
        ended = not self._has_prompts or self._ends.all_ended
        self._over = bool(gather(torch.tensor([ended], device=device), self._peers).all())


@torch.no_grad()
def _idle_pass(model: PreTrainedModel) -> None:
    """A decode step of one token, whose result does not count."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    if not model.config.is_encoder_decoder:
        model(input_ids=ids, use_cache=False)
        return
    # The encoder runs once per text, and has layers that exchange tokens too.
    states = torch.zeros(1, 1, model.config.hidden_size, dtype=model.dtype, device=model.device)
    encoded = MoEModelOutput(last_hidden_state=states)
    model(encoder_outputs=encoded, decoder_input_ids=ids, use_cache=False)
