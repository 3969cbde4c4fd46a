"""Take every figure, one benchmark after the other: `python -m bench`. Wants a quiet machine."""

from __future__ import annotations

import subprocess
import sys

from bench.figures import all_figures
from bench.harness import tell


def main() -> int:
    """Run each command once; returns how many could not be taken."""
    failed = 0
    for command in dict.fromkeys(figure.command for figure in all_figures()):
        tell(f"== {command}")
        arguments = command.split()[1:]
        failed += subprocess.run([sys.executable, *arguments], check=False).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
