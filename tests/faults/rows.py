"""The rows of the fault table: what is done to a run, and the tests that do it.

A test counts as one trial. One that does several says so, for the row that it belongs to, by
`record_property("F8", 200)`.
"""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
  """A fault: what is done, when that is survived, by which tests, and how many trials are asked."""

  name: str
  fault: str
  survived: str
  tests: tuple[str, ...]  # node ids without parameters, relative to tests/
  asked: int = 1
  only: str = ""  # of their parameters, as pytest's -k
  devices: int = 1  # virtual devices of the CPU


TRAINING, RUNS = "faults/test_training.py", "faults/test_runs.py"
CHECKPOINT, GRPO = "test_checkpoint.py", "experiments/test_grpo.py"
POOL, CALLS, ESCAPES = "rewards/test_pool.py", "rewards/test_calls.py", "rewards/test_escapes.py"
HOSTS, SEVERAL = "test_hosts.py", "test_several_hosts.py"
LOCAL, CONFIG, HOSTILE = "launch/test_local.py", "test_config.py", "test_hostile_files.py"
WEIGHTS, TEMPLATE = "policy/test_weights.py", "test_chat_template.py"
GYM = "tasks/test_reasoning_gym.py"


def of(path: str, *names: str) -> tuple[str, ...]:
  """Node ids of tests in one file."""
  return tuple(f"{path}::test_{name}" for name in names)


