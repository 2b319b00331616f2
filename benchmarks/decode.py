"""Decoding with a whole model: compressed, beside its dense restoration in plain transformers.

A Mixtral with random weights is compressed by the real pipeline and restored by the real `restore`;
all three stay in --work for later runs. Each way then generates greedily from the same random
prompts, in turns: the dense model with each of transformers' implementations of experts (they share
one set of weights; one that is four times as slow as another for the first tokens is left out), the
compressed model in each mode of execution. Prompts have one token by default, so nearly all of the
time is decoding, and no sequence ends early.

tokens/s   new tokens of all sequences / seconds of `generate`, median
ratio      to the fastest dense way
equal      share of the new tokens that equal those of the first dense way. In float32 all must; in
           bfloat16 one different rounding may change all tokens that follow

--launcher also runs launch/infer.py on both folders, in its own processes and timed by itself, with
one text prompt per sequence. It runs dense models with `eager` experts.

Legend: B sequences, S prompt tokens, N new tokens.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.codec_arguments import add_codec_arguments, codec_name, compress_options
from benchmarks.harness import logger, main, positive
from benchmarks.processes import ROOT, run_watched
from benchmarks.synthetic import add_model_arguments, model_of
from benchmarks.tables import Row
from benchmarks.timing import Clock, summary
from benchmarks.ways import DENSE, MODES, against_dense, try_ways, workspace_bytes
from resmoe_dist.checkpoints.entries import STORED_DTYPES
from resmoe_dist.checkpoints.format import is_compressed
from resmoe_dist.checkpoints.restore import restore_checkpoint
from resmoe_dist.checkpoints.tensor_files import read_json, write_json
from resmoe_dist.config.commands import CompressConfig
from resmoe_dist.errors import UserError
from resmoe_dist.families.adapters import FusedExperts
from resmoe_dist.families.models import load_config, model_class
from resmoe_dist.launch.compress import compress
from resmoe_dist.runtime.layer import ResMoE
from resmoe_dist.runtime.loading import load_model
from resmoe_dist.runtime.planning import execution_for
from resmoe_dist.runtime.rank_memory import rank_memory
from resmoe_dist.testing.corpus import byte_tokenizer
from resmoe_dist.testing.synthetic_model import VOCABULARY

_TRIED_TOKENS = 2

# Prompts [B, S] and a number of new tokens -> the new tokens [B, N].
Generate = Callable[[Tensor, int], Tensor]

TABLES = (
    (
        *("rows", "way", "sequences=batch", "ms=seconds:ms", "tokens/s=tokens_per_second:.1f"),
        *("ratio:.2f", "equal=equal_tokens:.0%"),
    ),
    ("skipped", "left out=way", "because=reason", "sequences=batch"),
    ("memory", "resident=model", "experts:bytes", "workspace:bytes", "others:bytes"),
    ("launcher", "launch/infer.py, sequences=batch", "{}=tokens_per_second.*:s", "ratio:.2f"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    add_model_arguments(parser, layers=8)
    parser.set_defaults(hidden=1024, rows=3584, repeats=5, seconds=60)
    add, text = parser.add_argument, "holds the source, compressed and restored model"
    add("--work", type=Path, required=True, metavar="DIR", help=f"{text}; each is made once")
    add_codec_arguments(parser)
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="to compute in")
    add("--modes", nargs="+", choices=MODES, default=list(MODES))
    add("--batches", nargs="+", type=positive, default=[1, 16], metavar="B")
    add("--prompt-tokens", type=positive, default=1, metavar="S")
    add("--new-tokens", type=positive, default=32, metavar="N")
    add("--launcher", action="store_true", help="run launch/infer.py on both folders too")


def measure(args: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """rows: per batch size and way. memory: of each model. launcher: rows of `--launcher`."""
    compressed, restored = make_folders(args)
    dtype = STORED_DTYPES[args.dtype]
    kind = model_class(load_config(str(restored)))
    dense = kind.from_pretrained(restored, dtype=dtype, local_files_only=True)
    dense = dense.to(clock.device).eval()
    ours = {
        mode: load_model(compressed, dtype=dtype, execution=execution_for(mode))
        for mode in args.modes
    }
    ways: dict[str, Generate] = {name: partial(_generate_dense, dense, name) for name in DENSE}
    ways |= {mode: partial(generate, model) for mode, model in ours.items()}
    results: dict[str, Any] = {"rows": [], "skipped": []}
    for batch in args.batches:
        rows, skipped = measure_batch(args, clock, ways, batch)
        results["rows"] += rows
        results["skipped"] += skipped
        logger.info("%d sequences: done", batch)
    results["memory"] = [_memory(name, model) for name, model in [("dense", dense), *ours.items()]]
    # Free the memory for the launcher's processes.
    del dense, ours, ways
    batches = args.batches if args.launcher else []
    results["launcher"] = [_run_launcher(args, clock, b, compressed, restored) for b in batches]
    return results


def make_folders(args: argparse.Namespace, ep: int = 1) -> tuple[Path, Path]:
    """The compressed and the restored model, made unless they are there.

    ep: groups per layer. Raises UserError if `--work` holds another model.
    """
    compressed = make_compressed(args, ep)
    restored = compressed.with_name(f"restored-{args.dtype}")
    if not restored.exists():
        logger.info("restoring")
        restore_checkpoint(compressed, restored, STORED_DTYPES[args.dtype])
    return compressed, restored


def make_compressed(args: argparse.Namespace, ep: int = 1) -> Path:
    """The compressed model, made unless it is there. See `make_folders`."""
    name = codec_name(args) + (f"-ep{ep}" if ep > 1 else "")
    source, made = args.work / "source", args.work / name
    compressed, model = made / "compressed", model_of(args)
    model.ensure_in(source)
    # No token ends a sequence, so all have the same length.
    write_json(source / "generation_config.json", {"bos_token_id": 1, "pad_token_id": 0})
    byte_tokenizer("left").save_pretrained(source)
    if not is_compressed(compressed):
        logger.info("compressing")
        made.mkdir(exist_ok=True)
        for stale in made.glob("restored-*"):
            shutil.rmtree(stale)
        options = {"ep": ep, "resume": True} | compress_options(args)
        compress(CompressConfig(source=source, output=compressed, **options))
    config = read_json(compressed / "config.json")
    config.pop("quantization_config")
    if config != model.config():
        raise UserError(f"{compressed}: of another model; remove it or choose another folder")
    return compressed


def generate(model: PreTrainedModel, ids_BS: Tensor, new_tokens: int) -> Tensor:
    """The new tokens [B, N], greedily."""
    mask_BS = torch.ones_like(ids_BS)
    all_B = model.generate(
        input_ids=ids_BS, attention_mask=mask_BS, max_new_tokens=new_tokens, do_sample=False
    )
    return all_B[:, ids_BS.shape[1] :]


def _generate_dense(model: PreTrainedModel, name: str, ids_BS: Tensor, new_tokens: int) -> Tensor:
    """The same with transformers' implementation `name` of experts."""
    model.set_experts_implementation(name)
    return generate(model, ids_BS, new_tokens)


