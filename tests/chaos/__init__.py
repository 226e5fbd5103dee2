"""Real processes, real servers, real faults: see ``python -m tests.chaos --help``."""
