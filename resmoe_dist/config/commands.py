"""The configuration of every command.

Names of codecs, methods and execution modes are checked when a command runs: their registries
import torch, which `--help` must not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ValidationInfo, model_validator
from typing_extensions import Self

from resmoe_dist.config.grid import ExecutionConfig, GridConfig
from resmoe_dist.config.options import CommandConfig, option
from resmoe_dist.config.scoring import ScoredTextConfig, TasksConfig
from resmoe_dist.config.storage import StorageConfig
from resmoe_dist.config.values import Dtype, Layers, Names, Prompts, Shares, Size


class CompressConfig(StorageConfig):
    """compress a model's experts into centres and residuals"""

    has_presets: ClassVar[bool] = True

    source: Path = option(help="Hugging Face model folder (safetensors)", positional=True)
    output: Path = option(help="folder to write; must not exist", positional=True)
    ep: int = option(
        help="groups per layer, each with its own centre: the EP size to serve at", metavar="G"
    )
    method: str = option("resmoe", "way to compress a layer: NAME or NAME:option=value,…")
    align: Literal["loo", "pot", "ot_fusion", "none"] = option(
        "loo",
        "row alignment: leave-one-out descent, POT's barycentre of whole rows or (ot_fusion) of "
        "the input projections, or none",
    )
    solver: Literal["scipy", "lapx"] = option("scipy", "assignment solver for --align loo")
    center: Literal["auto", "joint", "barycenter", "mean", "none"] = option(
        "auto",
        "auto: chosen together with the residuals, left out where it does not pay for its bytes; "
        "joint: always; barycenter: mean of the aligned experts; mean: of the experts as stored",
    )
    allocate: Literal["block", "expert", "group", "model"] = option(
        "group",
        "what shares one budget of kept entries: 64 entries of a row, an expert, a group, or the "
        "whole model",
    )
    calibration: Path | None = option(
        None,
        "weight errors by what this UTF-8 text shows: activations, and which layers matter most",
        metavar="TEXT",
    )
    recalibrate_router: bool = option(
        False,
        "refit the routers so that they choose on the compressed model's hidden states as the "
        "source's do on its own, by the text of --calibration",
    )
    max_memory: Size | None = option(
        None,
        "bound on each process's memory, page cache aside: 8GB, 7500MiB (default: none)",
        metavar="SIZE",
    )
    device: Literal["cpu", "cuda"] = option(
        "cpu", "where to compute; the ranks on a host take its GPUs in turn"
    )
    drop_unused: bool = option(
        False,
        "leave out tensors that transformers does not load, such as the experts of MTP layers",
    )
    resume: bool = option(False, "continue an interrupted run; finished files are kept")

    @property
    def _default_codec(self) -> str:
        # What a size means for methods and budgets that keep entries.
        keeps_entries = self.method.partition(":")[0] != "resmoe" or self.allocate != "group"
        if self.target_bytes is not None and keeps_entries:
            return "pruned"
        return super()._default_codec

    @model_validator(mode="before")
    @classmethod
    def _mean_needs_no_alignment(cls, values: dict[str, Any], info: ValidationInfo) -> Any:
        chosen = set(values) - (info.context or {}).get("preset", set())
        if values.get("center") == "mean" and "align" not in chosen:
            return values | {"align": "none"}
        return values

    @model_validator(mode="after")
    def _check_mean(self) -> Self:
        if self.center == "mean" and self.align != "none":
            raise ValueError(f"--center mean averages experts as stored; drop --align {self.align}")
        return self


class CompareConfig(TasksConfig, ScoredTextConfig):
    """compare compression methods on a model: bytes, errors, quality, in one table"""

    source: Path = option(help="Hugging Face model folder (safetensors)", positional=True)
    report: Path = option(help="folder for the report and finished rows", metavar="DIR")
    methods: str = option("all", "all, or names with commas", metavar="NAMES")
    keep: Shares | None = option(
        None, "shares to keep, with commas (default: 0.25)", exclusive="budget"
    )
    target_bytes: Shares | None = option(
        None,
        "shares of the dense expert bytes, everything counted, with commas",
        metavar="SHARES",
        exclusive="budget",
    )
    calibration: Path | None = option(
        None, "UTF-8 text for the methods that look at activations", metavar="TEXT"
    )
    layers: Layers = option("all", "MoE layers to compress: all, last:24, 8-31 or 0,2")
    ep: int = option(1, "groups per layer, for the methods that have any", metavar="G", ge=1)
    dtype: Dtype | None = option(None, "of stored values (default: the source's)")
    seeds: int = option(3, "runs of each method that draws at random", ge=1)
    resume: bool = option(False, "continue a comparison in its folder; finished rows are kept")
    keep_models: bool = option(False, "keep the compressed models in DIR/work")


