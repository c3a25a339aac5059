"""Where the first of several processes listens for the others.

JAX's coordination service has no password: whoever reaches its port can join a run. Left alone it
listens on every interface of the machine, also where the others come from this machine only.
"""

from __future__ import annotations

import socket

from rl_llm.errors import ConfigError

EVERYWHERE = "[::]"


def bind_address(coordinator: str, bind: str) -> str:
  """HOST:PORT to listen on: the coordinator's own address if it is one of this machine's.

  >>> bind_address("127.0.0.1:1234", ""), bind_address("127.0.0.1:1234", "0.0.0.0")
  ('127.0.0.1:1234', '0.0.0.0:1234')

  A name that leads elsewhere, as behind a router, is listened for everywhere:

  >>> bind_address("192.0.2.1:1234", "")
  '[::]:1234'

  Args:
    coordinator: HOST:PORT at which the others look for it.
    bind: the address to listen on; "" finds it.

  Raises:
    ConfigError: the coordinator has no port, or `bind` is no address of this machine.
  """
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
    raise ConfigError("distributed.coordinator", coordinator, "HOST:PORT of process 0")
  found = _own_addresses(bind or host.strip("[]"))
  if bind and not found:
    raise ConfigError(
      "distributed.bind", bind, "an address of this machine", "0.0.0.0 is all of them"
    )
  return f"{found[0] if found else EVERYWHERE}:{port}"


def _own_addresses(host: str) -> list[str]:
  """The addresses of a name that this machine has, those of IPv4 first."""
  try:
    known = socket.getaddrinfo(host.strip("[]"), 0, type=socket.SOCK_STREAM)
  except OSError:
    return []
  found = []
  for family, _, _, _, address in sorted(known):  # AF_INET is below AF_INET6.
    with socket.socket(family, socket.SOCK_STREAM) as probe:
      try:
        probe.bind((address[0], 0, *address[2:]))
      except OSError:
        continue
    found.append(f"[{address[0]}]" if family == socket.AF_INET6 else address[0])
  return found
