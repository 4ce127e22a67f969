"""Start the command `timm-msar`, outside the package: importing that imports PyTorch, which takes seconds."""

import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

COMMANDS = {
    'demo': 'Train a small network on handwritten digits, save it, load it back and draw its gates.',
    'predict': 'Print the five most probable classes of images.',
    'gates': 'Draw where the gates of a network open over images.',
    'data': 'Prepare CIFAR-10, CIFAR-100 or Fashion-MNIST for train.py, or check a folder of images.',
    'curves': 'Draw losses and error of runs of train.py, averaged over seeds.',
    'export': 'Turn a checkpoint of train.py into a folder with weights, config and model card.',
    'push': 'Publish a checkpoint of train.py on the Hugging Face Hub.',
    'speed': 'Measure how long networks take with and without MS-SAR.',
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; print any error as one sentence; return the exit code.

    Args:
        argv: The words after `timm-msar`. By default those of this process, whose signals and streams are set up then.

    Raises:
        SystemExit: The words are wrong (2) or ask for help (0), or the process was terminated (143).
    """
    given = sys.argv[1:] if argv is None else argv
    words = [word for word in given if word != '--traceback']  # which may stand anywhere
    name = f'timm-msar {words[0]}' if words and words[0] in COMMANDS else 'timm-msar'
    try:
        try:
            _run(words, process=argv is None)
        finally:
            print(end='', flush=True)
        return 0
    except SystemExit:
        raise
    except BrokenPipeError:  # `| head` has read enough
        code, text = 141, ''
    except KeyboardInterrupt:
        code, text = 130, f'{name}: interrupted\n'
    except BaseException as error:  # a panic of safetensors is no Exception
        code, text = 1, f'{name}: error: {_sentence(error)}\n'
        if len(words) < len(given):
            sys.excepthook(type(error), error, error.__traceback__)
    print(text, end='', file=sys.stderr)
    if argv is None:  # Python would try to print the rest at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return code


def _run(words: list[str], process: bool) -> None:
    """Import the module of the subcommand, and no other, and run it."""
    on_interrupt = signal.getsignal(signal.SIGINT)
    if process:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.reconfigure(errors='backslashreplace')  # type: ignore[union-attr]
        if on_interrupt is signal.default_int_handler:  # and not ignored, as by a shell's background jobs
            signal.signal(signal.SIGINT, _stop)
    import argparse  # only now, so that Ctrl-C has no time to end in a traceback
    import importlib.metadata

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            super().error(printable(message))  # a shell's * may have put names of files into it

    parser = Parser('timm-msar', description='MS-SAR networks for timm.')
    version = f'timm-msar {importlib.metadata.version("timm-msar")}'
    parser.add_argument('--version', action='version', version=version)
    parser.add_argument('--traceback', action='store_true', help='show the traceback of an error')
    subparsers = parser.add_subparsers(required=True, metavar='COMMAND')
    commands = {name: subparsers.add_parser(name, help=text, description=text) for name, text in COMMANDS.items()}
    if words and words[0] in COMMANDS:
        module = importlib.import_module(f'timm_msar.cli.{words[0]}')
        module.add_arguments(commands[words[0]])
    args = parser.parse_args(words)
    if process:
        signal.signal(signal.SIGINT, on_interrupt)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # tidies up, as Ctrl-C does
    module.main(args)


def _sentence(error: BaseException) -> str:
    """What is wrong, in one line of printable characters."""
    text = ' '.join(str(error).split())[:1000]
    if isinstance(error, ModuleNotFoundError) and error.name in ('matplotlib', 'sklearn'):
        text = f'{error.name} is missing; run pip install matplotlib scikit-learn'
    elif isinstance(error, OSError) and error.strerror:
        text = text.removeprefix(f'[Errno {error.errno}] ')
    elif type(error).__name__ != 'CommandError':
        text = f'{type(error).__name__}: {text}'
    return printable(text)


def printable(text: object) -> str:
    """Escape what a terminal acts on or hides: line breaks, control characters, changes of the direction of text."""
    return ''.join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def _stop(*_) -> None:
    """End at once, since an exception can crash the import of PyTorch."""
    os.write(2, b'timm-msar: interrupted\n')
    os._exit(130)
