"""What a person can put right, told in one line without a traceback."""


class UserError(Exception):
  """A setting, a file or a device that cannot be used; the message names it and the fix.

  Every error of this kind in the library derives from it, so that a command, a launcher or another
  project catches one class: `error: ...` and exit code 2, instead of a traceback.
  """
