"""Every check of the battery on every public loss."""

import pytest

from tests.losses import battery


def test_no_loss_is_forgotten():
  assert battery.defined() == {name for name in battery.PUBLIC if name.endswith("_loss")}


# Of what compiles programs of its own, and depends on the checks that a family shares.
FIRST_OF_FAMILY = {
  "check_jit_changes_nothing",
  "check_bfloat16_is_computed_in_float32",
  "check_settings_may_be_traced_and_vmapped_and_do_not_recompile",
}
FIRST = {loss.__module__: name for name, loss in reversed(battery.PUBLIC.items())}.values()


@pytest.mark.parametrize(
  ("check", "loss"),
  [
    pytest.param(
      check,
      loss,
      marks=() if check not in FIRST_OF_FAMILY or loss in FIRST else pytest.mark.slow,
      id=f"{check}-{loss}",
    )
    for check in battery.CHECKS
    for loss in battery.PUBLIC
  ],
)
def test_battery(check, loss):
  battery.CHECKS[check](loss)
