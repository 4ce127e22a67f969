"""The command `timm-msar`: one subcommand a module."""

import argparse
import sys
from collections.abc import Sequence

from .. import __version__
from . import costs, curves, data, demo, export, gates, push, speed
from .errors import CommandError

COMMANDS = {
    'demo': demo,
    'costs': costs,
    'speed': speed,
    'data': data,
    'curves': curves,
    'gates': gates,
    'export': export,
    'push': push,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; return 1 after printing one sentence where the user can put something right."""
    parser = argparse.ArgumentParser(prog='timm-msar', description='MS-SAR networks for timm.')
    parser.add_argument('--version', action='version', version=f'timm-msar {__version__}')
    subparsers = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or '').partition('\n')[0]
        module.add_arguments(subparsers.add_parser(name, help=summary, description=summary))
    args = parser.parse_args(argv)
    try:
        COMMANDS[args.command].main(args)
    except BrokenPipeError:
        raise
    except (CommandError, OSError) as error:
        # There may be a line break in the name of a file.
        text = ''.join(c if c.isprintable() else repr(c)[1:-1] for c in str(error))
        print(f'timm-msar {args.command}: error: {text}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f'timm-msar {args.command}: interrupted', file=sys.stderr)
        return 130
    return 0
