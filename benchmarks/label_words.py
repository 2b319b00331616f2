"""A language model of encoder and decoder as a classifier: it scores label words, as T5 does.

Training makes the decoder write the label's word (cross-entropy of its tokens and the end token).
Prediction takes the word with the largest log-probability. Nothing is added to the model.

Legend: B batch, C labels, L tokens of a word, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import MoEModelOutput

from benchmarks.glue import Example
from resmoe_dist.errors import UserError
from resmoe_dist.families.sites import find_expert_sites

# Paper 000, appendix A, table 1.
BETAS, EPSILON, WARMUP_STEPS, WEIGHT_DECAY = (0.9, 0.98), 1e-8, 8, 0.01
_NO_LOSS = -100


@dataclass(frozen=True)
class Training:
    """What the papers search over, and the seed. max_length: tokens of an input; more are cut."""

    learning_rate: float
    batch_size: int
    epochs: int
    max_length: int
    seed: int

    def as_dict(self) -> dict[str, float]:
        """By name."""
        return asdict(self)


class LabelWords:
    """Texts and label words as token ids.

    Raises UserError for a tokenizer without an end or padding token, or words that it cannot tell
    from each other.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, words: Sequence[str], max_length: int
    ) -> None:
        if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
            raise UserError("the tokenizer needs an end token and a padding token")
        self._tokenizer, self._max_length = tokenizer, max_length
        self.words = [
            [*tokenizer(word, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            for word in words
        ]
        if len(set(map(tuple, self.words))) < len(words):
            raise UserError(f"the tokenizer reads two of {', '.join(words)} alike")

    def inputs(self, texts: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        """input_ids and attention_mask [B, S]. Padding is on the right.

        There it does not take places in an expert's capacity from tokens of the text.
        """
        encoded = self._tokenizer(
            list(texts),
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=self._max_length,
            return_tensors="pt",
        )
        return {key: encoded[key].to(device) for key in ("input_ids", "attention_mask")}

    def targets(self, labels: Sequence[int], device: torch.device) -> Tensor:
        """The words' tokens [B, L], filled up with what the loss leaves out."""
        length = max(len(self.words[label]) for label in labels)
        rows = [self.words[k] + [_NO_LOSS] * (length - len(self.words[k])) for k in labels]
        return torch.tensor(rows, device=device)

    @torch.no_grad()
    def predict(self, model: PreTrainedModel, texts: Sequence[str], batch_size: int) -> list[int]:
        """The label of each text."""
        model.eval()
        found: list[int] = []
        for start in range(0, len(texts), batch_size):
            inputs = self.inputs(texts[start : start + batch_size], model.device)
            found += self.scores(model, inputs).argmax(dim=1).tolist()
        return found

    def scores(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
        """Log-probability of each word for each input [B, C]. The encoder runs once."""
        encoded = model.get_encoder()(**inputs)
        states = MoEModelOutput(last_hidden_state=encoded.last_hidden_state)
        mask, columns = inputs["attention_mask"], []
        for word in self.words:
            labels_BL = torch.tensor([word] * len(mask), device=model.device)
            logits_BLV = model(
                encoder_outputs=states, attention_mask=mask, labels=labels_BL, use_cache=False
            ).logits
            logs_BLV = logits_BLV.float().log_softmax(dim=-1)
            columns.append(logs_BLV.gather(2, labels_BL.unsqueeze(2)).sum(dim=(1, 2)))
        return torch.stack(columns, dim=1)


def freeze_experts(model: PreTrainedModel) -> None:
    """Leave experts and routers out of training: all parameters of every sparse MLP."""
    for site in find_expert_sites(model):
        for module in site.modules:
            model.get_submodule(module.rpartition(".")[0]).requires_grad_(False)


def fine_tune(
    model: PreTrainedModel, words: LabelWords, examples: Sequence[Example], training: Training
) -> None:
    """Train everything but experts and routers, in place; the model is in eval mode after it.

    AdamW as in paper 000. After the warm-up the learning rate falls linearly to 0, as in paper
    002's table A15; 000 and 001 do not say. The caller's random state is not changed.
    """
    freeze_experts(model)
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=training.learning_rate,
        betas=BETAS,
        eps=EPSILON,
        weight_decay=WEIGHT_DECAY,
    )
    steps = training.epochs * -(-len(examples) // training.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, steps))
    cuda = [model.device] if model.device.type == "cuda" else []
    with torch.enable_grad(), torch.random.fork_rng(devices=cuda):
        torch.manual_seed(training.seed)
        model.train()
        batches = _batches(examples, training)
        for batch in tqdm(batches, total=steps, desc="fine-tuning", unit="step", disable=None):
            inputs = words.inputs([each.text for each in batch], model.device)
            labels = words.targets([each.label for each in batch], model.device)
            model(**inputs, labels=labels, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    model.eval()


def rate_factor(step: int, steps: int) -> float:
    """Of the learning rate: linear warm-up, then linear to 0."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return (steps - step) / max(1, steps - WARMUP_STEPS)


def _batches(examples: Sequence[Example], training: Training) -> Iterator[list[Example]]:
    """Every example once per epoch, in random order."""
    for _ in range(training.epochs):
        order = torch.randperm(len(examples)).tolist()
        for start in range(0, len(order), training.batch_size):
            yield [examples[i] for i in order[start : start + training.batch_size]]
