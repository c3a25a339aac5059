"""What a reward function is called with, and what becomes of a call: TRL's functions run as there.

Facts about TRL are from its release 1.16.0: `GRPOTrainer._calculate_rewards` calls by keyword, with
lists of equal length, `completion_ids`, `trainer_state`, `log_extra` and `log_metric`; completions
of conversational prompts are `[{"role": "assistant", "content": text}]`; it awaits asynchronous
functions; None leaves a completion out.
"""

import importlib
import json
import re
import time

import pytest

from rl_llm.rewards import RewardError, RewardPool, RewardResult, RewardSource, grading, isolated
from rl_llm.rewards.calls import make_calls, packed
from rl_llm.rewards.results import read_replies, read_reply
from rl_llm.rollout.grading import logged_metrics

GRADERS = """
import asyncio, functools, json, os, time

seen = []

def longer(prompts, completions, **columns):
  mean = sum(map(len, completions)) / len(completions)
  return [float(len(text) > mean) for text in completions]

def conversational(prompts, completions, answer, **columns):
  assert prompts == [[{"role": "user", "content": "q"}]] * len(completions)
  assert all(len(c) == 1 and c[0]["role"] == "assistant" for c in completions)
  return [float(c[0]["content"] == a) for c, a in zip(completions, answer)]

def tokens(completion_ids, **columns):
  return [float(sum(ids)) for ids in completion_ids]

def state(prompts, completions, trainer_state, **columns):
  return [trainer_state.global_step / trainer_state.max_steps] * len(prompts)

def all_that_comes(**everything):
  return [float(len(everything))] * len(everything["completions"])

def few(completions):
  return [1.0] * len(completions)

def swapped(completions, prompts):
  return [float(prompt == "p" + completion) for prompt, completion in zip(prompts, completions)]

def logs(completions, log_extra, log_metric, **columns):
  import numpy as np
  log_extra("length", [len(c) for c in completions])
  log_extra("numpy", np.arange(len(completions)) / 2)
  log_extra("other", [{"a": 1}, None, True, "\\ud800"][:len(completions)])
  log_metric("rate", 0.25)
  log_metric("rate", np.float32(0.75))
  return [1.0] * len(completions)

def logs_badly(completions, how, log_extra, log_metric, **columns):
  if how[0] == "few": log_extra("x", [1])
  if how[0] == "long": log_extra("x", ["a" * 9000] * len(completions))
  if how[0] == "many":
    for number in range(4): log_extra(str(number), ["a" * 3000] * len(completions))
  if how[0] == "nan": log_metric("x", float("nan"))
  if how[0] == "large": log_metric("x", 1e31)
  if how[0] == "names":
    for number in range(65): log_metric(str(number), 1)
  if how[0] == "long name": log_metric("x" * 101, 1)
  return [1.0] * len(completions)

async def waits(prompts, completions, seconds, **columns):
  async def one(text):
    if text == "raise": raise ValueError("asynchronous")
    await asyncio.sleep(seconds[0])
    return float(len(text))
  return await asyncio.gather(*map(one, completions))

def sequential(completions, seconds, **columns):
  for _ in completions: time.sleep(seconds[0])
  return [1.0] * len(completions)

class Judge:
  async def __call__(self, completions, **columns):
    await asyncio.sleep(0)
    return [2.0] * len(completions)

judge = Judge()
partial = functools.partial(waits, seconds=[0])

def returns(completions, kind, **columns):
  import numpy as np
  n, kind = len(completions), kind[0]
  if kind == "tuple": return (1.0,) * n
  if kind == "generator": return (float(i) for i in range(n))
  if kind == "map": return map(float, range(n))
  if kind == "array": return np.arange(n)
  if kind == "set": return set(range(n))
  if kind == "endless": return iter(int, 1)
  if kind == "scalar": return np.ones(())
  if kind == "nothing": return None
  if kind == "raises": return (1 / 0 for _ in range(n))
  if kind == "mixed": return [1.0, None, float("nan"), "1.0", np.ones(2), 0.5][:n]

def behaves(prompts, completions, **columns):
  seen.append(1)
  for text in completions:
    if text == "raise": raise KeyError("a" * 9999)
    if text == "hang": time.sleep(1e9)
    if text == "die": os._exit(3)
    if text == "die before a fork of it": os.fork() and os._exit(3) or time.sleep(1e9)
    if text == "leave": open("left", "w").close()
  return [float(len(seen) + os.listdir(".").count("left"))] * len(completions)

def opinions(completions, **columns):
  if "raise" in completions: raise ValueError("no")
  return [None if text == "none" else 1.0 for text in completions]

def runs(completions, **columns):
  return [float(eval(text)) for text in completions]

def one_by_one(completions, **columns):
  (text,) = completions
  if text == "hang":
    while True: pass
  if text == "die": os._exit(1)
  if text == "raise": raise ValueError("not read")
  return [float(len(text))]

def forges(completions, **columns):
  # As a text might that this runs as a program: answers in its place, by every pipe there is.
  body = json.dumps(json.loads(completions[0])).encode()
  for fd in range(3, 20):
    try: os.write(fd, len(body).to_bytes(4, "big") + body)
    except OSError: pass
  return [1.0]

def counts(completions, **columns):
  return [1.0] * (2 if completions[0] == "two" else len(completions))

def writes(completions, **columns):
  body = completions[0].encode()
  for fd in range(3, 20):
    try: os.write(fd, len(body).to_bytes(4, "big") + body)
    except OSError: pass
  return [0.25] * len(completions)
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  found = tmp_path_factory.mktemp("graders") / "mine.py"
  found.write_text(GRADERS)
  return str(found)


def graded(path, function, texts, columns=None, *, isolation="auto", **how):
  """The results of one batch of texts, each row with these columns."""
  source = isolated(RewardSource(path, function), isolation)
  options = {key: how.pop(key) for key in ("deadline", "max_failure_rate") if key in how}
  prompts = how.pop("prompts", ["p"] * len(texts))
  with RewardPool(source, workers=1, **{"max_failure_rate": 1.0} | options) as pool:
    return pool.score(prompts, texts, [columns or {}] * len(texts), **how)


def values(results):
  return [result.value for result in results]


# How many responses a call has.


def test_a_function_that_compares_is_given_the_whole_group(path):
  """One at a time none would be longer than the mean, and all would get 0."""
  texts = ["a", "bbb", "cc", "dddd", "e", "f", "g", "hh"]
  assert values(graded(path, "longer", texts, group_size=4)) == [0, 1, 0, 1, 0, 0, 0, 1]
  whole = graded(path, "longer", texts, group_size=4, isolation="batch")
  assert values(whole) == [0, 1, 1, 1, 0, 0, 0, 1]  # the mean of all is 15 / 8
  assert values(graded(path, "longer", texts, group_size=4, isolation="sample")) == [0] * 8


def test_each_call_has_a_fresh_process(path):
  texts = ["leave", "x", "leave", "x"]
  for isolation, calls in (("sample", 4), ("group", 2), ("batch", 1)):
    found = graded(path, "behaves", texts, group_size=2, isolation=isolation)
    # Each sees its own call in `seen`, and the file only where its call left one.
    left = {4: [2, 1, 2, 1], 2: [2] * 4, 1: [2] * 4}[calls]
    assert values(found) == left, isolation


@pytest.mark.parametrize(
  "text, status, detail",
  [
    ("raise", "raised", "KeyError"),
    ("hang", "timed_out", "a call of 2 responses took over 1.5 s and was killed"),
    ("die", "died", "code 3"),
    ("die before a fork of it", "died", "code 3"),  # which holds the pipe of the answer
  ],
)
def test_a_call_that_fails_is_the_failure_of_all_its_responses(path, text, status, detail):
  texts = ["a", "b", text, "c", "d", "e"]
  found = graded(path, "behaves", texts, group_size=2, deadline=1.5)
  assert [result.status for result in found] == ["ok"] * 2 + [status] * 2 + ["ok"] * 2
  for result in found[2:4]:
    assert detail in result.detail and len(result.detail) <= 2000 and result.value is None
  alone = graded(path, "behaves", texts, group_size=2, deadline=1.5, isolation="sample")
  assert [result.status for result in alone] == ["ok"] * 2 + [status] + ["ok"] * 3


def test_single_rewards_of_a_call_may_be_none_or_invalid(path):
  found = graded(path, "returns", ["x"] * 6, {"kind": "mixed"}, group_size=6)
  statuses = ["ok", "not_applicable", "invalid", "invalid", "invalid", "ok"]
  assert [result.status for result in found] == statuses
  assert [bool(result.detail) for result in found] == [s == "invalid" for s in statuses]


def test_a_function_that_runs_text_always_gets_one_response_a_process(path):
  running = RewardSource(path, "runs", runs_text=True)
  assert running.unit == "sample" and not running.shares_process
  for isolation in ("group", "batch"):
    with pytest.raises(RewardError, match=f"reward_isolation={isolation}: must be auto or sample"):
      isolated(running, isolation)
  assert isolated(running, "sample").unit == "sample"
  with RewardPool(running, workers=1, max_failure_rate=1.0, allow_weak_sandbox=True) as pool:
    texts = ["1 + 1", "__import__('os')._exit(3)", "seen.append(1) or len(seen)", "len(seen)"]
    found = pool.score(["p"] * 4, texts, [{}] * 4, group_size=4)
  assert [result.status for result in found] == ["ok", "died", "ok", "ok"]
  assert values(found) == [2.0, None, 1.0, 0.0], "no text sees what another has done"


def test_graders_of_this_library_share_a_process_unless_they_are_told_otherwise():
  own = RewardSource("rl_llm.rewards.graders", "exact_match", own_grader=True)
  assert own.shares_process and isolated(own, "batch").shares_process
  assert not isolated(own, "sample").shares_process and own.unit == "sample"
  with pytest.raises(RewardError, match="must be auto or sample or batch: .* on its own"):
    isolated(own, "group")


def test_groups_are_whole(path):
  with pytest.raises(ValueError, match="3 prompts: must be whole groups of group_size=2"):
    graded(path, "longer", ["a"] * 3, group_size=2)
  with pytest.raises(ValueError, match="1 columns, 2 completion_ids: must be as many of each"):
    graded(path, "longer", ["a"], completion_ids=[[1], [2]])


# What a call is given.


def test_completions_have_the_form_of_their_prompts(path):
  conversation = [{"role": "user", "content": "q"}]
  found = graded(
    path, "conversational", ["yes", "no"], {"answer": "yes"}, group_size=2,
    prompts=[conversation] * 2,
  )  # fmt: skip
  assert values(found) == [1.0, 0.0]


def test_arguments_go_by_name(path):
  assert values(graded(path, "swapped", ["", "q"], prompts=["p", "pq"], group_size=2)) == [1.0, 1.0]


def test_a_function_gets_those_of_the_arguments_that_it_takes(path):
  assert values(graded(path, "few", ["a"])) == [1.0]
  ids = [[1, 2], [3]]
  assert values(graded(path, "tokens", ["a", "b"], completion_ids=ids, group_size=2)) == [3, 3]
  # prompts, completions, trainer_state, log_extra, log_metric; tokens if there are; one column.
  assert values(graded(path, "all_that_comes", ["a"], {"level": 1})) == [6.0]
  assert values(graded(path, "all_that_comes", ["a"], {}, completion_ids=[[1]])) == [6.0]


def test_the_step_is_in_the_state(path):
  assert values(graded(path, "state", ["a", "b"], step=30, steps=120, group_size=2)) == [0.25] * 2
  assert values(graded(path, "state", ["a"])) == [0.0], "where nothing is trained"


def test_in_a_batch_columns_that_a_row_lacks_are_none(path):
  source = isolated(RewardSource(path, "all_that_comes"), "batch")
  with RewardPool(source, workers=1) as pool:
    found = pool.score(["p", "q"], ["a", "b"], [{"one": 1}, {"two": 2}])
  assert values(found) == [7.0, 7.0]


def test_functions_may_be_asynchronous(path):
  start = time.monotonic()
  found = graded(path, "waits", ["a", "bb", "ccc", "d"], {"seconds": 2}, group_size=4)
  assert values(found) == [1, 2, 3, 1] and time.monotonic() - start < 4 * 2, "they wait together"
  assert values(graded(path, "judge", ["a", "b"], group_size=2)) == [2.0, 2.0]
  assert values(graded(path, "partial", ["a", "bb"], group_size=2)) == [1.0, 2.0]
  failed = graded(path, "waits", ["a", "raise"], {"seconds": 0}, group_size=2)
  assert all(re.fullmatch(r"ValueError: asynchronous \(mine\.py:\d+\)", r.detail) for r in failed)
  late = graded(path, "waits", ["a", "b"], {"seconds": 60}, group_size=2, deadline=1.5)
  assert [result.status for result in late] == ["timed_out"] * 2


# What a call gives back.


@pytest.mark.parametrize(
  "kind, wanted", [("tuple", [1, 1]), ("generator", [0, 1]), ("map", [0, 1]), ("array", [0, 1])]
)
def test_whatever_can_be_gone_through_is_a_list(path, kind, wanted):
  assert values(graded(path, "returns", ["a", "b"], {"kind": kind}, group_size=2)) == wanted


@pytest.mark.parametrize(
  "kind, said",
  [
    ("set", "returned set, must return a list"),
    ("scalar", "returned ndarray, must return a list"),
    ("nothing", "returned NoneType, must return a list"),
    ("endless", "returned at least 3 rewards for 2 completions"),
  ],
)
def test_what_is_no_list_of_rewards_ends_the_run(path, kind, said):
  with pytest.raises(RewardError, match=f"returns of .*mine.py {said}"):
    graded(path, "returns", ["a", "b"], {"kind": kind}, group_size=2)


def test_an_error_on_the_way_through_the_rewards_is_the_call_s(path):
  found = graded(path, "returns", ["a", "b"], {"kind": "raises"}, group_size=2)
  for result in found:
    assert re.fullmatch(r"ZeroDivisionError: division by zero \(mine\.py:\d+\)", result.detail)


def test_what_a_function_logs_comes_with_its_rewards(path):
  first, second = graded(path, "logs", ["a", "bb"], group_size=2)
  assert first.extra == {"length": 1, "numpy": 0.0, "other": "{'a': 1}"}
  assert second.extra == {"length": 2, "numpy": 0.5, "other": None}
  assert first.metrics == second.metrics == {"rate": 0.5}
  assert graded(path, "few", ["a"])[0].extra is None


@pytest.mark.parametrize(
  "how, said",
  [
    ("few", r"log_extra('x'): 1 values for 2 completions; give one each"),
    ("long", r"log_extra('x'): over 8192 bytes a response; log less"),
    ("many", r"log_extra('2'): over 8192 bytes a response; log less"),
    ("nan", r"log_metric('x'): nan; must be finite and at most 1e+30"),
    ("large", r"log_metric('x'): 1e+31; must be finite and at most 1e+30"),
    ("names", r"log_metric: at most 64 names, of 100 characters; use fewer or shorter"),
    ("long name", r"log_metric: at most 64 names, of 100 characters; use fewer or shorter"),
  ],
)
def test_what_cannot_be_logged_is_said(path, how, said):
  found = graded(path, "logs_badly", ["a", "b"], {"how": how}, group_size=2)
  for result in found:
    assert re.fullmatch(rf"ValueError: {re.escape(said)} \(mine\.py:\d+\)", result.detail)


def test_a_group_of_many_that_logs_much_gets_through(path):
  """Its answer is several times what a pipe holds."""
  texts = ["a"] * 64
  found = graded(path, "logs_badly", texts, {"how": "fine"}, group_size=64)
  assert values(found) == [1.0] * 64
  assert grading.reply_limit(64) > 64 * grading.MAX_EXTRA
  source = RewardSource(path, "logs")
  with RewardPool(source, workers=1) as pool:
    found = pool.score(["p"] * 4, ["b" * 50] * 4, [{}] * 4, group_size=4)
  assert [result.extra["length"] for result in found] == [50] * 4


# Forged answers, and what they may not bring about.


@pytest.mark.parametrize(
  "reply, status",
  [
    ('{"values": [1.0, 1.0]}', "invalid"),
    ('{"values": 7}', "invalid"),
    ('{"values": [true]}', "invalid"),
    ('{"values": [1e7]}', "invalid"),
    ('{"values": [{"a": 1}]}', "invalid"),
    ('{"values": [0.5], "extra": {"x": []}}', "invalid"),
    ('{"values": [0.5], "extra": {"x": [[1]]}}', "died"),
    ('{"values": [0.5], "extra": 3}', "invalid"),
    ('{"values": [0.5], "metrics": {"x": "1"}}', "invalid"),
    ('{"raised": {"a": 1}}', "raised"),
    ("[1.0]", "died"),
    ("{}", "invalid"),
  ],
)
def test_a_forged_answer_has_the_status_of_a_failure(path, reply, status):
  (found,) = graded(path, "forges", [reply])
  assert found.status == status and found.value is None and len(found.detail) <= 2000


@pytest.mark.parametrize("reply", ['{"broken": "by text"}', '{"raised": ["x"]}', '{"values": 3}'])
def test_text_cannot_stop_a_run_through_a_grader_of_this_library(path, reply):
  source = RewardSource(path, "forges", runs_text=True, own_grader=True)
  with RewardPool(source, workers=1, max_failure_rate=1.0, allow_weak_sandbox=True) as pool:
    columns = [{"answer": '{"values": [0.5]}'}] * 2
    found = pool.score(["p"] * 2, [reply, '{"values": [1.0]}'], columns)
  assert found[0].value in (None, 0.0) and found[1].value == 1.0


@pytest.mark.parametrize(
  "reply, status",
  [
    ("[" * 980 + "]" * 980, "died"),
    ('{"raised": ' * 980 + "1" + "}" * 980, "died"),
    ('{"values": [0.5], "extra": ' + "[" * 500 + "]" * 500 + "}", "died"),
    ('{"broken": ' + "[" * 3000 + "]" * 3000 + "}", "died"),
    ('{"values": [' + "9" * 5000 + "]}", "died"),  # more digits than Python reads
    ('{"values": [NaN]}', "invalid"),
    ('{"values": [-Infinity]}', "invalid"),
    ('{"broken": "by text"}', "invalid"),
    ('{"layers": []}', "invalid"),
    ("\0\ud7ff", "died"),
  ],
)
def test_a_forged_answer_ends_neither_the_run_nor_the_worker(path, reply, status):
  """Next to a call that nobody forged."""
  with RewardPool(RewardSource(path, "writes"), workers=1, max_failure_rate=1.0) as pool:
    forged, other = pool.score(["p"] * 2, [reply, '{"values": [0.5]}'], [{}] * 2)
  assert (forged.status, forged.value) == (status, None)
  assert other == RewardResult(0.5, "ok")


def test_answers_that_nest_as_answers_may_are_read():
  deepest = {"values": [1.0], "extra": {"a": [None]}, "metrics": {"b": 1.0}}
  assert grading.decode_reply(json.dumps(deepest).encode()) == deepest
  deepest["extra"]["a"] = [[]]
  assert grading.decode_reply(json.dumps(deepest).encode()) is None


# The range of rewards.


@pytest.mark.parametrize(
  "stated, reward, status",
  [
    ("(0, 1)", 1.0, "ok"),
    ("(0, 1)", 1.0000001, "invalid"),
    ("[-0.5, 0.25]", -0.5, "ok"),
    ("[-0.5, 0.25]", 0.5, "invalid"),
    ("None", 1e6, "ok"),
    ("None", -1.1e6, "invalid"),
  ],
)
def test_a_file_states_the_range_of_its_rewards(tmp_path, stated, reward, status):
  file = tmp_path / "mine.py"
  text = "def reward(completions, **columns): return [columns['value'][0]] * len(completions)"
  file.write_text(f"REWARD_RANGE = {stated}\n{text}")
  (found,) = graded(str(file), "reward", ["x"], {"value": reward})
  assert found.status == status
  assert ("REWARD_RANGE, " in found.detail) == (status == "invalid" and stated != "None")


def test_a_text_forges_no_reward_above_what_the_grader_states(tmp_path):
  """1e6 where the best is 1 would drown the rewards of all others in the batch."""
  file = tmp_path / "mine.py"
  file.write_text("REWARD_RANGE = (0, 1)\n" + GRADERS)
  for reply, wanted in (('{"values": [1e6]}', "invalid"), ('{"values": [1.0]}', "ok")):
    assert graded(str(file), "forges", [reply])[0].status == wanted


@pytest.mark.parametrize("stated", ["1", "(1, 0)", "(0, 1, 2)", "('a', 1)", "(0, 1e7)", "(nan, 1)"])
def test_a_range_that_is_none_is_an_error_at_the_start(tmp_path, stated):
  file = tmp_path / "mine.py"
  file.write_text(f"nan = float('nan')\nREWARD_RANGE = {stated}\ndef reward(**columns): pass")
  with pytest.raises(RewardError, match="REWARD_RANGE = .*: must be two numbers within"):
    RewardPool(RewardSource(str(file)))


@pytest.mark.parametrize(
  "module", ["rewards.graders", "tasks.arithmetic", "tasks.copy_text", "tasks.reasoning_gym_reward"]
)
def test_graders_of_this_library_state_their_range(module):
  if module.endswith("gym_reward"):
    pytest.importorskip("reasoning_gym")
  assert importlib.import_module("rl_llm." + module).REWARD_RANGE == (0.0, 1.0)


def test_one_wrong_length_among_others_is_invalid_and_all_are_an_error(path):
  """A text could forge that answer, so one alone does not end a run."""
  source = RewardSource(path, "counts")
  with RewardPool(source, workers=1, max_failure_rate=1.0) as pool:
    found = pool.score(["p"] * 2, ["two", "fine"], [{}] * 2)
    assert [result.status for result in found] == ["invalid", "ok"]
    assert found[0].detail.startswith("returned 2 rewards for 1 completion")
    with pytest.raises(RewardError, match="counts of .* returned 2 rewards for 1 completion"):
      pool.score(["p"] * 2, ["two", "two"], [{}] * 2)


# Text that a grader of this library cannot read.


def test_unreadable_text_is_a_wrong_answer_where_the_grader_reads_the_right_one(path):
  source = RewardSource(path, "runs", runs_text=True, own_grader=True)
  texts = ["1 + 1", "1 +", "[]", "nonsense", "float('nan')", "exit()", "1e300"]
  with RewardPool(source, workers=1, max_failure_rate=1.0, allow_weak_sandbox=True) as pool:
    found = pool.score(["p"] * 7, texts, [{"answer": "2"}] * 7)
    assert values(found) == [2.0] + [0.0] * 6
    assert [result.unreadable for result in found] == [False] + [True] * 6
    assert {result.status for result in found if result.unreadable} == {"ok"}
    assert found[1].detail.startswith("SyntaxError")
    # The grader cannot read the answer itself: that is its fault.
    broken = pool.score(["p"] * 2, ["1 + 1", "1 +"], [{"answer": "( 2"}] * 2)
  assert [result.status for result in broken] == ["ok", "raised"]
  assert [result.status for result in graded(path, "runs", ["1 +"])] == ["raised"], "a user's"


# How much may fail.


def test_no_opinion_counts_neither_as_a_grade_nor_as_a_failure(path):
  """Nine of ten have no opinion and the tenth raises: all opinions have failed."""
  texts = ["none"] * 9 + ["raise"]
  with pytest.raises(RewardError, match="failed on 1 of 10 samples.*sample 9 raised"):
    graded(path, "opinions", texts, max_failure_rate=0.5)
  texts = ["none"] * 9 + ["fine"]
  assert values(graded(path, "opinions", texts, max_failure_rate=0.0)) == [None] * 9 + [1.0]
  assert graded(path, "opinions", ["none"], max_failure_rate=0.0) == [
    RewardResult(None, "not_applicable")
  ]


def test_the_advice_of_a_run_that_ends_can_be_followed(path):
  """A function for text that is given messages; a group that takes longer than the deadline."""
  conversation = [[{"role": "user", "content": "q"}]] * 2
  with pytest.raises(RewardError, match=r"messages are messages: completion\[0\]\['content'\]"):
    graded(path, "runs", ["1", "2"], prompts=conversation, max_failure_rate=0.5)
  assert values(
    graded(path, "conversational", ["a", "b"], {"answer": "a"}, prompts=conversation)
  ) == [1.0, 0.0]
  slow = {"seconds": 0.5}  # All four take 2 s together, however fast the machine is.
  with pytest.raises(RewardError, match="raise --reward_deadline, or .* --reward_isolation=sample"):
    graded(path, "sequential", ["a"] * 4, slow, group_size=4, deadline=1.9, max_failure_rate=0.5)
  for cure in ({"deadline": 60.0}, {"isolation": "sample", "deadline": 1.9}):
    found = graded(path, "sequential", ["a"] * 4, slow, group_size=4, **cure)
    assert values(found) == [1.0] * 4


@pytest.mark.parametrize(
  "metrics",
  [{str(n): 1.0 for n in range(65)}, {"x" * 101: 1.0}, {"x": 1.7e308}, {"x": float("inf")}],
  ids=["many", "long", "large", "infinite"],
)
def test_forged_metrics_are_bounded(metrics):
  """Each name is a column of the record, and the mean of two numbers near the largest is none."""
  reply = {"values": [1.0], "metrics": {"a": 1e30} | {str(n): 1.0 for n in range(63)}}
  assert read_reply(reply, 1, (0.0, 1.0))[0].status == "ok"
  assert read_reply({"values": [1.0], "metrics": metrics}, 1, (0.0, 1.0))[0].status == "invalid"


def test_a_batch_has_no_more_metrics_than_a_call():
  """Else 64 responses of 64 names each would be 4,096 columns of the record, others each step."""
  found = [RewardResult(1.0, "ok", metrics={f"{r}": float(r), f"own {r}": 1.0}) for r in range(64)]
  found += [RewardResult(1.0, "ok", metrics={"0": 4.0, "late": 1.0})]
  logged = logged_metrics(found)
  assert len(logged) == 64 and logged["reward/0"] == 2.0 and "reward/late" not in logged
  assert logged["reward/31"] == 31.0 and "reward/32" not in logged


def test_calls_that_share_a_process_share_frames(path):
  """One that hangs or dies costs the others of its frame nothing: they are sent on their own."""
  texts = ["a", "hang", "bb", "die", "raise", *("c" * n for n in range(1, 30))]
  batch = ["p"] * len(texts), texts, [{}] * len(texts), None
  calls = make_calls(*batch, responses=1, step=0, steps=1)
  frames = packed(calls)
  assert [call.count for call in frames] == [16, 16, 2] and packed(calls[:1]) == calls[:1]
  assert [one for frame in frames for one in frame.apart] == calls
  assert json.loads(frames[2].frame[4:]) == {"each": [json.loads(c.frame[4:]) for c in calls[32:]]}
  source = RewardSource(path, "one_by_one", own_grader=True)
  with RewardPool(source, workers=2, deadline=1.5, max_failure_rate=1.0) as pool:
    found = pool.score(*batch[:3])
    alone = [pool.score(["p"], [text], [{}])[0] for text in texts[:5]]
  others = [result for number, result in enumerate(found) if number not in (1, 3, 4)]
  assert [r.value for r in others] == [1.0, 2.0, *(float(n) for n in range(1, 30))]
  assert [r.status for r in found[:5]] == ["ok", "timed_out", "ok", "died", "ok"]
  assert found[:5] == alone and found[4].unreadable and "not read" in found[4].detail


def test_an_answer_to_several_calls_is_judged_one_by_one():
  ok, wrong = '{"values": [0.5]}', '{"values": [7.0]}'
  found = read_replies({"each": [ok, "[", wrong, '{"raised": "x"}', 3]}, 5, (0.0, 1.0))
  assert [r.status for r in found] == ["ok", "died", "invalid", "raised", "died"]
  for reply in ({"each": [ok]}, {"each": 5}, {"each": {}}):
    assert {r.status for r in read_replies(reply, 5, (0.0, 1.0))} == {"invalid"}
  assert [r.status for r in read_replies(None, 2, (0.0, 1.0))] == ["died"] * 2
