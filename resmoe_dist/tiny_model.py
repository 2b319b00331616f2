"""The embedded model: a tiny MoE language model that any machine can train in about a minute.

It reads bytes, and learns from the source of Python's own standard library, so nothing is ever
downloaded. Like Mixtral, it is *upcycled*: a dense model is trained first, its MLP becomes every
expert of an MoE model, and training goes on (Komatsuzaki et al. 2022, arXiv:2212.05055). The
experts are therefore related but different, which is what compression meets in real models.

The dense model is the family's own architecture with a single expert, so one recipe serves all.
"""

import json
import logging
import math
import os
import re
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from resmoe_dist.errors import UserError

logger = logging.getLogger(__name__)

RECIPE_VERSION = 1  # part of the cache key: raise it whenever a change alters the trained model

# A byte is its own token id; the special tokens come after the 256 bytes.
BOS_ID, EOS_ID, PAD_ID = 256, 257, 258
VOCABULARY_SIZE = 259


@dataclass(frozen=True)
class TrainingReport:
    """What training cost and what it reached. `held_out_nll` and `unigram_nll` are in nats/byte.

    Both are measured on whole files that training never saw; `unigram_nll` is that of the best
    model without context, the byte frequencies of the training files.
    """

    family: str
    seed: int
    parameters: int
    dense_steps: int
    moe_steps: int
    seconds: float
    held_out_nll: float
    unigram_nll: float
    sample: str


@dataclass(frozen=True)
class Recipe:
    """One family's architecture and how long and how fast it is trained."""

    config: dict  # of the MoE model, as the family's config class names its fields
    one_expert: dict  # what to change in `config` for the dense model
    routing_loss: bool = True  # whether transformers adds the family's load-balancing loss
    encoder_decoder: bool = False
    dense_steps: int = 300
    moe_steps: int = 240
    batch_size: int = 16  # crops per step
    crop_length: int = 256  # tokens per crop
    muon_lr: float = 0.01
    adamw_lr: float = 0.005


_COMMON = dict(
    vocab_size=VOCABULARY_SIZE,
    bos_token_id=BOS_ID,
    eos_token_id=EOS_ID,
    pad_token_id=PAD_ID,
    tie_word_embeddings=False,
)
_DECODER = _COMMON | dict(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=2048,
    initializer_range=0.05,
    rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
)

_RECIPES = {
    "mixtral": Recipe(
        config=_DECODER
        | dict(num_local_experts=8, num_experts_per_tok=2, router_aux_loss_coef=0.01),
        one_expert=dict(num_local_experts=1, num_experts_per_tok=1),
    ),
    "qwen3_moe": Recipe(
        config=_DECODER
        | dict(
            head_dim=32,
            moe_intermediate_size=128,
            num_experts=16,
            num_experts_per_tok=4,
            norm_topk_prob=True,
            router_aux_loss_coef=0.01,
        ),
        one_expert=dict(num_experts=1, num_experts_per_tok=1),
    ),
    "deepseek_v3": Recipe(
        config=_DECODER
        | dict(
            num_key_value_heads=4,
            q_lora_rank=64,
            kv_lora_rank=32,
            qk_nope_head_dim=16,
            qk_rope_head_dim=16,
            v_head_dim=32,
            moe_intermediate_size=128,
            n_routed_experts=8,
            num_experts_per_tok=2,
            n_shared_experts=1,
            n_group=1,
            topk_group=1,
            routed_scaling_factor=1.0,
            first_k_dense_replace=1,
            num_nextn_predict_layers=0,
        ),
        # Its router sums the two best scores of a group, so it needs two experts to choose one.
        one_expert=dict(n_routed_experts=2, num_experts_per_tok=1),
        routing_loss=False,
    ),
    "switch": Recipe(
        config=_COMMON
        | dict(
            decoder_start_token_id=PAD_ID,
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_heads=4,
            num_layers=2,
            num_sparse_encoder_layers=1,
            num_decoder_layers=4,
            num_sparse_decoder_layers=2,
            num_experts=4,
            expert_capacity=4096,
            dropout_rate=0.0,
            router_aux_loss_coef=0.01,
        ),
        one_expert=dict(num_experts=1),
        encoder_decoder=True,
    ),
}
_MODEL_TYPES = {"switch": "switch_transformers"}  # where transformers' name is not the family's

FAMILIES = ("mixtral", "deepseek_v3", "qwen3_moe", "switch")


def train_tiny_model(
    directory: str | os.PathLike,
    family: str = "mixtral",
    seed: int = 0,
    *,
    dense_steps: int | None = None,
    moe_steps: int | None = None,
    progress: bool = True,
) -> TrainingReport:
    """Train a tiny MoE model and write it to `directory` as a Hugging Face model folder.

    Beside the usual files there is `training.json`, the report. The folder appears whole or not
    at all: it is written under a temporary name next to its own and renamed. `dense_steps` and
    `moe_steps` default to the family's recipe. The same seed gives the same model on the same
    machine; the caller's random state is left as it was.

    Raises UserError if the family is unknown, if `directory` exists and is not empty, or if
    this Python came without the source of its standard library.
    """
    if family not in FAMILIES:
        raise UserError(f"unknown family {family!r}: choose one of {', '.join(FAMILIES)}")
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} exists and is not empty: choose another directory")

    recipe = _RECIPES[family]
    dense_steps = recipe.dense_steps if dense_steps is None else dense_steps
    moe_steps = recipe.moe_steps if moe_steps is None else moe_steps
    started = time.perf_counter()
    train_bytes, held_out_bytes = read_corpus()
    show_progress = progress and sys.stderr.isatty()
    with torch.random.fork_rng(), tqdm(
        total=dense_steps + moe_steps, desc=family, unit="step", disable=not show_progress
    ) as bar:
        torch.manual_seed(seed)
        model = _build_model(family, recipe.config | recipe.one_expert)
        schedule = _LearningRate(total_steps=dense_steps + moe_steps, moe_start=dense_steps)
        _train(model, recipe, train_bytes, range(dense_steps), schedule, bar)
        model = upcycle(model, _build_model(family, recipe.config))
        _train(model, recipe, train_bytes, range(dense_steps, bar.total), schedule, bar)

        tokenizer = byte_tokenizer(padding_side="right" if recipe.encoder_decoder else "left")
        report = TrainingReport(
            family=family,
            seed=seed,
            parameters=model.num_parameters(),
            dense_steps=dense_steps,
            moe_steps=moe_steps,
            seconds=round(time.perf_counter() - started, 1),
            held_out_nll=mean_nll(model, held_out_bytes),
            unigram_nll=unigram_nll(train_bytes, held_out_bytes),
            sample=_sample(model, tokenizer, "def "),
        )
    logger.info("trained %s: %.3f nats/byte on held-out files", family, report.held_out_nll)
    _save(directory, model, tokenizer, report)
    return report


