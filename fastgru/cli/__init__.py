"""The command line: ``python -m fastgru info | verify | bench | demo``.

Exit codes, the same for every command: 0 all went well, 1 a check failed, 2 the request cannot be carried out (bad
option or file, missing extra, missing device). One line on stderr says why; a traceback is always a bug.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import torch

from fastgru.cli import bench, demo, info, verify
from fastgru.cli._common import CommandError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command with ``argv`` (default: ``sys.argv[1:]``) and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fastgru",
        description="torch.nn.GRU, faster: look at this machine, check it, measure it, see it train.",
        epilog="Exit code: 0 all well, 1 a check failed, 2 the request cannot be carried out.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for command in (info, verify, bench, demo):
        command.add_parser(commands)
    args = parser.parse_args(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
    except CommandError as error:
        print(f"fastgru {args.command}: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        # torch has no exception of its own for memory that the CPU lacks.
        if "alloc" not in str(error) and not isinstance(error, torch.OutOfMemoryError):
            raise
        print(f"fastgru {args.command}: not enough memory for these sizes", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nfastgru {args.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (``| head``) has gone; without this the interpreter complains again when it flushes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return code
