"""Packaging: `pip install .` gives the library; extras add what each optional part needs."""

import pathlib
import re

import setuptools

INIT = pathlib.Path(__file__).parent / "rl_llm" / "__init__.py"
EXTRAS = {
  # Hugging Face checkpoints, tokenizers and chat templates.
  "hf": ["tokenizers>=0.21", "safetensors>=0.5", "jinja2>=3.1.6", "huggingface_hub>=0.34"],
  # GGUF files, such as the demo model's.
  "gguf": ["gguf>=0.17", "tokenizers>=0.21", "jinja2>=3.1.6"],
  # `--task=reasoning_gym:<name>`.
  "tasks": ["reasoning-gym>=0.1.23"],
  # `--jsonl.reward_function=math_verify`.
  "math": ["math-verify>=0.8"],
  # `--env=search:DIR`.
  "search": ["bm25s>=0.2"],
  # `--env=openenv:URL`.
  "openenv": ["websockets>=15"],
  # Data sets in Parquet files.
  "parquet": ["pyarrow>=18"],
  # `--track=`.
  "tensorboard": ["tensorboardX>=2.6.2"],
  "wandb": ["wandb>=0.19"],
  "trackio": ["trackio>=0.43"],
  # `launch.run --search.trials`.
  "optuna": ["optuna>=5"],
  # The figure of experiments/compare.py.
  "plot": ["matplotlib>=3.9"],
  # Accelerators: jaxlib's own builds for them.
  "tpu": ["jax[tpu]"],
  "cuda": ["jax[cuda12]"],
  "cuda13": ["jax[cuda13]"],
  # Developers: tests, linting, the site.
  "dev": [
    "pytest>=8",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "ruff>=0.9",
    "pyarrow>=18",
    "markdown-it-py>=3",
    "mkdocs-material>=9.6,<10",
    "mkdocs-static-i18n>=1.3",
    "latex2mathml>=3.78",
    "ziamath>=0.12",
    "mini-racer>=0.12",
    "nbclient>=0.10",
    "ipykernel>=6.29",
    "setuptools>=75",
  ],
  # Regenerating the committed goldens against transformers.
  "parity": ["torch>=2.6", "transformers>=4.57", "gguf>=0.17", "sentencepiece"],
}

setuptools.setup(
  name="rl_llm",
  version=re.search(r'^__version__ = "(.+)"$', INIT.read_text(), re.MULTILINE)[1],
  description="Reinforcement learning of language models in JAX",
  long_description=pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  python_requires=">=3.11",
  # Experiments and launchers run from a clone: installed, their names would stand in the way of
  # an importer's own. An editable install finds them, since it puts the clone on the path.
  packages=setuptools.find_packages(include=["rl_llm", "rl_llm.*"]),
  package_dir={"": "."},
  package_data={"rl_llm": ["py.typed"]},
  install_requires=[
    "jax>=0.10,<0.13",
    "flax>=0.12",
    "optax>=0.2.6",
    "chex>=0.1.90",
    "orbax-checkpoint>=0.12.3",
    "absl-py>=2.1",
    "numpy>=2.0",
    "rich>=13",
  ],
  extras_require=EXTRAS,
)
