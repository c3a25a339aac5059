"""Which learning rate, clip and group size for the tiny model? 24 settings, a minute each on a CPU.

  python -m launch.run --sweep=launch/sweeps/grpo_tiny.py --parallel=2
  python -m launch.report runs/sweep-grpo_tiny

Clipping matters only if a batch is used more than once, so each is used twice here. All settings
sample the same number of responses a step.
"""

from launch.sweep import fixed, product, zipped

EXPERIMENT = "experiments.grpo"


def sweep():
  yield from product(
    fixed(model="tiny", task="copy", steps=120, epochs=2),
    {"optimizer.learning_rate": [1e-3, 3e-3, 1e-2], "loss.clip_high": [0.1, 0.3]},
    zipped(responses_per_prompt=[4, 16], prompts_per_step=[128, 32], microbatch_prompts=[128, 32]),
    seed=[0, 1],
  )