def cache_root() -> Path:
    """The folder of this user's cached models."""
    if root := os.environ.get("RESMOE_CACHE"):
        return Path(root)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "resmoe-dist"


def cached_tiny_model(family: str = "mixtral", seed: int = 0) -> Path:
    """The folder of the family's tiny model in the user's cache, trained there on first use.

    Processes may call this at the same time: each trains, the first to finish is kept.
    """
    directory = cache_root() / f"tiny-{family}-seed{seed}-v{RECIPE_VERSION}"
    if not (directory / "training.json").exists():
        logger.info("training the %s model once into %s", family, directory)
        try:
            train_tiny_model(directory, family, seed)
        except UserError:
            # Another process may have finished first; anything else is a real error.
            if not (directory / "training.json").exists():
                raise
    return directory


# Left out of the corpus: tests, tables of numbers, and packages that are not everywhere.
_SKIPPED_FOLDERS = frozenset(
    "__pycache__ encodings idle_test lib2to3 pydoc_data site-packages dist-packages "
    "test tests turtledemo tkinter idlelib ensurepip".split()
)
_HELD_OUT_EVERY = 20  # one file in so many is held out


def read_corpus() -> tuple[Tensor, Tensor]:
    """The standard library's source as token ids: (training files, held-out files), each [bytes].

    A file's bytes are followed by EOS_ID. Raises UserError where Python has no .py source.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)
    ]
    if len(files) < _HELD_OUT_EVERY:
        raise UserError(f"no Python source in {root}: use a Python that has its .py files")

    def tokens(paths: list[Path]) -> Tensor:
        parts = []
        for path in paths:
            parts += [torch.frombuffer(bytearray(path.read_bytes() + b"\n"), dtype=torch.uint8)]
            parts += [torch.tensor([EOS_ID])]
        return torch.cat(parts)

    held_out = files[_HELD_OUT_EVERY // 2 :: _HELD_OUT_EVERY]
    return tokens([path for path in files if path not in set(held_out)]), tokens(held_out)


def byte_tokenizer(padding_side: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose ids are the bytes of the text's UTF-8, after one BOS_ID."""
    symbols = _byte_symbols()
    backend = Tokenizer(models.BPE(vocab={symbols[byte]: byte for byte in range(256)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<pad>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side=padding_side,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,  # "</s>" in a text is four characters of it
        model_input_names=["input_ids", "attention_mask"],
    )


def _byte_symbols() -> list[str]:
    """The printable character by which a byte-level tokenizer writes each byte (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    table |= {byte: chr(256 + place) for place, byte in enumerate(others)}
    return [table[byte] for byte in range(256)]


def _build_model(family: str, config: dict) -> PreTrainedModel:
    """A freshly initialised float32 model of the family."""
    config = AutoConfig.for_model(_MODEL_TYPES.get(family, family), **config)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return auto.from_config(config, dtype=torch.float32)


_ROUTER = re.compile(r"(gate\.weight|gate\.e_score_correction_bias|classifier\.weight)$")


@torch.no_grad()
def upcycle(dense: PreTrainedModel, moe: PreTrainedModel) -> PreTrainedModel:
    """Copy `dense` into `moe`, its first expert into every expert; the routers stay fresh."""
    source = dense.state_dict()
    for name, target in moe.state_dict().items():
        if _ROUTER.search(name):
            continue
        value = source[re.sub(r"experts\.expert_\d+", "experts.expert_0", name)]
        fused = name.endswith((".experts.gate_up_proj", ".experts.down_proj"))
        target.copy_(value[:1] if fused else value)
    return moe


def _train(
    model: PreTrainedModel, recipe: Recipe, corpus: Tensor, steps: range, schedule, bar: tqdm
) -> None:
    """Train for `steps`, a part of the whole run; `schedule(step)` scales the learning rates."""
    optimizers = _optimizers(model, recipe)
    balance_hooks = [
        module.register_forward_hook(_nudge_selection_bias)
        for module in model.modules()
        if hasattr(module, "e_score_correction_bias") and module.num_experts > 2
    ]
    is_moe = model.config.num_experts_per_tok > 1
    model.train()
    for step in steps:
        inputs = _model_inputs(_random_crops(corpus, recipe), recipe, _random_split(recipe))
        loss = model(**inputs, output_router_logits=recipe.routing_loss and is_moe).loss
        loss.backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * schedule(step)
            optimizer.step()
            optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        bar.update()
    for hook in balance_hooks:
        hook.remove()
    model.eval()
