"""Run one of timm's scripts with the networks of this package: `python -m timm_msar.run SCRIPT ARGS…`.

timm's validate.py, inference.py, benchmark.py and onnx_export.py cannot import a plugin by themselves (train.py can:
`--device-modules timm_msar`). This imports it, then runs the script as if it had been started directly: it sees its own
arguments, is `__main__`, finds modules in its own folder, and its exit code is the exit code. Processes that the script
starts with multiprocessing know the networks too. It works with `torchrun … -m timm_msar.run SCRIPT ARGS…` as well.

bulk_runner.py starts another Python for each model, which has to come this way, too. The value of `--module` is not
used:

    python -m timm_msar.run bulk_runner.py --model-list '*_msar' --module yes timm_msar.run validate.py ARGS…

validate.py and benchmark.py need no bulk_runner.py: their own `--model '*_msar'` runs one model after the other.
"""

import argparse
import importlib.metadata
import os
import re
import runpy
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

SCRIPT_VARIABLE = 'TIMM_MSAR_SCRIPT'  # by which a spawned process learns the script's path
FETCH = """\
  git clone --depth 1 --branch v{version} https://github.com/huggingface/pytorch-image-models
  cp pytorch-image-models/*.py ."""


def main() -> None:
    """Run the script named by the first argument with the arguments after it."""
    parser = argparse.ArgumentParser(
        'python -m timm_msar.run',
        usage='%(prog)s SCRIPT ARGS…',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('script', metavar='SCRIPT', help="path of one of timm's scripts, for example validate.py")
    script = parser.parse_args(sys.argv[1:2]).script
    if problem := _why_not(Path(script)):
        fetch = FETCH.format(version=importlib.metadata.version('timm'))
        parser.exit(
            1, f'timm_msar.run: error: {problem}; these lines fetch the scripts of the installed timm:\n{fetch}\n'
        )

    sys.argv = sys.argv[1:]
    if not getattr(sys.flags, 'safe_path', False):  # as Python itself does with `python SCRIPT`
        sys.path[0] = str(Path(script).resolve().parent)
    module = types.ModuleType('__main__')
    module.__file__ = os.environ[SCRIPT_VARIABLE] = str(Path(script).absolute())
    # A spawned process makes its `__main__` again by this name, so it comes through this file and knows the networks.
    module.__spec__ = ModuleSpec('timm_msar.run', None, origin=script)
    # runpy.run_path would leave `__mp_main__` behind, by which workers name the script's classes when they send objects
    sys.modules['__main__'] = sys.modules['__mp_main__'] = module
    exec(compile(Path(script).read_bytes(), script, 'exec'), module.__dict__)


def _why_not(script: Path) -> str:
    """Why the script cannot be run, or would not run with the installed timm; '' if neither."""
    try:
        if not script.is_file():
            return f'there is no script {script}'
        folder = script.resolve().parent / 'timm'
        if not (folder / '__init__.py').is_file() and not (folder / 'version.py').is_file():
            return ''
        text = (folder / 'version.py').read_text(encoding='utf-8')
    except OSError as error:
        return f'{error.filename} cannot be read ({error.strerror})'
    except ValueError as error:
        return f'{script} or the timm beside it cannot be read ({error})'
    match = re.search(r"""__version__\s*=\s*['"](.+?)['"]""", text)
    version, installed = match[1] if match else 'unknown', importlib.metadata.version('timm')
    if version == installed:
        return ''
    return f'{script} is in a checkout of timm {version}, which it would import instead of the installed {installed}'


if __name__ == '__main__':
    main()
elif __name__ == '__mp_main__':  # in a spawned process
    globals().update(runpy.run_path(os.environ[SCRIPT_VARIABLE], run_name='__mp_main__'))
