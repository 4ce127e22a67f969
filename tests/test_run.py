"""A script started through timm_msar.run behaves as one started directly, and knows the networks."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import timm
import torch

import timm_msar.run


def start(*words, cwd, plugin=True, launcher=()):
    command = [*(launcher or [sys.executable]), *(['-m', 'timm_msar.run'] if plugin else []), *map(str, words)]
    environment = os.environ | {'OMP_NUM_THREADS': '1'}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def script(tmp_path):
    """Writes a script into a folder that is not the working directory."""
    (tmp_path / 'scripts').mkdir()
    (tmp_path / 'scripts' / 'neighbour.py').write_text('ANSWER = 42\n')

    def write(text):
        path = tmp_path / 'scripts' / 'script.py'
        path.write_text(textwrap.dedent(text))
        return path

    return write


LOOK_AROUND = """
    import json, os, sys, __main__
    from neighbour import ANSWER  # beside the script

    def function():
        return ANSWER

    if __name__ == '__main__':
        print(json.dumps([
            sys.argv, __name__, __file__, sys.path[0], os.getcwd(), __main__.function(), function.__module__,
            __main__.__dict__ is globals(), sorted(key for key in globals() if not key.startswith('__')),
        ]))
"""


def test_the_script_sees_what_it_sees_when_started_directly(script, tmp_path):
    path = script(LOOK_AROUND)
    (path.parent / 'timm').mkdir()  # as in a checkout of the installed version, which is accepted
    (path.parent / 'timm' / 'version.py').write_text(f'__version__ = {timm.__version__!r}\n')
    words = [path.relative_to(tmp_path), '--model', 'x', '--', '-h', 'two words']
    through, directly = (start(*words, cwd=tmp_path, plugin=plugin) for plugin in (True, False))
    assert directly.returncode == 0, directly.stderr
    assert (through.returncode, through.stdout) == (0, directly.stdout), through.stderr


@pytest.mark.parametrize('statement, code', [('sys.exit(7)', 7), ('raise ValueError("no")', 1)])
def test_the_exit_code_is_the_scripts(script, tmp_path, statement, code):
    result = start(script(f'import sys\n{statement}\n'), cwd=tmp_path)
    assert result.returncode == code
    assert ('no' in result.stderr) == ('no' in statement)


WORKERS = """
    import sys
    from dataclasses import dataclass

    import timm
    from torch.utils.data import DataLoader

    print('imported as', __name__, 'with', sys.argv[1:], flush=True)

    @dataclass
    class Answer:  # a class of the script itself, sent in both directions
        value: int

    class Answers(list):
        def __getitem__(self, index):
            assert __name__ == '__mp_main__'
            return Answer(super().__getitem__(index).value + timm.is_model('cifar_resnet20_msar'))

    if __name__ == '__main__':
        for method in sys.argv[1:]:
            answers = Answers([Answer(40), Answer(41)])
            print(*DataLoader(answers, batch_size=2, collate_fn=list, num_workers=1, multiprocessing_context=method))
