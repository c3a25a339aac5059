"""What a comparison is made of."""

from typing import Any, NamedTuple


class Case(NamedTuple):
  """What `f`, made with our function `name`, must give.

  Fields:
    system, golden: whose, and which.
    trained: name of the golden's gradient and array to differentiate by; None for constants.
    where: what is compared; True is everything.
    value: False if only the gradient is meant to be equal.
  """

  name: str
  system: str
  golden: str
  f: Any
  trained: tuple[str, Any] | None = None
  where: Any = True
  value: bool = True
