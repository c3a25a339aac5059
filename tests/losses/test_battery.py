"""Every check of the battery on every public loss."""

import pytest

from tests.losses import battery


def test_no_loss_is_forgotten():
  assert battery.defined() == {name for name in battery.PUBLIC if name.endswith("_loss")}


@pytest.mark.parametrize("loss", battery.PUBLIC)
@pytest.mark.parametrize("check", battery.CHECKS)
def test_battery(check, loss):
  battery.CHECKS[check](loss)
