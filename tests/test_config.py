"""What a config promises: derived flags, one clear line per mistake, a record that reads back."""

from __future__ import annotations

import dataclasses
import doctest
import functools
import importlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Literal

import pytest
from absl import flags
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_llm.errors import ConfigError
from rl_llm.runs import config as config_lib
from rl_llm.runs.config import option


@dataclasses.dataclass(frozen=True)
class Loss:
  """The policy term."""

  clip_high: float = option(0.2, "how far above 1 the ratio may matter", above=0)
  kind: Literal["ppo", "grpo"] = option("grpo", "which loss")
  normalize: bool = option(True, "divide by the length")


@dataclasses.dataclass(frozen=True)
class Config:
  batch: int = option(8, "problems per step", min=1, max=4096)
  learning_rate: float = option(1e-5, "AdamW's step size", above=0)
  name: str = option("run", "what to call the run")
  prompt: str | None = option(None, "text before every prompt")
  limit: int | None = option(4, "steps at most")
  preset: str = option("grpo", "recipe", choices=("grpo", "dapo"))
  buckets: tuple[int, ...] = option((16, 32), "lengths, in tokens", min=1)
  names: tuple[str, ...] = option((), "names of things")
  scales: tuple[float, ...] | None = option(None, "factors")
  loss: Loss = Loss()


def parsed(*args, config_class=Config):
  values = flags.FlagValues()
  config_lib.define_flags(config_class, flag_values=values)
  values(["program", *args])
  return values


def build(*args, overrides=None, config_class=Config):
  values = parsed(*args, config_class=config_class)
  return config_lib.from_flags(config_class, overrides=overrides, flag_values=values)


def test_doctests():
  assert doctest.testmod(config_lib).failed == 0


def test_no_flags_give_the_defaults():
  assert build() == Config()


@pytest.mark.parametrize(
  ("arg", "changes"),
  [
    ("--batch=4", {"batch": 4}),
    ("--learning_rate=1", {"learning_rate": 1.0}),
    ("--learning_rate=3e-4", {"learning_rate": 3e-4}),
    ("--name=", {"name": ""}),
    ("--name=none", {"name": "none"}),
    ("--prompt=Be brief.", {"prompt": "Be brief."}),
    ('--prompt="none"', {"prompt": "none"}),
    ('--prompt="a" and "b"', {"prompt": '"a" and "b"'}),
    ("--limit=none", {"limit": None}),
    ("--limit=", {"limit": None}),
    ("--buckets=8", {"buckets": (8,)}),
    ("--buckets=8,16,64", {"buckets": (8, 16, 64)}),
    ("--buckets=", {"buckets": ()}),
    ("--names=a,b", {"names": ("a", "b")}),
    ('--names=["a,b", ""]', {"names": ("a,b", "")}),
    ("--scales=1,0.5", {"scales": (1.0, 0.5)}),
    ("--preset=dapo", {"preset": "dapo"}),
    ("--loss.clip_high=0.28", {"loss.clip_high": 0.28}),
    ("--loss.kind=ppo", {"loss.kind": "ppo"}),
    ("--noloss.normalize", {"loss.normalize": False}),
    ("--loss.normalize=false", {"loss.normalize": False}),
  ],
)
def test_every_kind_of_flag_changes_its_field_and_no_other(arg, changes):
  config = build(arg)
  assert config_lib.flatten(config) == config_lib.flatten(Config()) | changes
  assert config == config_lib.replace(Config(), changes)
  floats = [value for value in config_lib.flatten(config).values() if isinstance(value, float)]
  assert len(floats) == 2  # an int given for a float is stored as a float


