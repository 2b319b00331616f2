"""The models that `trained_models` trains: architecture, schedule, and dense counterpart.

What decides how related experts become: how early the dense model is upcycled (from then on experts
learn apart), how long they are trained after that, and their learning rate. Experts of a model that
was never upcycled are unrelated, whatever the schedule.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from resmoe_dist.testing.recipes import RECIPES, Recipe


@dataclass(frozen=True)
class Kind:
    """One model to train.

    text: what it stands for. family: of transformers, a key of `RECIPES`. recipe: without dense
    steps, all experts are initialised independently. counterpart: what to change in the recipe's
    config for the dense model: one expert, as large as all that a token of the MoE model uses.
    muon_experts: train experts with Muon, those of both; independent ones learn faster with it.
    """

    text: str
    family: str
    recipe: Recipe
    counterpart: dict[str, Any]
    muon_experts: bool = False

    @property
    def steps(self) -> int:
        """Of the model and of its counterpart, with the same number of tokens each."""
        return self.recipe.dense_steps + self.recipe.moe_steps

    def shortened(self, steps: int) -> Kind:
        """The same with so many steps, divided alike, but at least one of a stage that it has."""
        dense = -(-steps * self.recipe.dense_steps // self.steps)
        return replace(
            self, recipe=replace(self.recipe, dense_steps=dense, moe_steps=steps - dense)
        )

    def as_dict(self) -> dict[str, Any]:
        """Everything that decides the trained weights, for JSON."""
        return {
            "family": self.family,
            "recipe": asdict(self.recipe),
            "counterpart": self.counterpart,
            "muon_experts": self.muon_experts,
        }


def _changed(family: str, config: dict[str, Any], **schedule: Any) -> Recipe:
    recipe = RECIPES[family]
    return replace(recipe, config=recipe.config | config, **schedule)


# Eight experts of 256 rows, two per token.
_MIXTRAL_DENSE = dict(num_local_experts=1, num_experts_per_tok=1, intermediate_size=512)

KINDS: dict[str, Kind] = {
    "mixtral": Kind(
        "8 experts that have drifted apart as far as those of Mixtral-8x7B",
        "mixtral",
        _changed("mixtral", {}, dense_steps=100, moe_steps=1100, expert_lr=0.006),
        _MIXTRAL_DENSE,
    ),
    "fine": Kind(
        "16 small unrelated experts and a shared one, like DeepSeek's",
        "deepseek_v3",
        _changed(
            "deepseek_v3",
            dict(
                moe_intermediate_size=64,
                n_routed_experts=16,
                num_experts_per_tok=4,
                routed_scaling_factor=2.5,
            ),
            top_k=4,
            dense_steps=0,
            moe_steps=1500,
        ),
        # Its shared expert is as large as the routed one: 160 + 160 rows for 4 × 64 + 64. The
        # factor makes up for weights that sum to 1 over four experts; here there is one.
        dict(
            n_routed_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=160,
            routed_scaling_factor=1.0,
        ),
        muon_experts=True,
    ),
    "related": Kind(
        "8 closely related experts",
        "mixtral",
        _changed("mixtral", {}, dense_steps=250, moe_steps=450),
        _MIXTRAL_DENSE,
    ),
    "switch": Kind(
        "8 experts with one per token, in every layer of encoder and decoder",
        "switch",
        _changed(
            "switch",
            dict(num_sparse_encoder_layers=4, num_sparse_decoder_layers=4, num_experts=8),
            dense_steps=150,
            moe_steps=850,
        ),
        dict(num_experts=1),
    ),
}
