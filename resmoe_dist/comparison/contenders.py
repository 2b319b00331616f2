"""What `compare` compares: methods with their options, by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from resmoe_dist.errors import UserError


@dataclass(frozen=True)
class Contender:
    """One way to compress a model.

    kind: of method, for the report. text: one line on what it does. options: of `compress`.
    calibrated: whether it needs `--calibration`. seeded: whether its method has an option `seed`.
    whole_layer: whether it needs all experts of a layer in one group, whatever `--ep` is.
    fixed_size: whether its bytes follow from its options alone, whatever the budget.
    needs_target: whether its budget is bytes only. For a share to keep, it is `resmoe` again or has
    nothing to keep.
    """

    kind: str
    text: str
    options: dict[str, Any] = field(default_factory=dict)
    calibrated: bool = False
    seeded: bool = False
    whole_layer: bool = False
    fixed_size: bool = False
    needs_target: bool = False

    @property
    def needs(self) -> list[Any]:
        """What decides the figures of a row, for digests."""
        return [self.options, self.calibrated, self.seeded, self.whole_layer]

    def compress_options(self, seed: int, ep: int) -> dict[str, Any]:
        """The options of `compress` for one run."""
        options = {"ep": 1 if self.whole_layer else ep} | self.options
        if self.seeded:
            method = options["method"]
            options["method"] = f"{method}{',' if ':' in method else ':'}seed={seed}"
        return options


def _calibrated(kind: str, text: str, method: str) -> Contender:
    return Contender(kind, text, {"method": method}, calibrated=True)


def _rounded(bits: int) -> Contender:
    text = f"each weight rounded to {bits} bits, in groups of 64 with scale and zero point"
    return Contender(ROUNDING, text, {"method": f"rtn:bits={bits}"}, fixed_size=True)


def _of_layer(kind: str, text: str, method: str) -> Contender:
    """A method that chooses among all experts of a layer, by what a calibration text shows."""
    return Contender(kind, text, {"method": method}, calibrated=True, whole_layer=True)


OURS, PRUNING, LOW_RANK, DROPPING = "ours", "pruning", "low rank", "dropping experts"
MERGING, WIDTH, ROUNDING = "merging experts", "fewer neurons", "fewer bits"

CONTENDERS: dict[str, Contender] = {
    "resmoe": Contender(OURS, "the default: for a size few bits, for a share kept entries"),
    "resmoe-calibrated": Contender(
        OURS, "the same by what a calibration text shows of errors and layers", calibrated=True
    ),
    "resmoe-pruned": Contender(
        OURS,
        "centre and kept entries chosen together, exactly",
        {"codec": "pruned"},
        needs_target=True,
    ),
    "resmoe-pruned-calibrated": Contender(
        OURS,
        "the same, errors weighted by activations",
        {"codec": "pruned"},
        calibrated=True,
        needs_target=True,
    ),
    "gptq": Contender(
        ROUNDING,
        "ours reduced to GPTQ: no centre, no rotation, scalar codes; bits chosen like ours",
        {
            "codec": "quantized:coder=scalar,rotate=false,group_size=64",
            "center": "none",
        },
        calibrated=True,
        needs_target=True,
    ),
    "resmoe-svd": Contender(OURS, "low-rank residuals", {"codec": "low_rank"}),
    "resmoe-no-alignment": Contender(
        OURS, "the default with rows in stored order", {"align": "none", "center": "joint"}
    ),
    "resmoe-no-center": Contender(OURS, "the default without a centre", {"center": "none"}),
    "resmoe-barycenter": Contender(
        OURS,
        "the papers' recipe: POT's barycentre, then pruning",
        {"align": "pot", "center": "barycenter", "allocate": "expert"},
    ),
    "resmoe-ot_fusion": Contender(
        OURS,
        "the same, aligned layer by layer as OT Fusion does",
        {"align": "ot_fusion", "center": "barycenter", "allocate": "expert"},
    ),
    "up": Contender(PRUNING, "the smallest entries of each expert go", {"method": "up"}),
    "up-sep": Contender(PRUNING, "the same in each projection", {"method": "up:form=sep"}),
    "svd": Contender(LOW_RANK, "truncated SVD of each expert", {"method": "svd"}),
    "svd-sep": Contender(LOW_RANK, "the same of each projection", {"method": "svd:form=sep"}),
    "d2_moe": _calibrated(LOW_RANK, "shared base, differences that fit the inputs", "d2_moe"),
    "mobe": Contender(
        LOW_RANK, "gate and up as products with mixtures of shared bases", {"method": "mobe"}
    ),
    "sp": Contender(WIDTH, "the smallest neurons go", {"method": "sp"}),
    "sp-sep": Contender(WIDTH, "the same in each projection", {"method": "sp:form=sep"}),
    "mlp_fusion": Contender(WIDTH, "k-means over neurons", {"method": "mlp_fusion"}, seeded=True),
    "reap": _of_layer(DROPPING, "experts with the smallest weighted outputs go", "reap"),
    "frequency_pruning": _of_layer(DROPPING, "the least used experts go", "frequency_pruning"),
    "averaging": _of_layer(MERGING, "plain mean of experts routed alike", "averaging"),
    "git_rebasin": _of_layer(MERGING, "the same after weight matching", "git_rebasin"),
    "repair": _of_layer(
        MERGING, "git_rebasin, with the statistics of the merged neurons restored", "repair"
    ),
    "zipit": _of_layer(MERGING, "neurons with correlated activations become one", "zipit"),
    "m_smoe": _of_layer(MERGING, "weighted by use, most used experts of all layers", "m_smoe"),
    "mc_smoe": _of_layer(
        MERGING, "the same, then merged experts as low rank plus whole columns", "mc_smoe"
    ),
    "hc_smoe": _of_layer(MERGING, "experts with similar outputs, hierarchically", "hc_smoe"),
    "uncurl": _of_layer(MERGING, "spectral clusters of router logits", "uncurl"),
    "frequency_merging": _of_layer(
        MERGING, "rare experts into each layer's most used ones", "frequency_merging"
    ),
    **{f"rtn-{bits}bit": _rounded(bits) for bits in (8, 4, 3, 2)},
}


def contenders_named(text: str) -> dict[str, Contender]:
    """The contenders of `--methods`: `all`, or names with commas. Raises UserError."""
    if text == "all":
        return CONTENDERS
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in CONTENDERS:
            raise UserError(f"--methods {name!r}: choose all, or of {', '.join(CONTENDERS)}")
    return {name: CONTENDERS[name] for name in names}