@pytest.mark.parametrize(
  ("arg", "field", "allowed"),
  [
    ("--batch=1.5", "batch", "an integer"),
    ("--batch=many", "batch", "an integer"),
    ("--batch=0", "batch", ">= 1"),
    ("--batch=5000", "batch", "<= 4096"),
    ("--batch=none", "batch", "an integer"),
    ("--learning_rate=nan", "learning_rate", "a finite number > 0"),
    ("--learning_rate=inf", "learning_rate", "finite"),
    ("--learning_rate=1e999", "learning_rate", "finite"),
    ("--learning_rate=0", "learning_rate", "> 0"),
    ("--limit=x", "limit", "an integer, or none"),
    ("--buckets=8,x", "buckets", "a comma list of integers"),
    ("--buckets=8,0", "buckets", ">= 1"),
    ("--buckets=[8, 1.5]", "buckets", "integers"),
    ("--buckets=" + "[" * 100_000, "buckets", "integers"),
    ("--scales=[NaN]", "scales", "finite"),
    ("--preset=dappo", "preset", "did you mean dapo?"),
    ("--loss.kind=ppu", "loss.kind", "one of ppo, grpo; did you mean ppo?"),
    ("--loss.normalize=maybe", "loss.normalize", "true or false"),
  ],
)
def test_a_wrong_value_names_its_flag_and_what_is_allowed(arg, field, allowed):
  with pytest.raises((ConfigError, flags.IllegalFlagValueError)) as caught:
    build(arg)
  error = caught.value if isinstance(caught.value, ConfigError) else caught.value.__context__
  assert isinstance(error, ConfigError) and error.field == field
  message = str(error)
  assert message.startswith(f"--{field}=") and allowed in message
  assert "\n" not in message and len(message) < 300


def test_an_override_changes_the_default_and_an_explicit_flag_wins():
  overrides = {"loss.clip_high": 0.28, "batch": 16, "buckets": [64]}
  config = build("--batch=8", overrides=overrides)
  assert (config.loss.clip_high, config.batch, config.buckets) == (0.28, 8, (64,))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"loss.clip_hihg": 0.3},
      "--loss.clip_hihg=0.3: must be a field of Config; did you mean loss.clip_high?",
    ),
    (
      {"clip_high": 0.3},
      "--clip_high=0.3: must be a field of Config; did you mean loss.clip_high?",
    ),
    ({"loss": 1}, "--loss=1: must be a field of Config"),
    ({"batch": "4"}, "--batch=4: must be an integer >= 1 and <= 4096"),
    ({"batch": True}, "--batch=True: must be an integer >= 1 and <= 4096"),
    ({"batch": None}, "--batch=none: must be an integer >= 1 and <= 4096"),
    ({"names": "ab"}, "--names=ab: must be a comma list of texts"),
    ({"learning_rate": float("nan")}, "--learning_rate=nan: must be a finite number > 0"),
  ],
)
def test_replace_refuses_with_the_nearest_name(changes, message):
  with pytest.raises(ConfigError) as caught:
    config_lib.replace(Config(), changes)
  assert str(caught.value).startswith(message)
  with pytest.raises(ConfigError):
    build(overrides=changes)


def test_replace_checks_what_was_built_by_hand():
  assert config_lib.replace(Config(batch=2), {}) == Config(batch=2)
  with pytest.raises(ConfigError, match="--loss.clip_high=-1: must be a finite number > 0"):
    config_lib.replace(Config(loss=Loss(clip_high=-1)), {})


def class_with(hint, field, **kwargs):
  return dataclasses.make_dataclass("Bad", [("size", hint, field)], frozen=True, **kwargs)


@pytest.mark.parametrize(
  ("config_class", "message"),
  [
    (class_with(int, dataclasses.field(default=1)), "Bad.size needs a help text"),
    (class_with(int, dataclasses.field(metadata={"help": "x"})), "Bad.size needs a default"),
    (class_with(dict, option(None, "x")), "Bad.size has the type"),
    (class_with(int | str, option(1, "x")), "Bad.size has the type"),
    (class_with(tuple[int, int], option((1, 2), "x")), "Bad.size has the type"),
    (
      class_with(int, dataclasses.field(default=1, metadata={"help": "x", "minimum": 0})),
      "minimum",
    ),
    (class_with(str, option("a", "x", choices=(1, 2))), "Bad.size has the type"),
    (
      dataclasses.make_dataclass("Bad", [("help", int, option(1, "x"))], frozen=True),
      "taken by absl",
    ),
    (
      dataclasses.make_dataclass("Bad", [("size", int, option(1, "x"))]),
      "must be a frozen dataclass",
    ),
  ],
)
def test_a_class_that_flags_cannot_hold_is_refused_at_definition(config_class, message):
  with pytest.raises(TypeError, match=message):
    config_lib.define_flags(config_class, flag_values=flags.FlagValues())