ROWS = (
  Row(
    "F1",
    "SIGKILL at random moments of a run, restarted each time",
    "weights, metrics and samples are bit for bit those of an uninterrupted run",
    of(GRPO, "interrupted_runs_end_as_an_uninterrupted_one")
    + of(RUNS, "killed_at_random_moments_a_run_ends_as_one_that_was_not"),
    50,
  ),
  Row(
    "F2",
    "SIGKILL 0 to 50 ms after a save begins",
    "the newest finished step loads",
    of(CHECKPOINT, "sigkill_inside_a_save_loses_nothing_finished"),
    30,
  ),
  Row(
    "F3",
    "SIGTERM at random steps",
    "exit code 143, the step in flight is saved, the end is bit for bit the same",
    of(GRPO, "interrupted_runs_end_as_an_uninterrupted_one")
    + of(RUNS, "stopped_at_random_steps_a_run_saves_the_step_in_flight"),
    20,
  ),
  Row(
    "F4",
    "SIGTERM to one of two processes",
    "both save the same step, and the run resumes",
    of(HOSTS, "a_signal_to_one_stops_all_at_the_same_step")
    + of(SEVERAL, "a_signal_to_one_stops_both_and_the_run_goes_on"),
    5,
  ),
  Row(
    "F5",
    "resume on other devices: from 1 to 2, 4 and 8, and back",
    "weights equal bit for bit; the next steps move as they would, within 1e-3",
    of(
      "eight_devices/test_experiments.py",
      "a_state_is_the_same_bits_on_any_number_of_devices",
      "a_run_goes_on_with_other_devices",
    ),
    5,
    devices=8,
  ),
  Row(
    "F6",
    "each algorithm stopped or killed at three points",
    "bit for bit the uninterrupted run",
    of("experiments/test_resume.py", "a_run_stopped_three_times_ends_as_one_that_was_not"),
    12,
  ),
  Row(
    "F7",
    "checkpoints and runs of earlier formats, and of a later one",
    "loads, or is refused in one line",
    of(
      CHECKPOINT,
      "format_1_still_loads",
      "a_later_format_is_refused_in_one_line_and_not_passed_over",
    )
    + of("experiments/test_old_runs.py", "an_old_run_resumes"),
    1,
  ),
  Row(
    "F8",
    "one bit of a checkpoint's file flipped",
    "detected before use; the earlier step is read",
    of(CHECKPOINT, "every_flipped_bit_is_detected"),
    200,
  ),
  Row(
    "F9",
    "each file of a checkpoint cut, or deleted",
    "detected, said once; the earlier step is read",
    of(CHECKPOINT, "every_missing_or_short_file_is_detected_and_told_once")
    + of(CHECKPOINT, "a_damaged_step_is_replaced_and_never_counts_as_kept"),
    2,
  ),
  Row(
    "F10",
    "junk in the directory of checkpoints: numbers, files, links in a loop",
    "ignored; the newest step is right",
    of(CHECKPOINT, "junk_is_ignored", "a_renamed_step_is_refused"),
  ),
  Row(
    "F11",
    "the disk is full",
    "one clear line; earlier checkpoints intact, no half step listed",
    of(CHECKPOINT, "full_and_read_only_disks_leave_the_earlier_steps")
    + of(RUNS, "a_disk_that_fills_up_ends_a_run_in_one_line")
    + of("test_writing.py", "a_disk_that_fills_up_during_a_record"),
  ),
  Row(
    "F12",
    "the directory becomes read-only, or vanishes in the middle of a run",
    "an error that names the path, within one save",
    of(CHECKPOINT, "full_and_read_only_disks_leave_the_earlier_steps")
    + of(CHECKPOINT, "a_vanished_directory_is_named")
    + of(RUNS, "checkpoints_that_vanish_are_named_at_the_next_save")
    + of("test_writing.py", "a_directory_that_is_read_only_or_full_at_the_end"),
    2,
  ),
  Row(
    "F13",
    "a checkpoint of another model: shape, dtype, missing and extra leaves",
    "refused, with up to ten paths",
    of(CHECKPOINT, "another_model_is_refused_with_the_leaves_that_differ")
    + of(CHECKPOINT, "no_dtype_is_converted"),
    4,
  ),
  Row(
    "F14",
    "200 saves of a state of 50 MB; 5,000 steps with a save every 10",
    "memory grows by less than a tenth after 20 saves, by less than 8 MB in 1,000 steps",
    of(CHECKPOINT, "saving_again_and_again_does_not_grow")
    + of(RUNS, "five_thousand_steps_grow_little_and_leave_nothing"),
    200,
  ),
  Row(
    "F15",
    "NaN in the gradient at random steps",
    "skipped on the device and counted; weights finite, moments unchanged",
    of(GRPO, "an_update_that_is_not_finite_is_skipped_and_counted")
    + of("test_update.py", "a_gradient_that_is_not_finite_changes_nothing_and_is_counted"),
    5,
  ),
  Row(
    "F16",
    "NaN at every step from one on",
    "stops, names the first bad leaf; no NaN is saved",
    of(
      GRPO,
      "three_in_a_row_stop_the_run_with_a_diagnosis",
      "the_update_itself_says_which_leaf_was_not_finite",
    )
    + of(CHECKPOINT, "nonfinite_state_is_refused"),
  ),
  Row(
    "F17",
    "one batch whose loss is a million times too large",
    "skipped by the guard; the run ends where one without that batch does",
    of(TRAINING, "a_spike_is_skipped_and_the_run_recovers")
    + of(
      "test_spikes.py",
      "a_spike_moves_nothing_and_training_recovers",
      "moments_stay_and_a_nan_is_no_spike",
    ),
  ),
  Row(
    "F18",
    "degenerate groups: equal rewards, alone, empty, masked, all truncated",
    "finite; advantages 0; frac_zero_std is 1; one warning",
    of(TRAINING, "degenerate_groups_teach_nothing_and_are_said_once")
    + of("test_warnings.py", "groups_without_spread_are_said_once")
    + of("test_advantages.py", "equal_and_empty_groups_are_exactly_zero_everywhere"),
    5,
  ),
  Row(
    "F19",
    "log-probs of -1e4 and ratios of exp(100), also in bfloat16",
    "losses and gradients are finite",
    of("losses/test_battery.py", "battery") + of("losses/test_modes.py", "no_nan_on_the_way"),
    1,
    only="extremes or mask or bfloat16 or no_nan",
  ),
  Row(
    "F20",
    "odd rewards: NaN, infinite, None, text, 1e30, the wrong number of them",
    "each by its rule, and counted",
    of(POOL, "rule_for_each_kind_of_reward", "wrong_length_is_an_error_that_names_the_function")
    + of(CALLS, "a_text_forges_no_reward_above_what_the_grader_states"),
    8,
  ),
  Row(
    "F21",
    "the grader raises, on some calls and on most",
    "counted and left out; over half of a batch ends the run",
    of(GRPO, "failed_grades_are_masked_out_and_counted", "a_grader_that_always_fails_stops_the_run")
    + of(POOL, "too_many_failures_stop_the_run"),
  ),
  Row(
    "F22",
    "the grader hangs: loops, sleeps, a power, a regex, deaf to signals",
    "ended at the deadline, at no cost to the others; the pool is full again",
    of(POOL, "hangs_cost_no_other_sample")
    + of(POOL, "with_spares_hangs_cost_one_deadline_and_without_one_after_another"),
    8,
  ),
  Row(
    "F23",
    "the grader takes 4 GB, forks 1,000 times, exits, crashes",
    "its worker is replaced; the trainer does not grow",
    of(
      POOL,
      "a_failure_has_a_status_and_a_bounded_reason",
      "fork_bomb_and_orphans_end_with_their_sample",
      "the_trainer_does_not_grow",
    )
    + of("rewards/test_memory.py", "forks_are_counted_together"),
    4,
  ),
  Row(
    "F24",
    "9 payloads in the 9 kinds of reasoning-gym that evaluate the response",
    "no file outside, no connection of any family",
    of(GYM, "payloads_stay_inside", "a_payload_really_runs_there"),
    54,
  ),
  Row(
    "F25",
    "166 hostile responses in each situation of docs/security.md",
    "nothing gets through a layer that is there",
    of(
      ESCAPES,
      "nothing_gets_through_a_layer_that_is_there",
      "the_outside_saw_nothing",
      "a_grader_that_runs_text_is_refused_where_network_or_files_are_open",
    ),
  ),
  Row(
    "F26",
    "512 answers to arithmetic, graded by this library in batches",
    "over 200 a second on two cores; less than 5 ms of processor time each",
    of(TRAINING, "own_graders_are_fast"),
    512,
  ),
  Row(
    "F27",
    "100 of 10,000 rows of a file are broken in ten ways",
    "strict: file and line are named; lenient: dropped and counted exactly",
    of(RUNS, "broken_rows_are_named_or_counted"),
    100,
  ),
  Row(
    "F28",
    "settings at random, of every experiment",
    "fine, or one line that names the setting; nothing compiles",
    of(RUNS, "any_text_for_any_flag_is_fine_or_named")
    + of(CONFIG, "each_mistake_is_one_line_and_exit_code_2")
    + of("experiments/test_command_line.py", "one_clear_line_and_exit_code_2"),
    500,
  ),
  Row(
    "F29",
    "hostile directories of weights: headers, overlaps, paths, links",
    "refused; nothing outside is read",
    of(
      WEIGHTS,
      "hostile_safetensors_header",
      "nothing_outside_the_directory_is_read",
      "config_link_outside_is_refused",
      "truncated_safetensors",
      "bad_weight_map",
      "missing_files",
    )
    + of(
      HOSTILE,
      "counts_are_compared_with_the_files_before_anything_is_made",
      "no_file_of_a_tokenizer_leads_outside",
      "counts_in_a_gguf_header",
    ),
    6,
  ),
  Row(
    "F30",
    "hostile chat templates",
    "blocked, or cut at 2 s and 1 MB; no attribute is reached",
    of(
      TEMPLATE,
      "hostile_template_is_stopped_within_its_limits",
      "unsafe_attribute_that_is_only_printed_is_nothing",
      "bound_on_output_is_exact",
    ),
    11,
  ),
  Row(
    "F31",
    "pickles, and code that would load or evaluate what it reads",
    "none in rl_llm/ and launch/; a pickle in a file of ours runs nothing",
    of("test_layers.py", "nothing_loaded_is_run", "the_safety_rule_itself")
    + of("test_reference_cache.py", "a_file_with_a_right_checksum_around_a_pickle_runs_nothing"),
  ),
  Row(
    "F32",
    "credentials in the environment, on the command line, in the config",
    "none in any file of the run, or on its terminal",
    of(RUNS, "credentials_are_nowhere_in_what_a_run_leaves")
    + of(CONFIG, "secrets_are_redacted_wherever_a_config_is_written_or_shown")
    + of(CONFIG, "secrets_of_other_shapes", "values_of_secret_variables"),
    3,
  ),
  Row(
    "F33",
    "kill -9 of one of two processes",
    "the other ends within its bound, and names it",
    of(HOSTS, "the_death_of_one_ends_the_other_which_names_it"),
    2,
  ),
  Row(
    "F34",
    "one process has another seed, setting, data, directory or code",
    "refused at the start by all; both are named",
    of(HOSTS, "processes_that_differ_are_refused_alike", "a_run_compares_settings_files_and_code")
    + of(
      SEVERAL,
      "other_settings_are_refused_at_the_start_of_all",
      "each_with_a_directory_of_its_own_is_refused",
    ),
    4,
  ),
  Row(
    "F35",
    "one process comes 30 s late to a barrier of 5 s",
    "a bounded wait that names the late one",
    of(
      HOSTS,
      "who_is_late_is_named",
      "a_process_that_never_comes_is_waited_for_no_longer_than_allowed",
    ),
  ),
  Row(
    "F36",
    "the launcher of a sweep is killed ten times",
    "each trial runs to its end exactly once; one table",
    of(LOCAL, "a_launcher_killed_again_and_again_does_each_trial_exactly_once"),
    10,
  ),
  Row(
    "F37",
    "two launchers begin one sweep at once",
    "no trial runs twice",
    of(LOCAL, "two_launchers_at_once_never_run_a_trial_twice"),
    20,
  ),
  Row(
    "F38",
    "trials run out of memory, fail, hang",
    "tried again, then told with their last lines; the others end",
    of(
      LOCAL,
      "what_fails_is_tried_again_and_then_told_with_its_last_lines",
      "what_hangs_is_ended_also_if_it_ignores_being_asked",
      "what_fails_once_gets_done",
    ),
    3,
  ),
  Row(
    "F39",
    "the clock jumps; metrics.jsonl is cut in a line; its directory is deleted",
    "no longer wait, the line is repaired, no crash",
    of(LOCAL, "no_clock_makes_a_wait_longer_than_it_was")
    + of(
      "test_metrics.py",
      "opening_repairs_a_cut_last_line_and_drops_later_steps",
      "killed_and_resumed_the_record_equals_an_uninterrupted_one",
    )
    + of(RUNS, "a_record_that_vanishes_ends_a_run_in_one_line"),
    3,
  ),
  Row(
    "F40",
    "300 steps of changing lengths",
    "one compilation a shape; nothing goes to the devices or back unasked",
    of(GRPO, "one_compilation_a_shape_over_ragged_steps")
    + of(TRAINING, "an_update_transfers_nothing_unasked"),
    300,
  ),
)
