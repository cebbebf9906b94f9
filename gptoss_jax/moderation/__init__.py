"""Texts judged by a written policy: a policy, some to begin with, and who asks the model. See judge.py for how."""

from gptoss_jax.moderation.judge import Judgement, NoJudgement, moderate, moderate_async
from gptoss_jax.moderation.policies import POLICIES
from gptoss_jax.moderation.policy import Example, Label, Policy

__all__ = ["POLICIES", "Example", "Judgement", "Label", "NoJudgement", "Policy", "moderate", "moderate_async"]
