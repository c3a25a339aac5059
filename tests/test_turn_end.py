"""What ends a turn: read off what each template writes, by every loader, and named in exports."""

from __future__ import annotations

import json

import jax
import pytest

from rl_llm.data import Demonstration
from rl_llm.data.encoding import encode
from rl_llm.policy import make_policy, save_hf, tiny_config
from rl_llm.rollout.drawing import make_encode
from rl_llm.text.chat_template import ChatTemplateError
from rl_llm.text.tokenizers import (
  ByteTokenizer,
  from_gguf,
  from_hf,
  load_tokenizer,
  save_tokenizer,
  token_ids,
)
from rl_llm.text.turn_end import check_turn_end
from tests.test_tokenizers import put, write_gguf

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

HEADER = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = (
  "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
  + HEADER
)
# As published, of each only what surrounds the assistant's words.
TEMPLATES = {
  "chatml": (CHATML, "<|im_end|>"),
  "llama2": (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}",
    "</s>",
  ),
  "llama3": (
    "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}",
    "<|eot_id|>",
  ),
  "zephyr": (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}\n{% endfor %}",
    "</s>",
  ),
  "gemma": (
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}",
    "<end_of_turn>",
  ),
  # Behind a conversation Phi-3 writes EOS as well: a turn ended before.
  "phi3": (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
    "<|end|>",
  ),
  "qwen3": (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}" + HEADER,
    "<|im_end|>",
  ),
  # DeepSeek's coder: line breaks first, and they are a token of their own.
  "breaks first": (
    "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n<|EOT|>\n{% endfor %}",
    "<|EOT|>",
  ),
}
SPECIAL = [
  "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>",
  "<|end_header_id|>", "<end_of_turn>", "<start_of_turn>", "<|end|>", "<|user|>", "<|assistant|>",
]  # fmt: skip
PLAIN = ["<|EOT|>", "<think>", "</think>", "\n\n", "  "]  # Added tokens that are not flagged.


@pytest.fixture(scope="module")
def backend(tmp_path_factory):
  """Byte-level BPE with the control tokens of all families."""
  found = from_gguf(write_gguf(tmp_path_factory.mktemp("bpe"))).backend
  for names, special in ((SPECIAL, True), (PLAIN, False)):
    found.add_tokens([tokenizers.AddedToken(t, normalized=False, special=special) for t in names])
  return found


@pytest.fixture
def write(backend, tmp_path):
  """(template, EOS) -> a directory as Hugging Face distributes them."""

  def write(template, eos="</s>"):
    backend.save(str(tmp_path / "tokenizer.json"))
    put(tmp_path, "tokenizer_config.json", {"eos_token": eos, "chat_template": template})
    put(tmp_path, "generation_config.json", {"eos_token_id": backend.token_to_id(eos)})
    return tmp_path

  return write


@pytest.mark.parametrize("family", TEMPLATES)
def test_the_token_a_template_ends_turns_with_ends_responses(family, write, backend):
  template, end = TEMPLATES[family]
  tokenizer = from_hf(write(template, eos="</s>"))
  wanted = [backend.token_to_id(t) for t in dict.fromkeys(["</s>", end])]
  assert list(tokenizer.eos_ids) == wanted
  assert tokenizer.eos_token == "</s>"  # Plain texts end as the files say.
  check_turn_end(tokenizer)
  # What is trained ends with a token at which the sampler stops.
  encoded = encode(Demonstration("a", "b", {}), tokenizer)
  trained = [i for i, m in zip(encoded.tokens, encoded.mask, strict=True) if m]
  assert trained[-1] in tokenizer.eos_ids


def test_both_loaders_find_the_same_end(tmp_path, write):
  """The base model: EOS is <|endoftext|>, and ChatML ends turns with <|im_end|>."""
  of_gguf = from_gguf(write_gguf(tmp_path, eos_token_id=0))
  of_hf = from_hf(write(CHATML, eos="<|endoftext|>"))
  for found in (of_gguf, of_hf):
    assert found.eos_ids == (0, 2) and found.eos_token == "<|endoftext|>"


