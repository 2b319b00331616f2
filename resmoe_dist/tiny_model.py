"""The embedded model: a tiny MoE language model that any machine can train in about a minute.

It reads bytes, and learns from the source of Python's own standard library, so nothing is ever
downloaded. Like Mixtral, it is *upcycled*: a dense model is trained first, its MLP becomes every
expert of an MoE model, and training goes on (Komatsuzaki et al. 2022, arXiv:2212.05055). The
experts are therefore related but different, which is what compression meets in real models.

The dense model is the family's own architecture with a single expert, so one recipe serves all.
"""

import contextlib
import json
import logging
import math
import os
import re
import shutil
import sysconfig
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.utils import ModelOutput

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
    top_k: int = 1  # experts per token, as in `config`
    balance: float = 0.02  # weight of the load-balancing loss; 0 where a selection bias balances
    encoder_decoder: bool = False
    dense_steps: int = 270
    moe_steps: int = 130
    batch_size: int = 8  # crops per step
    crop_length: int = 256  # tokens per crop
    muon_lr: float = 0.005
    adamw_lr: float = 0.01


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
        config=_DECODER | dict(num_local_experts=8, num_experts_per_tok=2),
        one_expert=dict(num_local_experts=1, num_experts_per_tok=1),
        top_k=2,
    ),
    "qwen3_moe": Recipe(
        config=_DECODER
        | dict(
            head_dim=32,
            moe_intermediate_size=128,
            num_experts=16,
            num_experts_per_tok=4,
            norm_topk_prob=True,
        ),
        one_expert=dict(num_experts=1, num_experts_per_tok=1),
        top_k=4,
        dense_steps=230,
        moe_steps=100,
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
        top_k=2,
        balance=0.0,
        dense_steps=250,
        moe_steps=110,
    ),
    "switch": Recipe(
        config=_COMMON
        | dict(
            decoder_start_token_id=PAD_ID,
            tie_word_embeddings=True,  # transformers initialises an untied head far too large
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_heads=4,
            num_layers=4,  # as many as the decoder's, whose cache transformers sizes by it
            num_sparse_encoder_layers=2,
            num_decoder_layers=4,
            num_sparse_decoder_layers=2,
            num_experts=4,
            expert_capacity=4096,
            dropout_rate=0.0,
        ),
        one_expert=dict(num_experts=1),
        encoder_decoder=True,
        dense_steps=190,
        moe_steps=130,
        balance=0.05,
        muon_lr=0.0025,  # T5's attention does not scale its scores, so its queries start tiny
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
    train_tokens, held_out_tokens = read_corpus()
    quiet = None if progress else True  # tqdm's None: quiet unless stderr is a terminal
    with (
        _whole_or_nothing(directory) as partial,
        torch.random.fork_rng(devices=[]),
        tqdm(total=dense_steps + moe_steps, desc=family, unit="step", disable=quiet) as bar,
    ):
        torch.default_generator.manual_seed(seed)
        model = _build_model(family, recipe.config | recipe.one_expert)
        _choose_first_expert(model)
        _train(model, recipe, train_tokens, _learning_rates(dense_steps, decay=False), bar)
        model = upcycle(model, _build_model(family, recipe.config))
        _balance_by_bias(model)
        _train(model, recipe, train_tokens, _learning_rates(moe_steps, decay=True), bar)

        tokenizer = byte_tokenizer(padding_side="right" if recipe.encoder_decoder else "left")
        report = TrainingReport(
            family=family,
            seed=seed,
            parameters=model.num_parameters(),
            dense_steps=dense_steps,
            moe_steps=moe_steps,
            held_out_nll=mean_nll(model, recipe, held_out_tokens),
            unigram_nll=unigram_nll(train_tokens, held_out_tokens),
            sample=_sample(model, tokenizer, "class "),
            seconds=time.perf_counter() - started,
        )
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / "training.json").write_text(json.dumps(asdict(report), indent=2) + "\n")
    logger.info("trained %s: %.3f nats/byte on held-out files", family, report.held_out_nll)
    return report


