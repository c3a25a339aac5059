"""Evaluation of a model on held-out problems: accuracy, pass@k and majority@k, with intervals."""

from rl_llm.evaluation.measure import (
  Evaluation,
  accuracy,
  correctness,
  evaluate,
  grade_counts,
  graded_responses,
  record_responses,
  say_grades,
  show_result,
  summarize,
)
from rl_llm.evaluation.statistics import (
  accuracy_interval,
  difficulty_of,
  estimate_interval,
  majority_at_k,
  natural_order,
  over_opinions,
  pass_at_k,
)

__all__ = [
  "Evaluation",
  "accuracy",
  "accuracy_interval",
  "correctness",
  "difficulty_of",
  "estimate_interval",
  "evaluate",
  "grade_counts",
  "graded_responses",
  "majority_at_k",
  "natural_order",
  "over_opinions",
  "pass_at_k",
  "record_responses",
  "say_grades",
  "show_result",
  "summarize",
]