def measure_batch(
    args: argparse.Namespace, clock: Clock, ways: Mapping[str, Generate], batch: int
) -> tuple[list[Row], list[Row]]:
    """A row for each way that can run at one batch size, and one for each that cannot.

    Raises RuntimeError if a way generates different tokens in float32.
    """
    generator = torch.Generator().manual_seed(args.seed)
    generated: list[dict[str, Tensor]] = []

    def prompts() -> Tensor:
        shape = (batch, args.prompt_tokens)
        return torch.randint(VOCABULARY, shape, generator=generator).to(clock.device)

    calls = {name: partial(way, prompts(), _TRIED_TOKENS) for name, way in ways.items()}
    expert_bytes = 3 * args.hidden * args.rows * STORED_DTYPES[args.dtype].itemsize
    copies = batch * args.prompt_tokens * min(2, args.experts)
    tried, skipped = try_ways(calls, copies * expert_bytes, clock.effort)

    def prepare() -> dict[str, Callable[[], None]]:
        ids_BS, tokens = prompts(), dict[str, Tensor]()
        generated.append(tokens)

        def run(name: str) -> None:
            tokens[name] = ways[name](ids_BS, args.new_tokens)

        return {name: partial(run, name) for name in tried}

    seconds = clock.compare(prepare, may_drop=DENSE)
    ratios = against_dense(seconds)["ratios"]
    first, rows = next(iter(seconds)), []
    for name, found in seconds.items():
        turns = [tokens for tokens in generated if name in tokens and first in tokens]
        equal = [float((t[name] == t[first]).float().mean()) for t in turns]
        if args.dtype == "float32" and min(equal) < 1:
            raise RuntimeError(f"{batch} sequences: {name} generates different tokens in float32")
        rows.append(
            {
                "batch": batch,
                "way": name,
                "seconds": found,
                "tokens_per_second": batch * args.new_tokens / found["median"],
                "ratio": ratios[name],
                "equal_tokens": sum(equal) / len(equal),
            }
        )
    reasons = [{"batch": batch, "way": name, "reason": why} for name, why in skipped.items()]
    return rows, reasons


def _memory(name: str, model: PreTrainedModel) -> Row:
    """Bytes of a model's experts, of its other tensors, and of what experts are restored into."""
    found, modules = rank_memory(model), list(model.modules())
    fused = [module for module in modules if FusedExperts.recognises(module)]
    dense = sum(parameter.nbytes for module in fused for parameter in module.parameters())
    # All layers share one workspace.
    layers = [module for module in modules if isinstance(module, ResMoE)]
    return {
        "model": name,
        "experts": found.expert_bytes + dense,
        "others": found.other_bytes - dense,
        "workspace": max(map(workspace_bytes, layers), default=0),
    }


def _run_launcher(args: argparse.Namespace, clock: Clock, batch: int, *folders: Path) -> Row:
    """Tokens per second of launch/infer.py on the compressed and the restored folder, in turns."""
    rates: dict[str, list[float]] = {"compressed": [], "dense": []}
    with tempfile.TemporaryDirectory() as scratch:
        prompts, output = Path(scratch) / "prompts.txt", Path(scratch) / "output.json"
        prompts.write_text("\n".join(f"def answer_{i}(question):" for i in range(batch)))
        options = f"--max-new-tokens {args.new_tokens} --dtype {args.dtype}".split()
        options += ["--prompts", str(prompts), "--json", str(output)]
        options += ["--batch-size", str(batch)]

        def infer(name: str, folder: Path) -> None:
            script = [sys.executable, str(ROOT / "launch" / "infer.py"), "--model"]
            run_watched([*script, str(folder.resolve()), *options], threads=args.threads)
            (rank,) = read_json(output)["ranks"]
            rates[name].append(rank["new_tokens"] / rank["seconds"])

        work = {n: partial(infer, n, folder) for n, folder in zip(rates, folders, strict=True)}
        clock.compare(lambda: work)
    found = {name: summary(each) for name, each in rates.items()}
    ratio = found["compressed"]["median"] / found["dense"]["median"]
    return {"batch": batch, "tokens_per_second": found, "ratio": ratio}


if __name__ == "__main__":
    main(sys.modules[__name__])