def test_a_default_outside_its_own_bounds_is_refused_at_definition():
  with pytest.raises(ConfigError, match="--size=0: must be an integer >= 1"):
    config_lib.define_flags(class_with(int, option(0, "x", min=1)), flag_values=flags.FlagValues())


finite = st.floats(allow_nan=False, allow_infinity=False)
any_text = st.text(st.characters(exclude_categories=()), max_size=12) | st.sampled_from(
  [
    "none",
    " none",
    "",
    '"',
    '"a"',
    "a b ",
    "--batch=9",
    "# x",
    "a\nb",
    "é",
    "\x85",
    "\ud800",
    "[1]",
    "'",
  ]
)
accepted_text = any_text.filter(lambda text: "\0" not in text)
configs = st.builds(
  Config,
  batch=st.integers(1, 4096),
  learning_rate=finite.filter(lambda x: x > 0),
  name=accepted_text,
  prompt=st.none() | accepted_text,
  limit=st.none() | st.integers(),
  preset=st.sampled_from(["grpo", "dapo"]),
  buckets=st.lists(st.integers(1), max_size=3).map(tuple),
  names=st.lists(accepted_text, max_size=3).map(tuple),
  scales=st.none() | st.lists(finite, max_size=3).map(tuple),
  loss=st.builds(
    Loss,
    clip_high=finite.filter(lambda x: x > 0),
    kind=st.sampled_from(["ppo", "grpo"]),
    normalize=st.booleans(),
  ),
)


@settings(max_examples=150, deadline=None)
@given(config=configs)
def test_a_flagfile_reads_back_as_the_equal_config(config, tmp_path_factory):
  path = tmp_path_factory.getbasetemp() / "flags.txt"
  path.write_text(config_lib.to_flagfile(config), encoding="ascii")
  assert build(f"--flagfile={path}") == config
  # Every field is in the file, so that other defaults (here: a preset's) cannot creep in.
  overrides = config_lib.flatten(Config(batch=77, names=("x",), loss=Loss(kind="ppo")))
  assert build(f"--flagfile={path}", overrides=overrides) == config


@settings(max_examples=50, deadline=None)
@given(config=configs)
def test_flatten_and_replace_are_inverse(config):
  flat = config_lib.flatten(config)
  assert list(flat)[0] == "batch" and list(flat)[-1] == "loss.normalize"
  assert config_lib.replace(Config(), flat) == config
  jsonable = json.loads(json.dumps(flat))
  assert config_lib.replace(Config(), jsonable) == config


@settings(max_examples=200, deadline=None)
@given(field=st.sampled_from(sorted(config_lib.flatten(Config()))), text=any_text)
def test_no_text_given_to_a_flag_causes_any_other_error(field, text):
  try:
    config = build(f"--{field}={text}")
  except (ConfigError, flags.IllegalFlagValueError) as error:
    assert field in str(error)
  else:
    assert config_lib.replace(config, {}) == config


SECRETS = {
  "hf": "hf_" + "aB3" * 11,
  "openai": "sk-proj-" + "Zz9_" * 8,
  "wandb": "0123456789abcdef0123456789abcdef01234567",
  "github": "ghp_" + "a1B2" * 9,
}


@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS)
def test_secrets_are_redacted_wherever_a_config_is_written_or_shown(secret, tmp_path):
  config = Config(name=f"x {secret} y", names=(secret, "b"))
  config_lib.write_config(config, tmp_path)
  for path in tmp_path.iterdir():
    assert secret not in path.read_text(encoding="utf-8")
  assert secret not in str(ConfigError("name", secret, "short"))
  assert config_lib.redact(f"({secret})") == "([redacted])"


# Put together here, so that no scanner of repositories takes them for real ones.
OTHER_SECRETS = {
  "npm": "npm_" + "aB3" * 12,
  "pypi": "pypi-" + "AgEIcHlwaS5vcmc" * 3,
  "gitlab": "glpat-" + "x1Y2" * 5,
  "slack": "xoxb-" + "123456789012-" + "abcDEF",
  "stripe": "sk_live_" + "a1" * 12,
  "session": "ASIA" + "ABCDEFGHIJKLMNOP",
  "jwt": "eyJhbGciOiJIUzI1NiJ9." + "eyJzdWIiOiIxMjM0In0." + "dozjgNryP4J3jVmNHl0w",
}


