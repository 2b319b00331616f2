"""Trained MoE models to compare compression methods on, and how related their experts are.

    python -m benchmarks.trained_models --work DIR
    python -m benchmarks.trained_models --work DIR --kinds mixtral fine --seed 1 --threads 1
    resmoe-dist compare DIR/mixtral-seed0 --token-ids DIR/mixtral-seed0/held-out.json \
        --calibration DIR/mixtral-seed0/calibration.txt --report REPORT

They read bytes of Python's standard library, like the embedded models, for longer. Next to each, a
dense counterpart is trained with the same schedule on as many tokens: the same architecture with a
single expert, as large as all experts together that a token of the MoE model uses. Losses are nats
per byte of whole files that neither model was trained on.

*left of 4* is the share of the experts' energy that is left after the mean of four is subtracted
(`relatedness.py`).

Finished models are not trained again. An interrupted run goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import harness
from benchmarks.harness import logger, positive
from benchmarks.long_training import Stage, train_stage
from benchmarks.relatedness import relatedness
from benchmarks.tables import Row
from benchmarks.timing import Clock
from benchmarks.trained_kinds import KINDS, Kind
from resmoe_dist.checkpoints.tensor_files import read_json_object, write_bytes, write_json
from resmoe_dist.errors import UserError
from resmoe_dist.testing.corpus import byte_tokenizer, read_corpus
from resmoe_dist.testing.recipes import build_model
from resmoe_dist.testing.training import (
    HELD_OUT_FILE,
    held_out_sequences,
    learning_rates,
    mean_nll,
    unigram_nll,
)
from resmoe_dist.testing.upcycling import balance_by_bias, choose_first_expert, upcycle

TABLES = (
    (
        *("rows", "kind", "parameters=parameters:,", "nll=nll:.4f", "dense nll=dense_nll:.4f"),
        *("gain=gain:.4f", "unigram nll=unigram_nll:.3f", "left of 4=left_of_four:.1%"),
        *("left of all=left_of_all:.1%", "experts", "CPU s=seconds:.0f"),
        "dense CPU s=dense_seconds:.0f",
    ),
    (*("layers", "kind", "layer", "left of 4=left_of_four:.1%", "left of all=left_of_all:.1%"),),
)
CALIBRATION_FILE = "calibration.txt"
REPORT_FILE = "training.json"
_EXCERPTS, _EXCERPT_BYTES = 16, 4096
_GROUP = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See `harness`."""
    add = parser.add_argument
    names = list(KINDS)
    texts = "; ".join(f"{name}: {kind.text}" for name, kind in KINDS.items())
    add("--work", type=Path, metavar="DIR", required=True, help="folder for the models")
    add("--kinds", nargs="+", choices=names, default=names, metavar="KIND", help=texts)
    add("--steps", type=positive, metavar="N", help="of each model, for a trial")


