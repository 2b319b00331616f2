"""Whole-model decoding: the compressed model beside its restored dense twin in plain transformers.

A Mixtral of random weights is compressed by the real pipeline, and that restored by the real
`restore`; both stay in --work for later runs. Each way then generates greedily from the same random
prompts, in turns: the dense model in each of transformers' implementations of experts (they share
one set of weights; one that is four times as slow as another for the first tokens is left out), the
compressed one in each mode of execution. Prompts are one token long, so
that nearly all is decoding; nothing ends a sequence early.

tokens/s   new tokens of all sequences / seconds of `generate`, median
ratio      to the fastest dense way
equal      share of new tokens that are those of the first dense way. In float32 all must be, or
           nothing is reported; in bfloat16 one different rounding may change all that follows

With --launcher, launch/infer.py too is run on both folders, in processes of its own and by its own
clock, with one prompt of text per sequence; it runs dense models eagerly.

Legend: B sequences, S prompt tokens, N new tokens.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import speed
from benchmarks.machine import summary
from benchmarks.process import ROOT, run_watched
from benchmarks.synthetic import VOCABULARY, add_model_arguments, model_of
from resmoe_dist.checkpoints.format import (
    STORED_DTYPES,
    CompressionSettings,
    MethodSpec,
    is_compressed,
)
from resmoe_dist.checkpoints.restore import restore_checkpoint
from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.checkpoints.tensor_files import read_json, write_json
from resmoe_dist.codecs import CodecSpec
from resmoe_dist.errors import UserError, first_line
from resmoe_dist.evaluation.tables import human_bytes, text_table
from resmoe_dist.families.models import load_config, model_class
from resmoe_dist.families.sites import FusedExperts
from resmoe_dist.jobs.pipeline import Compression
from resmoe_dist.runtime import execution
from resmoe_dist.runtime.layer import ResMoE
from resmoe_dist.runtime.loading import load_model
from resmoe_dist.runtime.planning import execution_for
from resmoe_dist.runtime.rank_memory import rank_memory
from resmoe_dist.testing.corpus import byte_tokenizer

DENSE = ("eager", "batched_mm", "grouped_mm")
MODES = tuple(mode for mode in execution.MODES if mode != "cached")
# `batched_mm` copies an expert for every copy of a token; where that is more, it is left out.
_GATHERED_BYTES = 2 << 30
_TRIED_TOKENS = 2
_PROMPT = "def answer_{}(question):"

# By name, as it is run as `__main__`.
logger = logging.getLogger("benchmarks.decode")

# From prompts, and how many tokens to add, to these.
Generate = Callable[[Tensor, int], Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    add_model_arguments(parser, layers=8)
    parser.set_defaults(hidden=1024, rows=3584)
    add = parser.add_argument
    add(
        "--work",
        type=Path,
        required=True,
        metavar="DIR",
        help="holds the source, the compressed and the restored model; each is made once",
    )
    add("--keep", type=speed.share, default=0.25)
    add("--codec", choices=("pruned", "low_rank"), default="pruned")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="to compute in")
    add("--modes", nargs="+", choices=MODES, default=list(MODES))
    add("--batches", nargs="+", type=speed.positive, default=[1, 16], metavar="B")
    add("--prompt-tokens", type=speed.positive, default=1, metavar="S")
    add("--new-tokens", type=speed.positive, default=32, metavar="N")
    add("--repeats", type=speed.positive, default=5)
    add("--seconds", type=float, default=60, help="no more repeats of a batch after so long, but 3")
    add("--launcher", action="store_true", help="run launch/infer.py on both folders too")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Per batch size the speed of all ways, and what each holds in memory."""
    compressed, restored = _folders(args)
    dtype, device = STORED_DTYPES[args.dtype], torch.device(args.device)
    kind = model_class(load_config(str(restored)))
    dense = kind.from_pretrained(restored, dtype=dtype, local_files_only=True).to(device).eval()
    ours = {
        mode: load_model(compressed, dtype=dtype, execution=execution_for(mode))
        for mode in args.modes
    }
    ways: dict[str, Generate] = {name: partial(_generate_dense, dense, name) for name in DENSE}
    ways |= {mode: partial(_generate, model) for mode, model in ours.items()}
    turns = speed.Turns(device, args.seed)
    results: dict[str, Any] = {"rows": [_batch(args, turns, ways, batch) for batch in args.batches]}
    results["memory"] = {"dense": _dense_memory(dense)} | {
        mode: _memory(model) for mode, model in ours.items()
    }
    # The launcher's processes have the memory to themselves.
    del dense, ours, ways
    results["launcher"] = _launched(args, compressed, restored) if args.launcher else []
    return results


