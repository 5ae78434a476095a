"""What the processes of `tests.processes` need, imported once."""

import evaluate  # noqa: F401
import predict  # noqa: F401
import process_group  # noqa: F401
import train  # noqa: F401