def measure(args: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """rows: one per kind. layers: relatedness of each layer."""
    rows, layers = [], []
    for name in dict.fromkeys(args.kinds):
        kind = KINDS[name] if args.steps is None else KINDS[name].shortened(args.steps)
        row = _Training(args.work / f"{name}-seed{args.seed}", kind, args.seed).finished()
        rows.append({"kind": name} | row)
        layers += [
            {"kind": name, "layer": i, "left_of_four": four, "left_of_all": everything}
            for i, (four, everything) in enumerate(row["left_per_layer"])
        ]
    return {"rows": rows, "layers": layers}


@dataclass(frozen=True)
class _Training:
    """One kind with one seed. folder: of the finished model; its siblings hold what precedes it."""

    folder: Path
    kind: Kind
    seed: int

    def finished(self) -> Row:
        """The report of the model, which is trained first unless it is there."""
        if not (self.folder / REPORT_FILE).exists():
            self._train()
        report = read_json_object(self.folder / REPORT_FILE)
        if report["made_from"] != self._made_from(""):
            raise UserError(
                f"{self.folder}: a model of other options; remove it or choose another --work"
            )
        return report

    def _train(self) -> None:
        if self.folder.exists():
            raise UserError(f"{self.folder}: not a trained model; choose another --work")
        recipe, stages = self.kind.recipe, self._sibling("stages")
        stages.mkdir(parents=True, exist_ok=True)
        train, held_out = read_corpus()
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            model, seconds = self._moe(train)
            dense, dense_seconds = self._dense_counterpart(train)
        report: Row = {
            "made_from": self._made_from(""),
            **self.kind.as_dict(),
            "seed": self.seed,
            "experts": _num_experts(model),
            "parameters": model.num_parameters(),
            "nll": mean_nll(model, recipe, held_out),
            "seconds": seconds,
            "dense_parameters": dense.num_parameters(),
            "dense_nll": mean_nll(dense, recipe, held_out),
            "dense_seconds": dense_seconds,
            "unigram_nll": unigram_nll(train, held_out),
        }
        report["gain"] = report["dense_nll"] - report["nll"]
        partial = self._sibling("partial")
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        byte_tokenizer("right" if recipe.encoder_decoder else "left").save_pretrained(partial)
        write_json(partial / HELD_OUT_FILE, held_out_sequences(recipe, held_out))
        write_bytes(partial / CALIBRATION_FILE, excerpts(train).encode())
        left = relatedness(partial, (_GROUP, report["experts"]))
        report["left_per_layer"] = left
        report["left_of_four"] = statistics.fmean(four for four, _ in left)
        report["left_of_all"] = statistics.fmean(everything for _, everything in left)
        write_json(partial / REPORT_FILE, report)
        partial.rename(self.folder)
        shutil.rmtree(stages)
        logger.info("%s: %.4f nats per byte, dense %.4f", self.folder, report["nll"],
                    report["dense_nll"])  # fmt: skip

    def _dense_counterpart(self, corpus: Tensor) -> tuple[PreTrainedModel, float]:
        recipe = self.kind.recipe
        torch.manual_seed(self.seed)
        model = build_model(self.kind.family, recipe.config | self.kind.counterpart)
        choose_first_expert(model)
        # As for the MoE model, but warmed up once: nothing in it is new at the second stage.
        constant = learning_rates(recipe.dense_steps, decay=False)
        falling = learning_rates(
            recipe.moe_steps, decay=True, warmup=1 if recipe.dense_steps else 20
        )
        return model, self._stage("counterpart", model, corpus, constant + falling)

    def _moe(self, corpus: Tensor) -> tuple[PreTrainedModel, float]:
        recipe, seconds = self.kind.recipe, 0.0
        torch.manual_seed(self.seed)
        if recipe.dense_steps:
            dense = build_model(self.kind.family, recipe.config | recipe.one_expert)
            choose_first_expert(dense)
            rates = learning_rates(recipe.dense_steps, decay=False)
            seconds = self._stage("dense", dense, corpus, rates)
            model = upcycle(dense, build_model(self.kind.family, recipe.config))
        else:
            model = build_model(self.kind.family, recipe.config)
        balance_by_bias(model)
        rates = learning_rates(recipe.moe_steps, decay=True)
        return model, seconds + self._stage("experts", model, corpus, rates)

    def _stage(
        self, name: str, model: PreTrainedModel, corpus: Tensor, factors: list[float]
    ) -> float:
        stage = Stage(
            f"{self.folder.name}, {name}",
            self._sibling("stages") / f"{name}.pt",
            self._made_from(name),
            self.kind.recipe,
            factors,
            self.kind.muon_experts,
        )
        return train_stage(stage, model, corpus)

    def _made_from(self, stage: str) -> str:
        decisive = [stage, self.seed, self.kind.as_dict()]
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:20]

    def _sibling(self, suffix: str) -> Path:
        return self.folder.with_name(f"{self.folder.name}.{suffix}")


def excerpts(tokens: Tensor) -> str:
    """Evenly spread excerpts of the token ids [tokens] of a corpus, 64 KiB in all, as text."""
    starts = torch.linspace(0, len(tokens) - _EXCERPT_BYTES, _EXCERPTS).long().tolist()
    parts = [tokens[start : start + _EXCERPT_BYTES] for start in starts]
    # Special tokens come after the bytes. A cut may leave half a character.
    return "\n".join(bytes(part[part < 256].tolist()).decode(errors="ignore") for part in parts)


def _num_experts(model: PreTrainedModel) -> int:
    config = model.config
    return getattr(config, "num_local_experts", None) or config.num_experts


if __name__ == "__main__":
    harness.main(sys.modules[__name__])
