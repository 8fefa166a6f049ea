"""What stands beside ``pytest bench``: ``growth | scaling | beyond | host | report``.

Each command is a module with ``add_options(parser)`` and ``run(options) -> exit code``, imported
only when it is asked for.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from bench.machine import CommandError

COMMANDS = {
    "report": "tables, pictures and one page, from the JSON files of stored runs",
    "growth": "how cost grows with steps, batch, hidden size, layers and threads; first results",
    "beyond": "what torch.nn does not have, beside what its users write for it",
    "host": "what a call on the Triton kernels costs the processor, without a device",
    "scaling": "a training step over one process and more, strong and weak",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0, 1 a failed run, 2 a bad request, 130 Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, summary in COMMANDS.items():
        own = commands.add_parser(name, help=summary, description=summary)
        # Only the module that is asked for is imported; --help of all needs none.
        if name in arguments[:1]:
            module = importlib.import_module(f"bench.{name}")
            module.add_options(own)
            own.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    try:
        code: int = options.run(options)
    except CommandError as error:
        print(f"python -m bench {options.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nbench: interrupted; what was measured is kept", file=sys.stderr)
        return 130
    return code


if __name__ == "__main__":
    sys.exit(main())
