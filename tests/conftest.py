"""What every test may rely on."""

from hypothesis import settings

# A machine that is busy, or compiles on a first call, is not a failing test.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")
