"""SmolLM2-135M learns to add: learning rate at random, clip and group size on a grid. 16 trials.

  python -m launch.run --sweep=launch/sweeps/grpo_smollm2.py --dry_run
  python -m launch.run --sweep=launch/sweeps/grpo_smollm2.py

Good learning rates lie within a factor of ten or so, but nobody knows where. So they are drawn
log-uniformly, and a larger count adds draws to those that are done. All settings sample 128
responses a step.
"""

from launch.sweep import fixed, log_uniform, product, random, zipped

EXPERIMENT = "experiments.grpo"


def sweep():
  yield from product(
    fixed({"eval.every": 8, "eval.samples": 2}, model="smollm2", task="arithmetic", epochs=2),
    random(4, 0, {"optimizer.learning_rate": log_uniform(3e-6, 1e-4)}),
    {"loss.clip_high": [0.2, 0.28]},
    zipped(responses_per_prompt=[8, 16], prompts_per_step=[16, 8]),
  )