@pytest.mark.parametrize("secret", OTHER_SECRETS.values(), ids=OTHER_SECRETS)
def test_secrets_of_other_shapes(secret):
  assert config_lib.redact(f"({secret})", environ={}) == "([redacted])"
  assert json.loads(config_lib.redact(json.dumps({"a": secret, "b": 1}), environ={}))["b"] == 1


def test_secrets_within_other_text():
  redact = functools.partial(config_lib.redact, environ={})
  body = "\n".join(["MIIEpAIBAAKCAQEA7+/x=" * 2] * 3)
  head, end = "-----BEGIN RSA " + "PRIVATE KEY-----", "-----END RSA PRIVATE KEY-----"
  for key in (f"{head}\n{body}\n{end}", f"{head}\n{body}"):  # The second is cut.
    assert "MIIE" not in redact(f"a {key} b")
    assert json.loads(redact(json.dumps({"k": key, "b": 1})))["b"] == 1
  hook = "https://hooks.slack.com/" + "services/T000/B000/XXXXXXXX"
  assert redact(f"to {hook}") == "to https://hooks.slack.com/[redacted]"
  hook = "https://discord.com/api/webhooks/" + "123456/abc-DEF_x"
  assert redact(hook) == "https://discord.com/api/webhooks/[redacted]"
  assert redact("redis://:pw@host:6379/0 x") == "redis://[redacted]@host:6379/0 x"
  for text in ("https://a.org:80/x@y", "http://host:8080", "12:30@noon", "eyJ is no token"):
    assert redact(text) == text


def test_values_of_secret_variables():
  def redact(text, **environ):
    return config_lib.redact(text, environ=environ)

  assert redact("hunter22", PGPASSWORD="hunter22") == "[redacted]"
  assert redact("db://h", DATABASE_URL="db://h") == "[redacted]"
  assert redact("see https://h/x1", ALERT_WEBHOOK_URL="https://h/x1") == "see [redacted]"
  # A short value is replaced as a word, and never makes other text or JSON unreadable.
  assert redact("pw1x pw1xy", MY_PASSWORD="pw1x") == "[redacted] pw1xy"
  for value in ("1234", "true", "null", "abc"):
    text = json.dumps({"a": [1234, True, None, "abc"]})
    assert redact(text, MY_PASSWORD=value) == text
  # In JSON its quotes and backslashes are escaped.
  odd = 'p"w\\x12345'
  assert json.loads(redact(json.dumps({"a": odd}), MY_PASSWORD=odd)) == {"a": "[redacted]"}
  for name in ("PWD", "OLDPWD", "TOKENIZERS_PARALLELISM", "KEYBOARD", "HOME"):
    assert redact("/home/someone", **{name: "/home/someone"}) == "/home/someone"


def test_redact_leaves_ordinary_text_alone():
  text = "task-specific hf_model sk-learn " + "0123456789abcdef" * 4 + " half_open_interval"
  assert (
    config_lib.redact(text, environ={"TOKENIZERS_PARALLELISM": "ordinary", "API_TOKEN": "half"})
    == text
  )


def test_write_config_records_the_config_its_defaults_and_its_flags(tmp_path):
  config = Config(batch=3, buckets=(4,))
  config_lib.write_config(config, tmp_path)
  stored = json.loads((tmp_path / "config.json").read_text())
  assert config_lib.replace(Config(), stored) == config
  assert (
    config_lib.replace(config, json.loads((tmp_path / "defaults.json").read_text())) == Config()
  )
  assert json.loads((tmp_path / "changed.json").read_text()) == {
    "batch": Config().batch,
    "buckets": list(Config().buckets),
  }
  assert build(f"--flagfile={tmp_path / 'flags.txt'}") == config


