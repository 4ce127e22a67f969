"""The start of the command: quick help, Ctrl-C and SIGTERM at any moment, pipes, full disks, tracebacks on demand."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import timm_msar
from timm_msar_command import COMMANDS, main

RUN = next((Path(__file__).parents[1] / 'docs' / 'results').iterdir())
START = 'import sys; from timm_msar_command import main; sys.exit(main())'


def start(*words, **kwargs):
    """Start the command as a shell does in the foreground."""
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    kwargs['env'] = {**os.environ, 'PYTHONUNBUFFERED': '', **kwargs.get('env', {})}
    interrupt = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    return subprocess.Popen([sys.executable, '-c', START, *words], preexec_fn=interrupt, **pipes | kwargs)


def test_help_and_version_do_not_import_pytorch(tmp_path):
    (tmp_path / 'torch.py').write_text('raise SystemError("imported")')
    env = {'PYTHONPATH': os.pathsep.join([str(tmp_path), *sys.path])}
    started = time.monotonic()
    help_, error = start('--help', env=env).communicate()
    assert time.monotonic() - started < 1 and all(f'\n    {name} ' in help_ for name in COMMANDS) and error == ''
    assert start('--version', env=env).communicate() == (f'timm-msar {timm_msar.__version__}\n', '')
    assert start('speed', env=env).communicate() == ('', 'timm-msar speed: error: SystemError: imported\n')


@pytest.mark.parametrize('seconds', [0.2, 1.5])
def test_control_c_while_words_are_read_and_pytorch_is_imported(seconds, tmp_path):
    process = start('demo', '--output', str(tmp_path / 'demo'))
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1].splitlines()[-1].endswith(': interrupted') and process.returncode == 130


@pytest.mark.parametrize(('name', 'code', 'said'), [('SIGINT', 130, 'demo: interrupted\n'), ('SIGTERM', 143, '')])
def test_a_stopped_command_tidies_up(name, code, said, tmp_path):
    process = start('demo', '--output', str(tmp_path / 'demo'))
    while not list(tmp_path.glob('*/*')):  # it writes: tempfile's own first lines, microseconds, leave an empty folder
        time.sleep(0.01)
    process.send_signal(signal.Signals[name])
    assert process.communicate()[1].removeprefix('timm-msar ') == said and process.returncode == code
    assert list(tmp_path.iterdir()) == []


def test_a_closed_pipe_and_a_full_disk():
    closed = start('--help')
    closed.stdout.close()
    assert closed.stderr.read() == '' and closed.wait() == 141
    if os.path.exists('/dev/full'):
        with open('/dev/full', 'w') as full:
            process = start('--help', stdout=full)
            assert process.communicate()[1] == 'timm-msar: error: No space left on device\n'
            assert process.returncode == 1


@pytest.mark.parametrize(
    ('words', 'sentence'),
    [
        (['curves', 'a\nb\x1b'], r'there is no file a b\x1b/args.yaml'),
        (['curves', str(RUN)], 'matplotlib is missing; run pip install matplotlib scikit-learn'),
        (['speed', '--device', 'a\nb'], "RuntimeError: Invalid device string: 'a b'"),
    ],
)
def test_sentences_and_tracebacks(words, sentence, tmp_path, monkeypatch, capsys):
    (tmp_path / 'matplotlib.py').write_text('raise ModuleNotFoundError(name="matplotlib")')  # as if it was not there
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.startswith('matplotlib')]:
        monkeypatch.delitem(sys.modules, name)
    expected = f'timm-msar {words[0]}: error: {sentence}\n'
    assert main(words) == 1
    assert capsys.readouterr().err == expected
    for given in (['--traceback', *words], [*words, '--traceback']):
        assert main(given) == 1
        traceback = capsys.readouterr().err
        assert traceback.startswith('Traceback') and traceback.endswith(f'\n{expected}')