def test_an_end_of_any_name_is_found(write, backend):
  """No list of names holds DeepSeek's; and what a template ends the user's turn with is none."""
  end = "<｜end▁of▁sentence｜>"
  backend.add_tokens([tokenizers.AddedToken(end, normalized=False, special=True)])
  template = (
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}<|end|>{% else %}"
    "<|assistant|>{{ m.content }}" + end + "{% endif %}{% endfor %}"
  )
  eos_ids = from_hf(write(template)).eos_ids
  assert eos_ids == tuple(map(backend.token_to_id, ("</s>", end)))


def test_a_template_that_fails_leaves_plain_text_alone(write, backend):
  tokenizer = from_hf(write("{{ raise_exception('no') }}"))
  assert tokenizer.eos_ids == (backend.token_to_id("</s>"),)
  make_encode(tokenizer, prompt_format="plain", max_prompt_tokens=9)
  with pytest.raises(ChatTemplateError, match="refuses these messages: no"):
    make_encode(tokenizer, max_prompt_tokens=9)


@pytest.mark.parametrize("end, shown", [("<|stop|>\n", "'<|stop|>"), ("### End\n", "'### End")])
def test_a_template_and_an_eos_that_do_not_agree_are_refused_by_both_names(end, shown, write):
  template = CHATML.replace("<|im_end|>\n", end)
  tokenizer = from_hf(write(template))
  assert tokenizer.eos_ids == (tokenizer.backend.token_to_id("</s>"),)
  for refused in (
    lambda: make_encode(tokenizer, max_prompt_tokens=9),  # Whoever samples,
    lambda: encode(Demonstration("a", "b", {}), tokenizer),  # and whoever trains.
  ):
    with pytest.raises(ChatTemplateError) as caught:
      refused()
    assert shown in str(caught.value) and "EOS is '</s>'" in str(caught.value)
  make_encode(tokenizer, prompt_format="plain", max_prompt_tokens=9)
  # The cure that the error names.
  cured = template.replace("{{ m.content }}", "{{ m.content }}{{ eos_token }}")
  check_turn_end(from_hf(write(cured)))
  encode(Demonstration("a", "b", {}), from_hf(write(cured)))


def test_a_template_that_writes_no_end_samples_and_does_not_train(write):
  tokenizer = from_hf(write(CHATML.replace("<|im_end|>", "")))
  make_encode(tokenizer, max_prompt_tokens=9)
  with pytest.raises(ChatTemplateError, match=r"ends an assistant's turn with '\\n'.*'</s>'"):
    encode(Demonstration("a", "b", {}), tokenizer)


# Exports.


@pytest.mark.parametrize("name", ["byte", "hf"])
def test_an_export_names_its_special_tokens_everywhere(name, tmp_path, write):
  tokenizer = ByteTokenizer() if name == "byte" else from_hf(write(CHATML, eos="<|endoftext|>"))
  wanted = {
    "byte": {"bos_token_id": 257, "eos_token_id": 258, "pad_token_id": 256},
    "hf": {"bos_token_id": None, "eos_token_id": [0, 2], "pad_token_id": 0},
  }[name]
  assert token_ids(tokenizer) == wanted
  config = tiny_config(400)
  params = jax.jit(make_policy(config).init)(jax.random.key(0))
  directory = tmp_path / "export"
  save_hf(directory, config, params, token_ids=token_ids(tokenizer))
  save_tokenizer(directory, tokenizer)
  for file in ("config.json", "generation_config.json"):
    entries = json.loads((directory / file).read_text())
    # Null is said too: transformers takes what is left out from Llama, 1 and 2.
    assert {key: entries.get(key, "left out") for key in wanted} == wanted, file
  again = load_tokenizer(directory)
  for field in ("eos_ids", "bos_id", "pad_id", "eos_token", "bos_token"):
    assert getattr(again, field) == getattr(tokenizer, field)
  if name == "hf":  # The end is in the export even where its template is taken away.
    (directory / "chat_template.jinja").unlink()
    assert load_tokenizer(directory).eos_ids == (0, 2)