PROGRAM = '''
"""Counts to three.

Takes a second.
"""
import dataclasses
from absl import logging
from rl_llm.runs import config
from rl_llm.runs.config import option
from rl_llm.errors import UserError

class ModelMissing(UserError):
  pass

@dataclasses.dataclass(frozen=True)
class Loss:
  """The policy term."""
  clip_high: float = option(0.2, "how far above 1 the ratio may matter", above=0)

@dataclasses.dataclass(frozen=True)
class Place:
  """Where it goes."""
  workdir: str = option("", "the directory")

@dataclasses.dataclass(frozen=True)
class Run:
  """How long, and where."""
  steps: int = option(3, "how many", min=1)
  place: Place = Place()

@dataclasses.dataclass(frozen=True)
class Config:
  learning_rate: float = option(1e-5, "step size", above=0)
  preset: str = option("grpo", "recipe", choices=("grpo", "dapo"))
  run: Run = config.inline(Run(steps=4))
  shuffle: bool = option(False, "whether to shuffle")
  loss: Loss = Loss()

def main(c):
  if c.learning_rate == 7:
    raise config.ConfigError("learning_rate", 7, "small")
  if c.learning_rate == 8:
    raise ModelMissing("no model\\nat x")
  if c.learning_rate == 9:
    raise KeyError("a bug")
  logging.info("informed")
  print(c.learning_rate, c.run.steps, c.loss.clip_high, c.shuffle)

config.run(main, Config,
           overrides=lambda c: {"loss.clip_high": 0.28} if c.preset == "dapo" else {})
'''


