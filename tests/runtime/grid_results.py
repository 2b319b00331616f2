"""What a grid computes with small models of every family, and what it must compute.

One launch of ranks for each (world, ep, tp), because DeepSpeed keeps one grid per process. In it,
all numbers of lanes, forms of dispatch, families and codecs take their turns.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel

from resmoe_dist.checkpoints.restore import restore_checkpoint
from resmoe_dist.evaluation.perplexity import evaluate, load_tokenizer
from resmoe_dist.parallel.dispatch import dispatcher_for
from resmoe_dist.parallel.topology import Topology, build_topology
from resmoe_dist.runtime.generation import GenerationOptions, generate_on_lane
from resmoe_dist.runtime.layer import ResMoE
from resmoe_dist.runtime.loading import load_model
from resmoe_dist.runtime.rank_memory import RankMemory, rank_memory
from tests.models import FAMILIES, compress, dense_model, logits_of, save_family
from tests.runtime.test_generation import save_tokenizer

# Enough for one per rank of the largest grid.
EXPERTS = 8
_NAMES_OF_EXPERTS = {
    "mixtral": "num_local_experts",
    "deepseek_v3": "n_routed_experts",
    "gpt_oss": "num_local_experts",
}
# Their greedy tokens are compared too.
GENERATING = ("mixtral", "deepseek_v3", "qwen3_moe", "switch")
# Residual codec and groups: fewer groups than ranks, one expert per group, and in between.
STORAGE = (("pruned", 2), ("pruned", 8), ("low_rank", 4), ("quantized", 2))
# Fewer than the largest number of lanes, of unequal lengths.
PROMPTS = ["ABC", "HELLO", "Q", "GRID", "LANES"]
NEW_TOKENS = 6
EMBEDDED_PROMPTS = ["def __init__(self", "import os\n", "class Error"]
EMBEDDED_TOKENS = 24


@dataclass(frozen=True)
class Expected:
    """What the restored model computes in transformers alone. texts: greedy, of each prompt."""

    logits: torch.Tensor
    texts: list[str]


@dataclass(frozen=True)
class EmbeddedResults:
    """What one rank found with the embedded model. short: completions that end at a space."""

    memory: RankMemory
    perplexity: float
    whole: dict[int, str]
    short: dict[int, str]


@dataclass
class RankResults:
    """What one rank found. Keys: the lanes, the form of dispatch, a folder.

    texts: completions by the prompt's number.
    """

    logits: dict[tuple[int, str, str], torch.Tensor] = field(default_factory=dict)
    texts: dict[tuple[int, str, str], dict[int, str]] = field(default_factory=dict)
    embedded: EmbeddedResults | None = None


def make_models(folder: Path) -> dict[str, Expected]:
    """Compress every family in every way, and restore it; what is expected, by folder name."""
    expected = {}
    for name, family in FAMILIES.items():
        experts = {_NAMES_OF_EXPERTS.get(name, "num_experts"): EXPERTS}
        save_family(family, folder / "source" / name, **experts)
        for codec, groups in STORAGE:
            key = f"{name}-{codec}-{groups}"
            compress(folder / "source" / name, folder / key, groups=groups, codec=codec)
            save_tokenizer(folder / key)
            restore_checkpoint(folder / key, folder / "restored" / key)
            dense = dense_model(folder / "restored" / key)
            texts = greedy_texts(dense, PROMPTS, NEW_TOKENS) if name in GENERATING else []
            expected[key] = Expected(logits_of(dense), texts)
    return expected


def greedy_texts(
    model: PreTrainedModel, prompts: list[str], new_tokens: int, **options: int
) -> list[str]:
    """Completions by transformers alone, one prompt at a time."""
    tokenizer = load_tokenizer(Path(model.name_or_path))
    texts = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        start = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        output_S = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=new_tokens,
            do_sample=False,
            **options,
        )[0]
        texts.append(tokenizer.decode(output_S[start:], skip_special_tokens=True))
    return texts


def run_grid(
    ep: int,
    tp: int,
    lanes: list[int],
    turn: int,
    folder: Path,
    embedded: Path,
    sequences: list[list[int]],
) -> RankResults:
    """Serve all families on this rank, with each number of lanes and each form of dispatch.

    turn: at which way of storage to begin; the families and numbers of lanes take them in turn. And
    with which number of lanes to serve the embedded model.
    """
    results = RankResults()
    for position, count in enumerate(lanes):
        topology = build_topology(ep, tp, count)
        for number, name in enumerate(FAMILIES):
            codec, groups = STORAGE[(turn + number + position) % len(STORAGE)]
            key = f"{name}-{codec}-{groups}"
            _run_model(results, topology, folder / key, name in GENERATING)
        if position == turn % len(lanes):
            results.embedded = _run_embedded(topology, embedded, sequences)
    return results


def forms_of(replica_lanes: int) -> tuple[str, str]:
    """The forms of dispatch for a number of lanes in each replica."""
    return ("exchange", "decode" if replica_lanes > 1 else "shared_batch")


def _run_model(results: RankResults, topology: Topology, folder: Path, generates: bool) -> None:
    # `auto` would measure the forms first, for each model; it does for the embedded one.
    model = load_model(folder, topology=topology, dispatch="exchange")
    tokenizer, options = load_tokenizer(folder), GenerationOptions(NEW_TOKENS)
    for form in forms_of(topology.replica_lanes):
        for module in model.modules():
            if isinstance(module, ResMoE):
                moe = module.deepspeed_moe
                moe.dispatcher = dispatcher_for(moe.dispatcher.num_experts, topology, form)
        key = (topology.lanes, form, folder.name)
        results.logits[key] = logits_of(model)
        if generates:
            output = generate_on_lane(model, tokenizer, PROMPTS, topology, options)
            results.texts[key] = output.completions


def _run_embedded(topology: Topology, folder: Path, sequences: list[list[int]]) -> EmbeddedResults:
    model, tokenizer = load_model(folder, topology=topology), load_tokenizer(folder)
    options = GenerationOptions(EMBEDDED_TOKENS)
    perplexity = evaluate(model, sequences, topology).perplexity
    whole = generate_on_lane(model, tokenizer, EMBEDDED_PROMPTS, topology, options)
    # Lanes then finish at different steps.
    model.generation_config.eos_token_id = tokenizer(" ")["input_ids"][-1]
    short = generate_on_lane(model, tokenizer, EMBEDDED_PROMPTS, topology, options)
    return EmbeddedResults(rank_memory(model), perplexity, whole.completions, short.completions)