"""


def test_spawned_workers_have_the_script_and_the_networks(script, tmp_path):
    result = start(script(WORKERS).relative_to(tmp_path), 'spawn', 'forkserver', cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines.count('[Answer(value=41), Answer(value=42)]') == 2
    assert lines.count("imported as __mp_main__ with ['spawn', 'forkserver']") >= 2


def test_torchrun_runs_it_in_every_process(script, tmp_path):
    path = script("""
        import sys, timm, torch.distributed as dist
        dist.init_process_group('gloo')
        ranks = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, (dist.get_rank(), timm.is_model('cifar_resnet20_msar'), __name__, sys.argv[1:]))
        if dist.get_rank() == 0:
            print(ranks)
        dist.destroy_process_group()
    """)
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2']
    result = start(path, '--amp', cwd=tmp_path, launcher=launcher)
    assert result.returncode == 0, result.stderr
    assert "[(0, True, '__main__', ['--amp']), (1, True, '__main__', ['--amp'])]" in result.stdout


def test_validate_knows_the_networks(timm_scripts, digits_folder, tmp_path):
    torch.save(timm.create_model('cifar_resnet20_msar', num_classes=4).state_dict(), tmp_path / 'weights.pth')
    script, *options = (
        *(timm_scripts / 'validate.py', '--data-dir', digits_folder, '--device', 'cpu', '--workers', '0'),
        *('--model', 'cifar_resnet20_msar', '--num-classes', 4, '--checkpoint', 'weights.pth', '--crop-pct', '0.8'),
        *('--results-file', 'result.json', '--results-format', 'json'),
    )
    result = start(script, *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert 'top1' in json.loads((tmp_path / 'result.json').read_text())
    result = start(script, *options, cwd=tmp_path, plugin=False)  # without the plugin the name means nothing
    assert result.returncode == 1
    assert 'cifar_resnet20_msar' in result.stderr


def test_bulk_runner_and_the_processes_that_it_starts_know_the_networks(timm_scripts, script, tmp_path):
    path = script("""
        import json, sys, timm
        print('--result\\n' + json.dumps({'model': sys.argv[-1], 'known': timm.is_model(sys.argv[-1]), 'top1': 1}))
    """)
    options = '--model-list', 'cifar_resnet20_m*', '--module', 'yes', 'timm_msar.run', path
    result = start(timm_scripts / 'bulk_runner.py', *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / 'results.csv').read_text().splitlines() == ['model,known,top1', 'cifar_resnet20_msar,True,1']


@pytest.fixture
def refusal(monkeypatch, capsys):
    """Exit code and message of a call that ends before any script runs."""

    def call(*words):
        monkeypatch.setattr(sys, 'argv', ['run.py', *map(str, words)])
        with pytest.raises(SystemExit) as exit_info:
            timm_msar.run.main()
        output = capsys.readouterr()
        assert output.out == ''
        return exit_info.value.code, output.err

    return call


FETCH = (
    '; these lines fetch the scripts of the installed timm:\n'
    f'  git clone --depth 1 --branch v{timm.__version__} https://github.com/huggingface/pytorch-image-models\n'
    '  cp pytorch-image-models/*.py .\n'
)


@pytest.mark.parametrize(
    ('words', 'code', 'message'),
    [
        (['no_such.py', '--model', 'x'], 1, f'timm_msar.run: error: there is no script no_such.py{FETCH}'),
        (['x' * 256], 1, f'cannot be read (File name too long){FETCH}'),
        ([], 2, 'usage: python -m timm_msar.run SCRIPT ARGS…'),
    ],
)
def test_a_missing_script_is_told_with_the_lines_that_fetch_it(words, code, message, refusal):
    found, error = refusal(*words)
    assert (found, message in error) == (code, True), error


@pytest.mark.parametrize(
    ('version', 'message'),
    [
        (b"__version__ = '0.9.16'", 'script.py is in a checkout of timm 0.9.16, which it would import instead of'),
        (b'', 'is in a checkout of timm unknown, which it would import'),
        (b'__version__ = "\xff"', "the timm beside it cannot be read ('utf-8' codec can't decode"),
        (None, 'version.py cannot be read (No such file or directory)'),
    ],
)
def test_a_script_beside_another_or_broken_timm_is_refused(version, message, script, refusal):
    path = script('print("ran")')
    (path.parent / 'timm').mkdir()
    (path.parent / 'timm' / '__init__.py').touch()
    if version is not None:
        (path.parent / 'timm' / 'version.py').write_bytes(version)
    code, error = refusal(path)
    assert code == 1 and message in error and error.endswith(FETCH)


def test_importing_the_package_does_not_import_the_command():
    code = "import sys, timm_msar; print([name for name in sys.modules if name.startswith('timm_msar.cli')])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout == '[]\n'
