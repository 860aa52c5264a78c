"""The `sparseffn` command: a thin layer over functions that notebooks call too. Nobody imports it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from sparseffn.cli.parse import run
from sparseffn.cli.process import keep_freed_memory, write_any_text
from sparseffn.errors import Interrupted, UnmatchedError, UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0; 1 where a check failed, sizes cannot be matched, or nobody reads the output any more; 2 for input that cannot be used;
    130 when interrupted, 143 when terminated.
    """
    write_any_text()
    keep_freed_memory()
    try:
        code = run(sys.argv[1:] if arguments is None else arguments)
        # Here, not when the interpreter ends: a reader that has gone is dealt with below.
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"sparseffn: {error}", file=sys.stderr)
        return 1 if isinstance(error, UnmatchedError) else 2
    except BrokenPipeError:
        # Nobody reads on, as after `| head`: there is nothing to report, and the interpreter must not try again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        print(
            f"sparseffn: {error.strerror or error}{where}; fix: check the path, its rights and the disk",
            file=sys.stderr,
        )
        return 2
    except Interrupted as error:
        print(f"sparseffn: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(
            "sparseffn: interrupted; the same command begins again, a run at its last checkpoint where it has one",
            file=sys.stderr,
        )
        return 130
