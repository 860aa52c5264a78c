"""`bench kernels`: what the Triton kernels take of a GPU, found by compiling them for it; no GPU is needed."""

from __future__ import annotations

import argparse
import importlib.util

from sparseffn.cli.output import print_json, print_rows
from sparseffn.errors import UserError

_COLUMNS = ("kernel", "target", "dtype", "arithmetic", "rows", "aligned", "registers", "spills", "shared")


def kernels_command(options: argparse.Namespace) -> int:
    """Compile and list."""
    if importlib.util.find_spec("triton") is None:
        raise UserError("the Triton kernels need triton; got none; fix: pip install triton")
    from sparseffn.ops.triton.resources import resource_report

    chosen = {name: getattr(options, name) for name in ("targets", "kernels", "dtypes") if getattr(options, name)}
    rows = resource_report(**chosen)
    if options.json:
        print_json(rows)
        return 0
    title = "Registers and spilled bytes of a thread, shared bytes of a block, in the default configurations"
    print_rows(_COLUMNS, [tuple(str(row[column]) for column in _COLUMNS) for row in rows], title=title)
    return 0
