"""Exit codes that no error class has."""

INTERRUPTED = 130
BROKEN_PIPE = 141
