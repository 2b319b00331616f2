"""A checkpoint with the shapes of a real model and random experts.

Mixtral's layout in bfloat16, one file per expert tensor and one per layer for the rest. At every
entry of the design matrix, expert k of a layer holds, with its rows in a random order,

    std · (base + noise · own_k) / √(1 + noise²)

where base and own_k are independent standard normal numbers. Matching rows of two experts correlate
by 1 / (1 + noise²), 0.8 by default; other rows do not correlate. That is easier to align than
trained experts, and all rows are alike, so use it to measure seconds and bytes, not errors.

The seed alone decides the bytes, not the number of threads. For Mixtral-8x7B each thread takes
0.6 GB while it writes.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resmoe_dist.checkpoints.model_folder import write_shard_index
from resmoe_dist.checkpoints.tensor_files import read_json, write_json, write_tensors
from resmoe_dist.errors import UserError

VOCABULARY = 1000
_STD = 0.02
_HEAD_SIZE = 128
_KEY_VALUE_HEADS = 8
# In Mixtral's files the gate projection is w1, up w3 and down w2.
_PROJECTIONS = ("w1", "w3", "w2")


@dataclass(frozen=True)
class SyntheticModel:
    """Shapes and statistics of a checkpoint. noise: of the experts, in units of their base."""

    layers: int
    hidden: int = 4096
    rows: int = 14336
    experts: int = 8
    noise: float = 0.5
    seed: int = 0

    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        heads = max(1, self.hidden // _HEAD_SIZE)
        return {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "dtype": "bfloat16",
            "hidden_size": self.hidden,
            "intermediate_size": self.rows,
            "num_hidden_layers": self.layers,
            "num_local_experts": self.experts,
            "num_experts_per_tok": min(2, self.experts),
            "num_attention_heads": heads,
            "num_key_value_heads": math.gcd(heads, _KEY_VALUE_HEADS),
            "head_dim": self.hidden // heads,
            "vocab_size": VOCABULARY,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "synthetic": asdict(self),
        }

    @property
    def expert_bytes(self) -> int:
        """Bytes of all experts."""
        return self.layers * self.experts * 3 * self.rows * self.hidden * 2

    def write(self, folder: Path) -> None:
        """Write the model's folder, under a temporary name until it is complete.

        Raises UserError if it exists or the disk is too small.
        """
        if folder.exists():
            raise UserError(f"{folder}: exists already; remove it or choose another folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        if free < self.expert_bytes:
            raise UserError(
                f"{folder}: {self.expert_bytes / 1e9:.1f} GB of experts, {free / 1e9:.1f} GB free; "
                "choose fewer layers or another disk"
            )
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        weight_map = {}

        def write(file: str, tensors: dict[str, Tensor]) -> None:
            write_tensors(partial / file, tensors, {})
            weight_map.update(dict.fromkeys(tensors, file))

        write("others.safetensors", self._model_tensors())
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for layer in range(self.layers):
                write(f"layer-{layer}.safetensors", self._other_tensors(layer))
                for w in _PROJECTIONS:
                    base = self._normal(self._shape(w), layer, w, "base")

                    def write_expert(k: int, layer: int = layer, w: str = w, base=base) -> None:
                        name = f"model.layers.{layer}.block_sparse_moe.experts.{k}.{w}.weight"
                        tensors = {name: self._projection(layer, k, w, base)}
                        write(f"layer-{layer}-{k}-{w}.safetensors", tensors)

                    list(pool.map(write_expert, range(self.experts)))
        write_shard_index(partial, dict(sorted(weight_map.items())))
        write_json(partial / "config.json", self.config())
        partial.rename(folder)

    def ensure_in(self, folder: Path) -> None:
        """Write it unless it is there. Raises UserError if the folder holds another model."""
        config = folder / "config.json"
        if not config.exists():
            self.write(folder)
        elif read_json(config) != self.config():
            raise UserError(f"{folder}: holds another model; remove it or choose another folder")

    def row_order(self, layer: int, expert: int) -> Tensor:
        """The row of the base that each stored row of an expert is made from."""
        return torch.randperm(self.rows, generator=self._generator(layer, "order", expert))

    def _projection(self, layer: int, expert: int, w: str, base: Tensor) -> Tensor:
        own = self._normal(base.shape, layer, w, expert)
        # The neurons are the columns of w2, and the rows of the others.
        matrix = base.index_select(1 if w == "w2" else 0, self.row_order(layer, expert))
        scale = _STD / math.sqrt(1 + self.noise**2)
        return matrix.add_(own, alpha=self.noise).mul_(scale).bfloat16()

    def _generator(self, *place: int | str) -> torch.Generator:
        """Random numbers of one place in the model. torch's generator takes 32 bits of seed."""
        digest = hashlib.sha256(repr((self.seed, *place)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))

    def _normal(self, shape: tuple[int, ...], *place: int | str) -> Tensor:
        return torch.empty(shape).normal_(generator=self._generator(*place))

    def _weights(self, shapes: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
        return {
            f"{name}.weight": self._normal(shape, name).mul_(_STD).bfloat16()
            for name, shape in shapes.items()
        }

    def _model_tensors(self) -> dict[str, Tensor]:
        """Embedding, head and last norm."""
        table = (VOCABULARY, self.hidden)
        norm = {"model.norm.weight": torch.ones(self.hidden).bfloat16()}
        return self._weights({"model.embed_tokens": table, "lm_head": table}) | norm

    def _other_tensors(self, layer: int) -> dict[str, Tensor]:
        """Attention, norms and router of a layer."""
        config, prefix, hidden = self.config(), f"model.layers.{layer}", self.hidden
        query, key = (
            config[f"num_{kind}_heads"] * config["head_dim"] for kind in ("attention", "key_value")
        )
        shapes = {
            f"{prefix}.self_attn.q_proj": (query, hidden),
            f"{prefix}.self_attn.k_proj": (key, hidden),
            f"{prefix}.self_attn.v_proj": (key, hidden),
            f"{prefix}.self_attn.o_proj": (hidden, query),
            f"{prefix}.block_sparse_moe.gate": (self.experts, hidden),
        }
        norms = ("input_layernorm", "post_attention_layernorm")
        ones = {f"{prefix}.{norm}.weight": torch.ones(hidden).bfloat16() for norm in norms}
        return self._weights(shapes) | ones

    def _shape(self, w: str) -> tuple[int, int]:
        return (self.hidden, self.rows) if w == "w2" else (self.rows, self.hidden)