class InspectConfig(CommandConfig):
    """show errors and bytes of a compressed checkpoint"""

    folder: Path = option(help="compressed folder", positional=True)
    json_file: Path | None = option(None, "write everything here too", name="json", metavar="F")


class VerifyConfig(CommandConfig):
    """check digests and shapes; exit code 1 if a file is bad"""

    folder: Path = option(help="compressed folder", positional=True)


class RestoreConfig(CommandConfig):
    """write a dense model that plain transformers loads"""

    folder: Path = option(help="compressed folder", positional=True)
    output: Path = option(help="folder to write; must not exist", positional=True)
    dtype: Dtype | None = option(None, "of the experts (default: as stored)")
    full_rows: bool = option(
        False,
        "give experts that are stored with fewer rows the source's number, with rows of zeros",
    )


class EvaluateConfig(ExecutionConfig, TasksConfig, ScoredTextConfig):
    """perplexity, or accuracy on tasks, of a source, dense or compressed model"""

    tasks: Names | None = option(
        None,
        "lm-eval tasks to score instead, with commas: piqa,winogrande",
        metavar="NAMES",
        exclusive="data",
        required_set=True,
    )
    model: Path = option(help="model folder", positional=True)
    json_file: Path | None = option(None, "write the result here too", name="json", metavar="F")


class GridEvaluateConfig(EvaluateConfig, GridConfig):
    """perplexity, or accuracy on tasks, on an expert x tensor parallel grid"""


class InferConfig(ExecutionConfig, GridConfig):
    """generate text on an expert x tensor parallel grid"""

    model: Path | None = option(None, "compressed folder (default: the embedded model)")
    prompt: Prompts | None = option(
        None, "text to continue; may be repeated", metavar="TEXT", exclusive="data", repeatable=True
    )
    prompts: Path | None = option(None, "one prompt per line", metavar="FILE", exclusive="data")
    max_new_tokens: int = option(64, "per prompt", ge=1)
    temperature: float | None = option(None, "sample; greedy without it", gt=0)
    top_p: float | None = option(None, "nucleus sampling, with --temperature", gt=0, le=1)
    seed: int = option(0, "of the sampling; the same text on every grid")
    batch_size: int = option(8, "prompts that a lane works on at a time", ge=1)
    chat: bool = option(False, "prompts are messages: use the tokenizer's chat template")
    json_file: Path | None = option(
        None, "write completions and figures here", name="json", metavar="F"
    )

    @model_validator(mode="after")
    def _check_sampling(self) -> Self:
        if self.top_p is not None and self.temperature is None:
            raise ValueError(f"--top-p {self.top_p}: needs --temperature")
        return self


class PlanConfig(StorageConfig, GridConfig):
    """show what a model needs on each rank of a grid, without its weights"""

    model: Path = option(help="model folder, compressed folder or config.json", positional=True)
    lanes: int | None = option(
        None,
        "lanes of the grid, which divide the sequences (default: one per sequence, at most --ep)",
        metavar="L",
        ge=1,
    )
    groups: int | None = option(
        None,
        "groups per layer, if the checkpoint is compressed for another --ep",
        metavar="G",
        ge=1,
    )
    context: int = option(4096, "tokens of each sequence in the KV cache; 0: no cache", ge=0)
    batch_size: int = option(1, "sequences at a time, over all lanes", metavar="N", ge=1)
    gpu_memory: Size | None = option(
        None, "of each rank: 80GB; says which grids fit", metavar="SIZE"
    )
    ranks: int = option(16, "list every grid of up to this many ranks", metavar="N", ge=1)
    json_file: Path | None = option(None, "write the figures here too", name="json", metavar="F")


class TinyModelConfig(CommandConfig):
    """train a tiny MoE model on Python's own sources"""

    directory: Path = option(help="folder to write", positional=True)
    family: Literal["mixtral", "deepseek_v3", "qwen3_moe", "switch"] = option(
        "mixtral", "architecture"
    )
    seed: int = option(0, "of weights and training")
