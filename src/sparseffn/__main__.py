"""The command `sparseffn`, also as `python -m sparseffn`; from a source tree it says which packages are absent."""

import sys


def main() -> int:
    """Run the command, or name the package that it lacks; of several processes, one ends here (`cli.process.leave`)."""
    try:
        from sparseffn.cli import main
        from sparseffn.cli.process import leave

        try:
            code = main()
        except SystemExit as ended:
            # Help was printed, or a process leaves the word to the first one.
            if not isinstance(ended.code, int):
                raise
            code = ended.code
        return leave(code)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("sparseffn"):
            raise
        sys.stderr.write(
            f"sparseffn: package {error.name!r} must be installed; fix: pip install . in the source tree, or without a "
            "network `make gpu-wheels` on another machine and PYTHONPATH=src:FOLDER here\n"
        )
        return 2


if __name__ == "__main__":
    sys.exit(main())
