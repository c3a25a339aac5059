"""`--env=calculator`: arithmetic for models that cannot multiply."""

from __future__ import annotations

import ast
import operator

_LARGEST = 10**30
_BINARY = {
  ast.Add: operator.add,
  ast.Sub: operator.sub,
  ast.Mult: operator.mul,
  ast.Div: operator.truediv,
  ast.FloorDiv: operator.floordiv,
  ast.Mod: operator.mod,
}


class Calculator:
  """Whole numbers and decimals, + - * / // % and brackets."""

  def reset(self, **columns) -> str | None:
    return None

  def calculate(self, expression: str) -> str:
    """Computes a number.

    Args:
      expression: What to compute, such as 12*34.
    """
    if len(expression) > 200:
      raise ValueError("the expression is longer than 200 characters")
    try:
      tree = ast.parse(expression.strip().replace("×", "*").replace("^", "**"), mode="eval")
    except SyntaxError:
      raise ValueError(f"cannot read {expression!r}; write such as 12*34") from None
    value = _value(tree.body)
    return str(int(value)) if value == int(value) else f"{value:.10g}"


def _value(node: ast.expr) -> int | float:
  """The number that an expression is."""
  if isinstance(node, ast.Constant) and type(node.value) in (int, float):
    value = node.value
  elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
    value = _value(node.operand)
    value = -value if isinstance(node.op, ast.USub) else value
  elif isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
    value = _BINARY[type(node.op)](_value(node.left), _value(node.right))
  else:
    raise ValueError("only numbers, + - * / // % and brackets")
  if not abs(value) <= _LARGEST:
    raise ValueError("the number is too large")
  return value
