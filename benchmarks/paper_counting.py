"""Memory of a MoE layer and FLOPs of a forward pass, from shapes alone.

Counted twice: as paper 000 counts (tables 5 and 7), and as this package stores and multiplies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from resmoe_dist.codecs import CodecSpec
from resmoe_dist.compression.stored_size import Reduces, StoredSize, share_of

# What remains of an expert: everything, kept entries, two factors, fewer rows, or fewer experts.
Form = Literal["dense", "pruned", "low_rank", "rows", "experts"]

KEEP = 0.25
FLOAT32, BFLOAT16, INT16 = 4, 2, 2
# Only batch times length counts: attention scores, which depend on the length, are left out.
TOKENS = 128


@dataclass(frozen=True)
class Method:
    """One row of tables 5 and 7. center: whether a dense centre is stored besides."""

    name: str
    form: Form
    center: bool = False


METHODS = (
    Method("Full", "dense"),
    Method("UP", "pruned"),
    Method("SP", "rows"),
    Method("SVD", "low_rank"),
    Method("M-SMoE", "experts"),
    Method("Git Re-Basin", "experts"),
    Method("MEO", "experts"),
    Method("MLP Fusion", "rows"),
    Method("ResMoE (UP)", "pruned", center=True),
    Method("ResMoE (SVD)", "low_rank", center=True),
)


@dataclass(frozen=True)
class ModelShape:
    """A published model.

    matrices: of an expert, each [rows, hidden] or its transpose. per_token: experts of a token.
    compressed: how many of its `moe_layers` the paper compresses. other_weights: weights that one
    token multiplies outside routed experts, over all layers. indices_per_value: int16 indices that
    reproduce table 5. center_replaces_expert: in table 7, the centre takes the place of one of a
    token's low-rank experts; otherwise it is added to them.
    """

    name: str
    hidden: int
    rows: int
    matrices: int
    experts: int
    per_token: int
    moe_layers: int
    compressed: int
    other_weights: int
    indices_per_value: int = 1
    center_replaces_expert: bool = False

    @property
    def expert_weights(self) -> int:
        """Weights of one expert."""
        return self.matrices * self.hidden * self.rows

    @property
    def rank(self) -> int:
        """Rank whose factors of the concatenated matrix hold KEEP of it (000, A.4)."""
        columns = self.matrices * self.hidden
        return int(KEEP * self.rows * columns / (self.rows + columns))

    @property
    def low_rank_products(self) -> int:
        """Multiplications per token and expert: each matrix by its share of the two factors."""
        return self.matrices * self.rank * (self.rows + self.hidden)


def paper_bytes(shape: ModelShape, method: Method) -> float:
    """Bytes of the routed experts as table 5 counts: float32 values; int16 indices if pruned.

    CSR's row offsets are left out, as are the router and DeepSeekMoE's shared experts.
    """
    kept = 1.0 if method.form == "dense" else KEEP
    index = INT16 * shape.indices_per_value if method.form == "pruned" else 0
    experts = shape.experts * shape.expert_weights * kept * (FLOAT32 + index)
    return experts + method.center * shape.expert_weights * FLOAT32


def our_bytes(shape: ModelShape, method: Method) -> int:
    """Bytes of the same as our codecs store them in bfloat16: indices and offsets included."""
    codec = method.form if method.form in ("pruned", "low_rank") else "dense"
    reduces: Reduces = "entries"
    if method.form == "rows" or method.form == "experts":
        reduces = method.form
    size = StoredSize(
        count=shape.experts,
        rows=shape.rows,
        columns=shape.matrices * shape.hidden,
        itemsize=BFLOAT16,
        residual_codec=CodecSpec(name=codec),
        center_codec=CodecSpec(name="dense") if method.center else None,
        reduces=reduces,
    )
    return size.bytes_at(None if method.form == "dense" else KEEP)


def paper_flops(shape: ModelShape, method: Method) -> float:
    """FLOPs of TOKENS tokens as table 7 counts: two per weight and token.

    Unstructured pruning counts kept entries only, but is dense if a centre is added to it.
    """
    if method.form == "low_rank":
        count = shape.per_token - (method.center and shape.center_replaces_expert)
        layer = count * shape.low_rank_products + method.center * shape.expert_weights
        return _model_flops(shape, layer)
    reduced = method.form == "rows" or (method.form == "pruned" and not method.center)
    dense = shape.per_token * shape.expert_weights
    return _model_flops(shape, KEEP * dense if reduced else dense)


def our_flops(shape: ModelShape, method: Method) -> float:
    """FLOPs of the same as our kernels multiply, in mode `shared`: the centre once per token.

    The kernels expand a pruned row and multiply its zeros too. Merged experts: a token still runs
    as many experts as before, or all that are left if those are fewer.
    """
    count, weights = shape.per_token, shape.expert_weights
    if method.form == "experts":
        count = min(count, share_of(shape.experts, KEEP))
    if method.form == "rows":
        weights = shape.matrices * shape.hidden * share_of(shape.rows, KEEP)
    if method.form == "low_rank":
        weights = shape.low_rank_products
    return _model_flops(shape, count * weights + method.center * shape.expert_weights)


def _model_flops(shape: ModelShape, compressed_layer: float) -> float:
    """compressed_layer: multiplications per token in the routed experts of a compressed layer."""
    dense = (shape.moe_layers - shape.compressed) * shape.per_token * shape.expert_weights
    return 2 * TOKENS * (shape.other_weights + dense + shape.compressed * compressed_layer)


def _mixtral() -> ModelShape:
    hidden, layers, kv, vocabulary, experts = 4096, 32, 1024, 32000, 8
    layer = 2 * hidden * hidden + 2 * hidden * kv + experts * hidden
    return ModelShape(
        "Mixtral", hidden, 14336, 3, experts, 2, layers, compressed=24,
        other_weights=layers * layer + hidden * vocabulary, center_replaces_expert=True,
    )  # fmt: skip


def _deepseek() -> ModelShape:
    # The first layer is dense; each other one has two shared experts besides the routed ones.
    hidden, rows, layers, dense_rows, vocabulary, experts = 2048, 1408, 28, 10944, 102400, 64
    moe = 2 * 3 * hidden * rows + experts * hidden
    other = layers * 4 * hidden * hidden + 3 * hidden * dense_rows + (layers - 1) * moe
    return ModelShape(
        "DeepSeekMoE", hidden, rows, 3, experts, 6, layers - 1, compressed=21,
        other_weights=other + hidden * vocabulary, indices_per_value=2,
    )  # fmt: skip


def _switch() -> ModelShape:
    # A token here is one of the encoder and one of the decoder. Every other layer is MoE.
    hidden, rows, layers, vocabulary, experts = 768, 3072, 12, 32128, 8
    attention = layers * (4 + 8) * hidden * hidden
    moe_layers = 2 * layers // 2
    dense_and_routers = moe_layers * (2 * hidden * rows + experts * hidden)
    return ModelShape(
        "switch-base-8", hidden, rows, 2, experts, 1, moe_layers, compressed=8,
        other_weights=attention + dense_and_routers + hidden * vocabulary,
    )  # fmt: skip


SHAPES = (_mixtral(), _deepseek(), _switch())