@pytest.fixture(scope="module")
def program(tmp_path_factory):
  path = tmp_path_factory.mktemp("program") / "count.py"
  path.write_text(PROGRAM)

  def call(*args, **env):
    root = str(Path(config_lib.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": root, "COLUMNS": "80", **env}
    done = subprocess.run([sys.executable, path, *args], capture_output=True, text=True, env=env)
    return done.returncode, done.stdout, done.stderr

  return call


def test_run_gives_main_the_config_and_absl_flags_work(program):
  code, out, err = program("--preset=dapo", "--shuffle", "--steps=9", "--verbosity=0")
  assert (code, out) == (0, "1e-05 9 0.28 True\n") and "informed" in err
  code, out, err = program("--preset=dapo", "--loss.clip_high", "0.2", "--verbosity=-1")
  assert (code, out, err) == (0, "1e-05 4 0.2 False\n", "")


@pytest.mark.parametrize(
  ("args", "line"),
  [
    (["--lerning_rate=1"], "unknown flag --lerning_rate; did you mean --learning_rate?"),
    (["--clip_high=1"], "unknown flag --clip_high; did you mean --loss.clip_high?"),
    (["--zzzzzz"], "unknown flag --zzzzzz; --help lists them all"),
    (["--run.steps=1"], "unknown flag --run.steps; did you mean --steps?"),
    (["--steps=0"], "--steps=0: must be an integer >= 1"),
    (["--learning_rate=fast"], "--learning_rate=fast: must be a finite number > 0"),
    (["--learning_rate=nan"], "--learning_rate=nan: must be a finite number > 0"),
    (["--learning_rate"], "Missing value for flag --learning_rate"),
    (["--noshuffle=1"], "--noshuffle=1 does not take an argument"),
    (["--shuffle", "False"], "unexpected argument 'False'; write every setting as --name=value"),
    (
      ["--flagfile=/nowhere/x"],
      "Unable to open flagfile: [Errno 2] No such file or directory: '/nowhere/x'",
    ),
    (["--learning_rate=7"], "--learning_rate=7: must be small"),
    (["--learning_rate=8"], "no model at x"),
    ([SECRETS["hf"]], "unexpected argument '[redacted]'; write every setting as --name=value"),
    (["--preset=my-own-secret"], "--preset=[redacted]: must be one of grpo, dapo"),
  ],
)
def test_each_mistake_is_one_line_and_exit_code_2(program, args, line):
  assert program(*args, MY_TOKEN="my-own-secret") == (2, "", f"error: {line}\n")


def test_a_bug_keeps_its_traceback(program):
  code, _, err = program("--learning_rate=9")
  assert code == 1 and "Traceback" in err and "a bug" in err


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_shows_the_docstring_then_each_field_with_its_default_by_groups(program, flag):
  code, out, err = program(flag)
  assert (code, err) == (0, "")
  expected = """\
    Counts to three.

    Takes a second.

    Flags, with their defaults:
      --learning_rate=1e-05
          step size (a finite number > 0)
      --preset=grpo
          recipe (one of grpo, dapo)

    How long, and where.
      --steps=4
          how many (an integer >= 1)

    place: Where it goes.
      --place.workdir=
          the directory (text)

    More:
      --shuffle=false
          whether to shuffle (true or false)

    loss: The policy term.
      --loss.clip_high=0.2
          how far above 1 the ratio may matter (a finite number > 0)

    --flagfile=FILE reads flags from a file; --helpfull lists absl's own flags too.
    """
  assert out == textwrap.dedent(expected)


@dataclasses.dataclass(frozen=True)
class Named:
  name: str = option("a", "which")
  strength: float = option(1.0, "how much")


@dataclasses.dataclass(frozen=True)
class Preset:
  steps: int = option(8, "how many", min=1)
  tiny: bool = option(False, "less of everything")
  part: Named = Named()


def smaller(config):
  return {"steps": 2, "part.strength": 0.5} if config.tiny else {}


@pytest.mark.parametrize(
  "settings", [{}, {"tiny": True}, {"tiny": True, "steps": 8}, {"part": "b", "part.strength": 3}]
)
def test_settings_resolve_as_their_command_line_does(settings):
  config, given = config_lib.resolve(Preset, settings, overrides=smaller)
  arguments = config_lib.to_flags(config, given)
  typed = build(*arguments, config_class=Preset)
  assert build(*arguments, overrides=smaller(typed), config_class=Preset) == config
  assert config.steps == settings.get("steps", 2 if settings.get("tiny") else 8)


def test_a_setting_that_cannot_resolve_says_why():
  with pytest.raises(ConfigError, match="did you mean part.strength"):
    config_lib.resolve(Preset, {"part.strenth": 1.0})
  with pytest.raises(ConfigError, match="--part.name=b: must be given once"):
    config_lib.resolve(Preset, {"part": "a", "part.name": "b"})


# Groups: without a prefix, volatile, checking themselves.


@dataclasses.dataclass(frozen=True)
class Place:
  """Where it goes."""

  VOLATILE = True

  workdir: str = option("", "the directory")
  keep: int = option(1, "how many are kept", min=1)

  def check(self, config):
    CHECKED.append(("place", config))


@dataclasses.dataclass(frozen=True)
class Layout:
  """How it looks."""

  system: str | None = option(None, "what comes first")


@dataclasses.dataclass(frozen=True)
class Run:
  """How long, and where."""

  seed: int = option(0, "of all that is drawn", min=0)
  steps: int = option(24, "updates", min=1, volatile=lambda config: config.schedule == "constant")
  place: Place = Place()
  layout: Layout = config_lib.inline(Layout(system="Hi."))

  def check(self, config):
    CHECKED.append(("run", config))
    if self.steps < config.warmup:
      raise ConfigError("warmup", config.warmup, f"at most steps ({self.steps})")


@dataclasses.dataclass(frozen=True)
class Grouped:
  """All of it."""

  run: Run = config_lib.inline(Run(steps=8))
  schedule: Literal["constant", "linear"] = option("constant", "of the learning rate")
  warmup: int = option(0, "steps", min=0)
  log: bool = option(True, "whether to tell", volatile=True)
  loss: Loss = Loss()


CHECKED = []


def test_an_inline_group_has_flags_without_a_prefix_and_defaults_of_its_own_here():
  assert config_lib.flatten(Grouped()) == {
    "seed": 0,
    "steps": 8,
    "place.workdir": "",
    "place.keep": 1,
    "system": "Hi.",
    "schedule": "constant",
    "warmup": 0,
    "log": True,
    "loss.clip_high": 0.2,
    "loss.kind": "grpo",
    "loss.normalize": True,
  }
  found = build("--steps=5", "--system=none", "--place.keep=3", config_class=Grouped)
  assert found == Grouped(Run(steps=5, place=Place(keep=3), layout=Layout(None)))
  with pytest.raises(ConfigError, match="--run.steps=5: must be a field .*; did you mean steps"):
    config_lib.replace(Grouped(), {"run.steps": 5})


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"seed": 3, "place.workdir": "a b", "log": False},
    {"system": None, "steps": 1, "loss.kind": "ppo"},
  ],
)
def test_a_config_of_groups_comes_back_by_every_way(tmp_path, changes):
  config = config_lib.replace(Grouped(), changes)
  flat = config_lib.flatten(config)
  assert {path: value for path, value in flat.items() if path in changes} == changes
  assert config_lib.replace(Grouped(), json.loads(json.dumps(flat))) == config
  assert build(*config_lib.to_flags(config, flat), config_class=Grouped) == config
  (tmp_path / "flags.txt").write_text(config_lib.to_flagfile(config))
  assert build(f"--flagfile={tmp_path / 'flags.txt'}", config_class=Grouped) == config
  assert build(overrides=changes, config_class=Grouped) == config
  assert config_lib.resolve(Grouped, changes) == (config, changes)