@contextlib.contextmanager
def _whole_or_nothing(directory: Path) -> Iterator[Path]:
    """A folder to write to that becomes `directory` at the end, or vanishes on an error."""
    partial = directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write to {directory.parent}: {error.strerror}") from error
    try:
        yield partial
        try:
            partial.rename(directory)  # over an empty folder at most
        except OSError as error:
            raise UserError(f"{directory} was filled meanwhile: choose another one") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
    [
        "__pycache__",
        "encodings",
        "idle_test",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "turtledemo",
        "tkinter",
        "idlelib",
        "ensurepip",
    ]
)
_HELD_OUT_EVERY = 20  # one file in so many is held out


def read_corpus() -> tuple[Tensor, Tensor]:
    """The standard library's source as token ids: (training files, held-out files), each [tokens].

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
    vocabulary = {symbol: byte for byte, symbol in bytes_to_unicode().items()}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
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


def _build_model(family: str, config: dict) -> PreTrainedModel:
    """A freshly initialised float32 model of the family."""
    config = AutoConfig.for_model(_MODEL_TYPES.get(family, family), **config)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return auto.from_config(config, dtype=torch.float32)


@torch.no_grad()
def upcycle(dense: PreTrainedModel, moe: PreTrainedModel) -> PreTrainedModel:
    """Copy `dense` into `moe`, its first expert into every expert; the routers begin afresh."""
    source = dense.state_dict()
    for name, target in moe.state_dict().items():
        if name.endswith("gate.e_score_correction_bias"):
            continue
        if name.endswith(("gate.weight", "classifier.weight")):
            target.normal_(std=0.02)  # small, so that every expert gets its share of tokens
            continue
        value = source[re.sub(r"experts\.expert_\d+", "experts.expert_0", name)]
        fused = name.endswith((".experts.gate_up_proj", ".experts.down_proj"))
        target.copy_(value[:1] if fused else value)
    return moe


def _choose_first_expert(dense: PreTrainedModel) -> None:
    """Let routers with a selection bias (DeepSeek's) choose no expert but the first."""
    for module in dense.modules():
        if hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias[1:] = float("-inf")


def _balance_by_bias(moe: PreTrainedModel, rate: float = 0.005) -> None:
    """Balance routers with a selection bias during training (arXiv:2408.15664, algorithm 1)."""

    def nudge(router: nn.Module, _inputs: tuple, outputs: tuple) -> None:
        if router.training:
            load = torch.bincount(outputs[2].flatten(), minlength=router.num_experts).float()
            router.e_score_correction_bias += rate * torch.sign(load.mean() - load)

    for module in moe.modules():
        if hasattr(module, "e_score_correction_bias"):
            module.register_forward_hook(nudge)


def _train(
    model: PreTrainedModel, recipe: Recipe, corpus: Tensor, learning_rates: list[float], bar: tqdm
) -> None:
    """Train one step per entry of `learning_rates`, which are factors of the recipe's."""
    optimizers = _optimizers(model, recipe)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    model.train()
    for factor in learning_rates:
        starts = torch.randint(len(corpus) - recipe.crop_length, (recipe.batch_size,))
        context_length = int(torch.randint(recipe.crop_length // 8, recipe.crop_length // 2, ()))
        inputs = _model_inputs(recipe, corpus, starts, context_length)
        outputs = model(**inputs, output_router_logits=recipe.balance > 0)
        loss = outputs.loss
        if recipe.balance > 0:
            loss = loss + recipe.balance * imbalance(outputs, recipe.top_k)
        loss.backward()
        for optimizer, optimizer_peaks in zip(optimizers, peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, optimizer_peaks, strict=True):
                group["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        bar.update()
    model.eval()


def imbalance(outputs: ModelOutput, top_k: int) -> Tensor:
    """The load-balancing loss of Switch (arXiv:2101.03961, eq. 4), a mean over layers; least 1.

    Transformers' own pools the layers first, so a layer may starve experts that others feed.
    """
    if "router_logits" in outputs:
        layers = outputs.router_logits
    else:
        layers = (*outputs.encoder_router_logits, *outputs.decoder_router_logits)
    losses = []
    for logits in layers:
        probabilities = logits.flatten(0, -2).softmax(-1)  # [T, E]
        experts = probabilities.shape[-1]
        chosen = probabilities.topk(min(top_k, experts)).indices.flatten()
        shares = torch.bincount(chosen, minlength=experts) / len(chosen)
        losses.append(experts * (shares * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()


def _learning_rates(steps: int, decay: bool, warmup: int = 20) -> list[float]:
    """A factor in (0, 1] per step: linear warm-up, then constant or linear decay."""
    return [
        min(1.0, (step + 1) / warmup) * ((steps - step) / steps if decay else 1.0)
        for step in range(steps)
    ]


def _model_inputs(recipe: Recipe, corpus: Tensor, starts: Tensor, context_length: int) -> dict:
    """The crops of `corpus` at `starts` as one batch, each after a BOS_ID.

    An encoder reads the first `context_length` bytes and its decoder continues; a decoder-only
    model predicts every byte (transformers shifts the labels by itself).
    """
    crops = corpus[starts[:, None] + torch.arange(recipe.crop_length)].long()
    bos = torch.full((len(starts), 1), BOS_ID)
    if recipe.encoder_decoder:
        context = torch.cat([bos, crops[:, :context_length]], dim=1)
        return dict(input_ids=context, labels=crops[:, context_length:].contiguous())
    tokens = torch.cat([bos, crops], dim=1)
    return dict(input_ids=tokens, labels=tokens, use_cache=False)


# Vectors, tables looked up by row, and routers are no maps between hidden spaces: AdamW's.
_FOR_ADAMW = re.compile(
    r"(embed_tokens|shared|lm_head|relative_attention_bias|gate|classifier)\.weight$"
)


def _optimizers(model: PreTrainedModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    hidden, others = [], []
    for name, parameter in model.named_parameters():
        is_hidden = parameter.ndim > 1 and not _FOR_ADAMW.search(name)
        (hidden if is_hidden else others).append(parameter)
    return [
        Muon(hidden, lr=recipe.muon_lr),
        torch.optim.AdamW(others, lr=recipe.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz (Jordan et al. 2024), for matrices and stacks.

    torch.optim.Muon takes matrices only; transformers keeps experts stacked, [E, out, in], and
    here each matrix of a stack is orthogonalised on its own. An update's root mean square is
    about 0.2·lr whatever the shape (arXiv:2502.16982), so learning rates are as for AdamW.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(parameters, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                average = self.state[parameter].setdefault("average", parameter.grad.clone())
                average.lerp_(parameter.grad, 1 - group["momentum"])
                direction = orthogonalize(parameter.grad.lerp(average, group["momentum"]))
                scale = 0.2 * math.sqrt(max(parameter.shape[-2:]))
                parameter.sub_(direction, alpha=group["lr"] * scale)


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly: singular values end up within [0.7, 1.2].

    `matrices`: [..., out, in]. The quintic Newton-Schulz iteration of Muon.
    """
    transposed = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if transposed else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x.mT if transposed else x


@torch.no_grad()
def mean_nll(model: PreTrainedModel, recipe: Recipe, corpus: Tensor, crops: int = 64) -> float:
    """The model's loss on evenly spaced crops of `corpus`, in nats per byte."""
    starts = torch.linspace(0, len(corpus) - recipe.crop_length, crops).long()
    losses = [
        model(**_model_inputs(recipe, corpus, some, recipe.crop_length // 4)).loss
        for some in starts.split(16)
    ]
    return torch.stack(losses).mean().item()


def unigram_nll(train_tokens: Tensor, held_out_tokens: Tensor) -> float:
    """Cross-entropy of `held_out_tokens` under the token frequencies of `train_tokens`, nats."""
    counts = torch.bincount(train_tokens.long(), minlength=VOCABULARY_SIZE).double() + 1
    return -torch.log(counts / counts.sum())[held_out_tokens.long()].mean().item()


def _sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    tokens = model.generate(
        **tokenizer(prompt, return_tensors="pt"),
        max_new_tokens=200,
        do_sample=True,
        temperature=0.7,
    )
    text = tokenizer.decode(tokens[0], skip_special_tokens=True)
    return prompt + text if model.config.is_encoder_decoder else text
