"""The `sparseffn` command: a thin layer over functions that notebooks call too. Nobody imports it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from sparseffn.cli.memory import keep_freed_memory
from sparseffn.cli.parser import build_parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0; 1 where a check failed or nobody reads the output any more; 2 for input that cannot be used; 130 when interrupted.
    """
    # Imported here so that `sparseffn --help` answers without waiting for PyTorch.
    from sparseffn.errors import UserError

    options = build_parser().parse_args(arguments)
    keep_freed_memory()
    try:
        code = options.run(options)
        # Here, not when the interpreter ends: a reader that has gone is dealt with below.
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"sparseffn: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Nobody reads on, as after `| head`: nothing to be told, and the interpreter must not try again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        print(
            f"sparseffn: {error.strerror or error}{where}; fix: check the path, its rights and the disk",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("sparseffn: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
