"""Refit the routers of a compressed model to the choices of the source's.

The compressed model runs on the calibration text, twice, with one expert in memory at a time. The
first pass sees what its routers choose. In the second, each router is refitted when its inputs
arrive, before it runs: everything earlier in the model is compressed and refitted by then.

Legend: T tokens, K experts per token, E experts, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resmoe_dist.checkpoints.compressed import GroupFile
from resmoe_dist.checkpoints.entries import LayerEntry, RouterEntry
from resmoe_dist.checkpoints.restore import restored_expert
from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.checkpoints.tensor_files import is_finite
from resmoe_dist.compression.router_fit import refit_router
from resmoe_dist.compression.samples import LayerSamples, SampleFiles
from resmoe_dist.errors import UserError
from resmoe_dist.families.adapters import ExpertsAdapter
from resmoe_dist.families.models import meta_model
from resmoe_dist.families.names import map_names
from resmoe_dist.families.routers import RouterOutput, router_outputs
from resmoe_dist.jobs.streaming import ExpertReader, StreamedExperts, load_streamed, run_streamed
from resmoe_dist.routing import NO_EXPERT

_OPTION = "--recalibrate-router"


@dataclass(frozen=True)
class _Router:
    """A layer's router: its module, where its output holds the logits, and its weight.

    weight: its name in the module. stored: its name in the source's files.
    """

    module: str
    position: int
    weight: str
    stored: str


class RouterRefit:
    """Refits the routers of a source's compressed model. names: the stored tensors that it makes.

    sequences: the calibration tokens, all of the same length, so that they are one batch.

    Raises UserError if transformers does not say where the logits are, or they are more than a
    product with one stored weight.
    """

    def __init__(self, source: SourceCheckpoint, sequences: list[list[int]]) -> None:
        self._source, self._ids_BS = source, torch.tensor(sequences)
        self._routers = _find_routers(source)
        self.names = [router.stored for router in self._routers]

    def check(self, samples: SampleFiles) -> None:
        """Raise UserError for a damaged router, or one that runs several times in a pass.

        No fit is right for all of these times. samples: of the source model.
        """
        for layer, router in enumerate(self._routers):
            self._source.read_other(router.stored)
            if samples.parts(layer) > 1:
                raise _refused(f"{router.module} runs several times for the same text")

    @torch.no_grad()
    def run(
        self,
        folder: Path,
        layers: Sequence[LayerEntry],
        compressed: Sequence[int],
        samples: SampleFiles,
        dtype: torch.dtype | None = None,
        *,
        progress: bool = True,
    ) -> tuple[dict[str, Tensor], list[RouterEntry | None]]:
        """All routers' weights by stored name, and each layer's entry in the index.

        folder: holds the group files of `layers`. compressed: the layers that are not stored as
        they were. samples: of the source model. dtype: to compute in; None is that of config.json.
        A router whose inputs are the source's stays as it is, as does one without tokens; their
        entries are None.

        Memory: that of a calibration, and three float64 matrices [H, H].

        Raises UserError if a group file is damaged, or activations are not finite.
        """

        def make(layer: int, adapter: ExpertsAdapter, activation: nn.Module) -> _ChoosingExperts:
            return _ChoosingExperts(_reader(folder, layers[layer]), adapter, activation)

        def choices(description: str) -> list[Tensor]:
            batches = [self._ids_BS]
            run_streamed(self._source, model, batches, description, progress=progress)
            return [module.take_choices() for module in experts]

        model = load_streamed(self._source, make, dtype)
        experts = [model.get_submodule(site.module) for site in self._source.sites]
        before = choices("measuring routers")
        earlier = [experts[layer] for layer in compressed]
        refits = []
        for layer, router in enumerate(self._routers):
            old_EH = self._source.read_other(router.stored)
            refits.append(_LayerRefit(layer, router, old_EH, samples, earlier))
            module = model.get_submodule(router.module)
            module.register_forward_pre_hook(refits[-1], with_kwargs=True)
        after = choices("refitting routers")
        entries: list[RouterEntry | None] = [None] * len(layers)
        for layer, refit in enumerate(refits):
            if refit.is_done:
                source = samples.read(layer)
                entries[layer] = RouterEntry(
                    agreement_before=_agreement(source, before[layer]),
                    agreement_after=_agreement(source, after[layer]),
                )
        return {refit.router.stored: refit.weight_EH for refit in refits}, entries


class _LayerRefit:
    """Called before a router runs: gives it a weight that is right for its inputs.

    weight_EH: as it is stored. samples: of the source model. earlier: the compressed experts; until
    one of them has run, the router's inputs are the source's and its weight stays.
    """

    def __init__(
        self,
        layer: int,
        router: _Router,
        weight_EH: Tensor,
        samples: SampleFiles,
        earlier: Sequence[_ChoosingExperts],
    ) -> None:
        self.router, self.weight_EH, self.is_done = router, weight_EH, False
        self._layer, self._samples, self._earlier = layer, samples, earlier

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not any(experts.has_run for experts in self._earlier):
            return
        inputs_TH = next(iter((*args, *kwargs.values()))).flatten(0, -2)
        # `forward`: a call of the module would come here again.
        output = RouterOutput(module, self.router.position)
        logits_TE = output.logits(module.forward(*args, **kwargs), len(self.weight_EH))
        wanted_TE = self._samples.read(self._layer).logits_TE
        assert wanted_TE is not None
        if not (is_finite(inputs_TH) and is_finite(logits_TE)):
            raise UserError(
                f"{self.router.module}: activations of the compressed model are NaN or infinite; "
                "keep more, or compute in another --dtype"
            )
        weight_EH = refit_router(inputs_TH, wanted_TE - logits_TE, self.weight_EH)
        self.weight_EH, self.is_done = weight_EH.to(self.weight_EH.dtype), True
        parameter = module.get_parameter(self.router.weight)
        # Another tensor: the old one is mapped from the source's file.
        parameter.data = self.weight_EH.to(parameter.dtype)


class _ChoosingExperts(StreamedExperts):
    """Keeps what the router chose for each token."""

    def __init__(
        self, reader: ExpertReader, adapter: ExpertsAdapter, activation: nn.Module
    ) -> None:
        super().__init__(reader, adapter, activation)
        self._chosen: list[Tensor] = []

    @property
    def has_run(self) -> bool:
        """Whether any token came since the choices were taken."""
        return bool(self._chosen)

    def see_tokens(self, inputs_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> None:
        self._chosen.append(index_TK.clone())

    def take_choices(self) -> Tensor:
        """The experts of each token [T, K] since the last time."""
        chosen, self._chosen = self._chosen, []
        return torch.cat(chosen) if chosen else torch.empty(0, 1, dtype=torch.int64)


def _reader(folder: Path, layer: LayerEntry) -> ExpertReader:
    """Reads the restored experts of a layer from its group files in a folder."""
    groups = {expert: i for i, group in enumerate(layer.groups) for expert in group.experts}
    open_group = cache(lambda i: GroupFile(folder, layer, layer.groups[i]))
    return ExpertReader(
        layer.num_experts, layer.shape, lambda k: restored_expert(open_group(groups[k]), k)
    )


def _agreement(source: LayerSamples, chosen_TK: Tensor) -> float:
    """The share of the source's choices that are among those of the same token."""
    is_choice_TK = source.index_TK != NO_EXPERT
    is_shared_TK = (source.index_TK.unsqueeze(2) == chosen_TK.unsqueeze(1)).any(2)
    count = int(is_choice_TK.sum())
    return round(int((is_shared_TK & is_choice_TK).sum()) / count, 6) if count else 1.0


def _find_routers(source: SourceCheckpoint) -> list[_Router]:
    """The router of each of a source's sites. Raises UserError if one cannot be refitted."""
    model = meta_model(source.config)
    stored = map_names(model, source.other_names)
    names = {module: name for name, module in model.named_modules()}
    found = []
    for site, output in zip(source.sites, router_outputs(model, source.sites), strict=True):
        if output is None:
            kind = type(model).__name__
            raise _refused(f"transformers does not record all router logits of a {kind}")
        if site.tied:
            raise _refused(f"{site.module} shares its experts with {site.tied[0]}")
        module = names[output.module]
        weight = output.linear_weight(site.num_experts)
        if weight is None:
            raise _refused(f"{module} computes more than a product with one weight per expert")
        tensors = stored.sources.get(f"{module}.{weight}")
        if tensors is None or tensors.converter is not None:
            raise _refused(f"{module}.{weight} is not stored as one tensor")
        (name,) = stored.names_of([f"{module}.{weight}"])
        found.append(_Router(module, output.position, weight, name))
    if len({router.stored for router in found}) < len(found):
        raise _refused("layers share a router")
    return found


def _refused(why: str) -> UserError:
    return UserError(f"{_OPTION}: {why}; leave the option out")