def test_two_groups_of_one_flag_are_refused():
  groups = [("run", Run, config_lib.inline(Run())), ("more", Run, config_lib.inline(Run(seed=1)))]
  twice = dataclasses.make_dataclass("Twice", groups, frozen=True)
  with pytest.raises(flags.DuplicateFlagError, match="'seed' is defined twice"):
    parsed(config_class=twice)


def test_what_may_change_at_a_resume_is_said_by_fields_groups_or_the_whole_config():
  always = {"place.workdir", "place.keep", "log"}
  assert config_lib.volatile(Grouped()) == always | {"steps"}
  assert config_lib.volatile(Grouped(schedule="linear")) == always
  assert config_lib.volatile(Config()) == set()


def test_every_group_checks_itself_against_the_whole_config():
  CHECKED.clear()
  config = Grouped(warmup=8)
  config_lib.check(config)
  assert [(name, seen is config) for name, seen in CHECKED] == [("place", True), ("run", True)]
  with pytest.raises(ConfigError, match=r"--warmup=9: must be at most steps \(8\)"):
    config_lib.check(Grouped(warmup=9))
  config_lib.check(Config())  # None of its groups has a check.


@pytest.mark.parametrize("whole, part, said", [(16, 7, 8), (16, 3, 2), (9, 6, 3), (7, 3, 1)])
def test_a_part_that_does_not_divide_gets_the_nearest_that_does(whole, part, said):
  with pytest.raises(ConfigError, match=f"--size={part}: .*; try --size={said}$"):
    config_lib.check_divides("size", whole, part, "all")


@pytest.mark.parametrize(
  "name",
  [
    *("grpo", "reinforce", "ppo", "dpo", "sft", "reward_model", "evaluate", "make_preferences"),
    *("kto", "distill", "online_dpo"),
  ],
)
@pytest.mark.parametrize("changes", [{}, {"model": "tiny"}, {"model": "tiny", "seed": 3}])
def test_a_config_made_in_python_is_that_of_the_command_line(name, changes):
  module = importlib.import_module(f"experiments.{name}")
  typed = config_lib.resolve(module.Config, changes, overrides=module.overrides)[0]
  assert module.Config(**changes) == typed
  assert dataclasses.replace(typed) == config_lib.replace(typed, {}) == typed
  if changes:
    assert typed != config_lib.replace(module.Config(), changes)  # It would be, without overrides.


def test_a_config_is_made_of_flags_names_and_what_is_given_wins():
  from experiments import flags, grpo

  config = grpo.Config(preset="dapo", loss="cispo_loss", **{"optimizer.learning_rate": 1e-3})
  assert config.loss.name == "cispo_loss" and config.optimizer.learning_rate == 1e-3
  assert grpo.Config(preset="dapo").loss.clip_high == 0.28
  assert grpo.Config(preset="dapo", **{"loss.clip_high": 0.2}).loss.clip_high == 0.2
  rate = grpo.Config(model="tiny").optimizer.learning_rate
  group = grpo.Config(model="tiny", optimizer=flags.Optimizer(b1=0.5)).optimizer
  assert (group.b1, group.learning_rate) == (0.5, rate)
  with pytest.raises(config_lib.ConfigError, match="did you mean optimizer.learning_rate"):
    grpo.Config(learning_rat=1.0)