def _folders(args: argparse.Namespace) -> tuple[Path, Path]:
    """The compressed and the restored model, made where they are not there yet."""
    source, made = args.work / "source", args.work / f"{args.codec}-{args.keep:g}"
    compressed, restored = made / "compressed", made / f"restored-{args.dtype}"
    model = model_of(args)
    if not model.is_in(source):
        logger.info("writing the synthetic checkpoint")
        model.write(source)
    # Without a token that ends a sequence, so that all are as long.
    write_json(source / "generation_config.json", {"bos_token_id": 1, "pad_token_id": 0})
    byte_tokenizer("left").save_pretrained(source)
    if not is_compressed(compressed):
        logger.info("compressing")
        made.mkdir(exist_ok=True)
        settings = CompressionSettings(
            groups=1,
            method=MethodSpec(name="resmoe"),
            residual_codec=CodecSpec(name=args.codec, options={"keep": args.keep}),
            layers=list(range(args.layers)),
        )
        for stale in made.glob("restored-*"):
            shutil.rmtree(stale)
        Compression(SourceCheckpoint(source), compressed, settings).run(resume=True)
    config = read_json(compressed / "config.json")
    config.pop("quantization_config")
    if config != model.config():
        raise UserError(f"{compressed}: of another model; remove it or choose another folder")
    if not restored.exists():
        logger.info("restoring")
        restore_checkpoint(compressed, restored, STORED_DTYPES[args.dtype])
    return compressed, restored


def _generate(model: PreTrainedModel, ids_BS: Tensor, new_tokens: int) -> Tensor:
    """The new tokens [B, N], greedily."""
    mask_BS = torch.ones_like(ids_BS)
    all_B = model.generate(
        input_ids=ids_BS, attention_mask=mask_BS, max_new_tokens=new_tokens, do_sample=False
    )
    return all_B[:, ids_BS.shape[1] :]


def _generate_dense(model: PreTrainedModel, name: str, ids_BS: Tensor, new_tokens: int) -> Tensor:
    """The same in transformers' implementation `name` of experts."""
    model.set_experts_implementation(name)
    return _generate(model, ids_BS, new_tokens)


def _batch(
    args: argparse.Namespace, turns: speed.Turns, ways: dict[str, Generate], batch: int
) -> dict[str, Any]:
    """All ways at one batch size: those that make sense take turns."""
    generator = torch.Generator().manual_seed(args.seed)

    def prompts() -> Tensor:
        shape = (batch, args.prompt_tokens)
        return torch.randint(VOCABULARY, shape, generator=generator).to(turns.device)

    skipped = _left_out(args, turns, ways, prompts())
    running = {name: generate for name, generate in ways.items() if name not in skipped}
    taken: dict[str, list[float]] = {name: [] for name in running}
    equal: dict[str, list[float]] = {name: [] for name in running}
    first = next(iter(running))
    for _ in speed.repetitions(args.repeats, args.seconds):
        ids_BS, tokens = prompts(), {}

        def generate(name: str, ids_BS: Tensor = ids_BS, tokens: dict = tokens) -> None:
            tokens[name] = running[name](ids_BS, args.new_tokens)

        turn = turns.seconds({name: partial(generate, name) for name in running})
        for name, found_BN in tokens.items():
            taken[name].append(turn[name])
            equal[name].append(float((found_BN == tokens[first]).float().mean()))
            if args.dtype == "float32" and equal[name][-1] < 1:
                raise RuntimeError(f"{batch} sequences: {name} generates other tokens in float32")
    logger.info("%d sequences: done", batch)
    seconds = {name: summary(all_) for name, all_ in taken.items()}
    fastest = min(
        (name for name in DENSE if name in seconds), key=lambda name: seconds[name]["median"]
    )
    return {
        "batch": batch,
        "new_tokens": batch * args.new_tokens,
        "fastest_dense": fastest,
        "seconds": seconds,
        "tokens_per_second": {
            name: batch * args.new_tokens / found["median"] for name, found in seconds.items()
        },
        "ratios": {
            name: seconds[fastest]["median"] / found["median"] for name, found in seconds.items()
        },
        "equal_tokens": {name: sum(all_) / len(all_) for name, all_ in equal.items()},
        "skipped": skipped,
    }


def _left_out(
    args: argparse.Namespace, turns: speed.Turns, ways: dict[str, Generate], ids_BS: Tensor
) -> dict[str, str]:
    """Which of the dense ways, and why. Also what a first call of the others costs is paid."""
    skipped = {}
    expert_bytes = 3 * args.hidden * args.rows * STORED_DTYPES[args.dtype].itemsize
    gathered = ids_BS.numel() * min(2, args.experts) * expert_bytes
    for name, generate in ways.items():
        if name == "batched_mm" and gathered > _GATHERED_BYTES:
            skipped[name] = f"would copy {human_bytes(gathered)} of weights"
            continue
        try:
            generate(ids_BS, _TRIED_TOKENS)
        except RuntimeError as error:
            if name not in DENSE:
                raise
            skipped[name] = first_line(error)
    turn = turns.seconds(
        {name: partial(ways[name], ids_BS, _TRIED_TOKENS) for name in DENSE if name not in skipped}
    )
    for name in speed.hopeless(turn, DENSE):
        slower = turn[name] / min(turn.values())
        skipped[name] = f"takes {slower:.0f} times as long as the fastest of them"
    return skipped


