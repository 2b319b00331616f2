"""A checkpoint of a real model's shapes, its experts' values drawn at random.

    python -m benchmarks.synthetic DIR --layers 2

Mixtral's layout in bfloat16, one file per layer and one for the rest. At every entry of the design
matrix, in a row order of its own, expert k of a layer holds

    std · (base + noise · own_k) / √(1 + noise²)

with base and own_k independent standard normal numbers: no value is used twice. Matching rows of
two experts correlate by 1 / (1 + noise²), 0.8 at the default, and others not at all. That is easier
to align than trained experts are, and all rows are alike, which those of trained ones are not: it
is for measuring seconds and bytes, and says nothing of errors.

All is decided by the seed, whatever the number of threads. For Mixtral-8x7B it takes less than 1 GB
of memory: one projection of the base in float32, and a few blocks of rows per thread.

Legend: I rows, H hidden.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resmoe_dist.checkpoints.model_folder import shard_name, write_shard_index
from resmoe_dist.checkpoints.tensor_files import read_json, write_json
from resmoe_dist.errors import UserError
from resmoe_dist.parallel.entry_point import quiet_libraries, run_entry_point

VOCABULARY = 1000
_STD = 0.02
_BLOCK_VALUES = 1 << 21
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
        """What its config.json holds."""
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
            "synthetic": {"noise": self.noise, "seed": self.seed},
        }

    @property
    def expert_bytes(self) -> int:
        """Of all experts together."""
        return self.layers * self.experts * 3 * self.rows * self.hidden * 2

    def write(self, folder: Path) -> None:
        """Write the model's folder, under a temporary name until it is whole.

        Raises UserError where it exists, or the disk is too small.
        """
        if folder.exists():
            raise UserError(f"{folder}: exists already; remove it or choose another folder")
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
        if free < self.expert_bytes:
            partial.rmdir()
            raise UserError(
                f"{folder}: {self.expert_bytes / 1e9:.1f} GB of experts, {free / 1e9:.1f} GB free; "
                "choose fewer layers or another disk"
            )
        weight_map = {}
        for number in range(self.layers + 1):
            file = shard_name(number, self.layers + 1)
            if number < self.layers:
                others, experts = self._other_tensors(number), self._expert_shapes(number)
                self._write_experts(partial / file, number, others, experts)
            else:
                others, experts = self._model_tensors(), {}
                _reserve(partial / file, others, experts)
            weight_map |= dict.fromkeys([*others, *experts], file)
        write_shard_index(partial, weight_map)
        write_json(partial / "config.json", self.config())
        partial.rename(folder)

    def is_in(self, folder: Path) -> bool:
        """Whether it was written there. Raises UserError if another model was."""
        config = folder / "config.json"
        if not config.exists():
            return False
        if read_json(config) != self.config():
            raise UserError(f"{folder}: holds another model; remove it or choose another folder")
        return True

    def row_order(self, layer: int, expert: int) -> Tensor:
        """Which row of the base each stored row of an expert is: [I]."""
        return torch.randperm(self.rows, generator=self._generator(layer, "order", expert))

    def _generator(self, *place: int | str) -> torch.Generator:
        """Random numbers of one place in the model; torch's generator has 32 bits of seed."""
        digest = hashlib.sha256(repr((self.seed, *place)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))

    def _random(self, name: str, *shape: int) -> Tensor:
        return torch.empty(shape).normal_(std=_STD, generator=self._generator(name)).bfloat16()

    def _model_tensors(self) -> dict[str, Tensor]:
        """What belongs to no layer."""
        tables = ("model.embed_tokens.weight", "lm_head.weight")
        tensors = {name: self._random(name, VOCABULARY, self.hidden) for name in tables}
        return tensors | {"model.norm.weight": torch.ones(self.hidden).bfloat16()}

    def _other_tensors(self, layer: int) -> dict[str, Tensor]:
        """Attention, norms and router of a layer."""
        config, H = self.config(), self.hidden
        query, key = (config[f"num_{kind}_heads"] for kind in ("attention", "key_value"))
        query, key = query * config["head_dim"], key * config["head_dim"]
        shapes = {
            "self_attn.q_proj": (query, H),
            "self_attn.k_proj": (key, H),
            "self_attn.v_proj": (key, H),
            "self_attn.o_proj": (H, query),
            "block_sparse_moe.gate": (self.experts, H),
        }
        prefix = f"model.layers.{layer}."
        names = {f"{prefix}{name}.weight": shape for name, shape in shapes.items()}
        tensors = {name: self._random(name, *shape) for name, shape in names.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = torch.ones(H).bfloat16()
        return tensors

    def _expert_shapes(self, layer: int) -> dict[str, tuple[int, int]]:
        return {
            _expert_tensor(layer, expert, projection): self._shape(projection)
            for projection in _PROJECTIONS
            for expert in range(self.experts)
        }

    def _shape(self, projection: str) -> tuple[int, int]:
        I, H = self.rows, self.hidden  # noqa: E741
        return (H, I) if projection == "w2" else (I, H)

    def _write_experts(
        self,
        path: Path,
        layer: int,
        others: dict[str, Tensor],
        experts: dict[str, tuple[int, int]],
    ) -> None:
        """One layer's file: what is small at once, the experts block by block into their places."""
        places = _reserve(path, others, experts)
        with open(path, "r+b") as file, ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for projection in _PROJECTIONS:
                self._write_projection(file.fileno(), places, layer, projection, pool)
            # Else the disk would be at it while something is timed.
            os.fsync(file.fileno())

    def _write_projection(
        self,
        file: int,
        places: dict[str, int],
        layer: int,
        projection: str,
        pool: ThreadPoolExecutor,
    ) -> None:
        """One projection of all experts of a layer."""
        base = torch.empty(self._shape(projection))
        parts = base.split(_rows_per_block(base))
        generators = [self._generator(layer, projection, i, "base") for i in range(len(parts))]
        list(pool.map(lambda part, generator: part.normal_(generator=generator), parts, generators))

        def write(expert: int) -> None:
            place = places[_expert_tensor(layer, expert, projection)]
            self._write_expert(file, place, layer, expert, projection, base)

        list(pool.map(write, range(self.experts)))

    def _write_expert(
        self, file: int, place: int, layer: int, expert: int, projection: str, base: Tensor
    ) -> None:
        """One projection of one expert. place: its first byte in the file."""
        order_I = self.row_order(layer, expert)
        generator = self._generator(layer, projection, expert, "own")
        scale = _STD / math.sqrt(1 + self.noise**2)
        step = _rows_per_block(base)
        for start in range(0, base.shape[0], step):
            if projection == "w2":  # a neuron is a column of it
                block = base[start : start + step].index_select(1, order_I)
            else:
                block = base.index_select(0, order_I[start : start + step])
            own = torch.empty_like(block).normal_(generator=generator)
            block.add_(own, alpha=self.noise).mul_(scale)
            data = memoryview(block.bfloat16().view(torch.uint8).numpy()).cast("B")
            while data:
                written = os.pwrite(file, data, place)
                data, place = data[written:], place + written


def _expert_tensor(layer: int, expert: int, projection: str) -> str:
    return f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{projection}.weight"


def _rows_per_block(matrix: Tensor) -> int:
    return max(1, _BLOCK_VALUES // matrix.shape[1])


def _reserve(
    path: Path, tensors: dict[str, Tensor], shapes: dict[str, tuple[int, int]]
) -> dict[str, int]:
    """A safetensors file with `tensors`, and room for more of `shapes`, all bfloat16.

    Returns where the data of the latter begin, by name.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    everything = {name: tensor.shape for name, tensor in tensors.items()} | shapes
    for name, shape in everything.items():
        begin, end = end, end + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    data = 8 + len(header)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors.values():
            file.write(tensor.view(torch.uint8).numpy().tobytes())
        file.truncate(data + end)
    return {name: data + entries[name]["data_offsets"][0] for name in shapes}


def add_model_arguments(parser: argparse.ArgumentParser, layers: int | None = None) -> None:
    """The options that describe a synthetic model. layers: the default; None makes it required."""
    add = parser.add_argument
    add("--family", choices=("mixtral",), default="mixtral")
    if layers is None:
        add("--layers", type=int, required=True)
    else:
        add("--layers", type=int, default=layers)
    add("--hidden", type=int, default=4096)
    add("--rows", type=int, default=14336, help="intermediate size of each expert")
    add("--experts", type=int, default=8)
    add(
        "--noise",
        type=float,
        default=0.5,
        help="of each expert, in units of their base (default 0.5; 1000: unrelated experts)",
    )
    add("--seed", type=int, default=0)


def model_of(args: argparse.Namespace) -> SyntheticModel:
    """What the options of `add_model_arguments` describe."""
    names = ("layers", "hidden", "rows", "experts", "noise", "seed")
    return SyntheticModel(**{name: getattr(args, name) for name in names})


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.synthetic", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path)
    add_model_arguments(parser)
    args = parser.parse_args(arguments)
    quiet_libraries()
    run_entry_point(lambda: model_of(args).write(args.folder))


if __name__ == "__main__":
    main()
