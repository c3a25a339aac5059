"""Which of many cases of one kind `make test` runs; `make test-slow` runs the others."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def mostly_slow(cases: Iterable[Any], *, quick: Collection[int]) -> list[Any]:
  """The cases of a parametrization; those whose place is not in `quick` are marked slow.

  >>> [bool(case.marks) for case in mostly_slow("abc", quick=[1])]
  [True, False, True]

  Args:
    cases: values, tuples of values for several names, or what `pytest.param` gives.
    quick: the places, from 0, of the representatives: one for each kind of case.
  """
  found = []
  for place, case in enumerate(cases):
    marks = () if place in quick else (pytest.mark.slow,)
    if isinstance(case, type(pytest.param())):
      found.append(pytest.param(*case.values, marks=(*case.marks, *marks), id=case.id))
    else:
      values = case if isinstance(case, tuple) else (case,)
      found.append(pytest.param(*values, marks=marks))
  return found