def _dense_memory(model: PreTrainedModel) -> dict[str, int]:
    """Bytes of a dense model's tensors."""
    experts = sum(
        parameter.nbytes
        for module in model.modules()
        if FusedExperts.recognises(module)
        for parameter in module.parameters()
    )
    return {
        "experts": experts,
        "others": rank_memory(model).other_bytes - experts,
        "workspace": 0,
    }


def _memory(model: PreTrainedModel) -> dict[str, int]:
    """The same of a compressed one, and of the buffer that its layers restore into."""
    found = rank_memory(model)
    layer = next(module for module in model.modules() if isinstance(module, ResMoE))
    return {
        "experts": found.expert_bytes,
        "others": found.other_bytes,
        "workspace": layer.experts.execution.workspace.nbytes,
    }


def _launched(args: argparse.Namespace, compressed: Path, restored: Path) -> list[dict[str, Any]]:
    """What launch/infer.py says of its speed on both folders, in turns."""
    rows = []
    folders = {"dense": restored, "compressed": compressed}
    with tempfile.TemporaryDirectory() as scratch:
        for batch in args.batches:
            rates: dict[str, list[float]] = {name: [] for name in folders}
            for repeat in range(args.repeats):
                for name in list(folders)[:: 1 if repeat % 2 == 0 else -1]:
                    rates[name].append(_infer(args, folders[name], batch, Path(scratch)))
            found = {name: summary(all_) for name, all_ in rates.items()}
            ratio = found["compressed"]["median"] / found["dense"]["median"]
            rows.append({"batch": batch, "tokens_per_second": found, "ratio": ratio})
            logger.info("launch/infer.py, %d sequences: done", batch)
    return rows


def _infer(args: argparse.Namespace, folder: Path, batch: int, scratch: Path) -> float:
    """Tokens per second of one run of launch/infer.py."""
    prompts, output = scratch / "prompts.txt", scratch / "output.json"
    prompts.write_text("\n".join(_PROMPT.format(i) for i in range(batch)))
    command = [
        *(sys.executable, str(ROOT / "launch" / "infer.py"), "--model", str(folder.resolve())),
        *("--prompts", str(prompts), "--max-new-tokens", str(args.new_tokens)),
        *("--dtype", args.dtype, "--json", str(output)),
    ]
    run_watched(command, threads=args.threads)
    (rank,) = read_json(output)["ranks"]
    return rank["new_tokens"] / rank["seconds"]


def table(results: dict[str, Any]) -> str:
    """The results of `measure` as text."""
    header = ["sequences", "way", "ms", "tokens/s", "ratio", "equal"]
    lines = [
        [
            *(str(row["batch"]), name, speed.milliseconds(row["seconds"][name])),
            *(f"{row['tokens_per_second'][name]:.1f}", f"{row['ratios'][name]:.2f}"),
            f"{row['equal_tokens'][name]:.0%}",
        ]
        for row in results["rows"]
        for name in row["seconds"]
    ]
    parts = [text_table(header, lines, left=2)]
    parts += [
        f"{name} left out at {row['batch']} sequences: {reason}"
        for row in results["rows"]
        for name, reason in row["skipped"].items()
    ]
    held = [
        [name, *(human_bytes(found[kind]) for kind in ("experts", "workspace", "others"))]
        for name, found in results["memory"].items()
    ]
    parts.append(text_table(["resident", "experts", "workspace", "others"], held))
    if results["launcher"]:
        kinds = ("dense", "compressed")
        lines = [
            [
                str(row["batch"]),
                *(_rate(row["tokens_per_second"][kind]) for kind in kinds),
                f"{row['ratio']:.2f}",
            ]
            for row in results["launcher"]
        ]
        header = ["launch/infer.py, sequences", *(f"{kind} tokens/s" for kind in kinds), "ratio"]
        parts.append(text_table(header, lines))
    return "\n\n".join(parts)


def _rate(found: dict[str, Any]) -> str:
    text = f"{found['median']:.1f}"
    spread = f" ({found['least']:.1f}-{found['most']:.1f})"
    return text if len(found["all"]) == 1 else text + spread


if __name__ == "__main__":
    speed.main(sys.modules[__name__])
