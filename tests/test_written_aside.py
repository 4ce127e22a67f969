"""A file or folder is the old or the new one, whole, wherever its writing is interrupted or killed."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from timm_msar.cli import written_aside as module
from timm_msar.cli.errors import CommandError
from timm_msar.cli.written_aside import written_aside


def write(path, text, folder):
    if folder:
        path.mkdir()
        for name in 'ab':
            (path / name).write_text(text)
    else:
        path.write_text(text)


def content(path):
    if path.is_dir():
        return {(file.name, file.read_text()) for file in path.iterdir()}
    return path.read_text() if path.exists() else None


def hidden(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith('.')]


def stopped_at(line, path, folder, stop):
    """Write `path` anew in another process that is stopped before the line-th line of the module; whether it was."""
    child = os.fork()
    if child == 0:
        lines = 0

        def trace(frame, event, _):
            nonlocal lines
            if frame.f_code.co_filename != module.__file__:
                return None
            if event == 'line':
                lines += 1
                if lines == line:
                    stop()
            return trace

        code = 2
        try:
            sys.settrace(trace)
            with written_aside(path) as aside:
                write(aside, 'new', folder)
            code = 0
        except KeyboardInterrupt:
            code = 1
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert status != 2 << 8, 'another error'
    return status != 0


def interrupt():
    raise KeyboardInterrupt


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs os.fork')
@pytest.mark.parametrize('stop', [interrupt, kill])
@pytest.mark.parametrize('folder', [True, False])
@pytest.mark.parametrize('there', [True, False])
def test_stopped_before_any_line(tmp_path, there, folder, stop):
    whole = {text: {(name, text) for name in 'ab'} if folder else text for text in ('old', 'new')}
    before = whole['old'] if there else None
    seen, line = [], 0
    while True:
        line += 1
        room = tmp_path / str(line)
        room.mkdir()
        path = room / 'result'
        if there:
            write(path, 'old', folder)
        if not stopped_at(line, path, folder, stop):
            break
        if stop is interrupt:
            assert content(path) in (before, whole['new'])
        with written_aside(room / 'other') as aside:  # tidies up
            write(aside, 'other', folder)
        assert content(path) in (before, whole['new'])
        assert hidden(room) == []
        seen.append(content(path))
    assert content(path) == whole['new'] and hidden(room) == []
    assert line > 15 and before in seen and whole['new'] in seen


def test_an_error_leaves_what_was_there(tmp_path):
    write(tmp_path / 'result', 'old', True)
    with pytest.raises(ZeroDivisionError), written_aside(tmp_path / 'result') as aside:
        write(aside, 'new', True)
        raise ZeroDivisionError
    assert content(tmp_path / 'result') == {('a', 'old'), ('b', 'old')}
    assert hidden(tmp_path) == []


def test_an_old_folder_that_cannot_be_deleted_does_not_cost_the_new_one(tmp_path, monkeypatch):
    """As root may delete everything, deleting itself fails here."""
    write(tmp_path / 'result', 'old', True)
    unlink = os.unlink

    def refuse_b(path, *args, **kwargs):
        if os.path.basename(path) == 'b':
            raise PermissionError(13, 'Permission denied')
        unlink(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, 'unlink', refuse_b)
        with written_aside(tmp_path / 'result') as aside:
            write(aside, 'new', True)
    assert content(tmp_path / 'result') == {('a', 'new'), ('b', 'new')}


def test_what_cannot_be_put_in_place_is_kept(tmp_path):
    with (
        pytest.raises(CommandError, match=r'cannot replace .*result \(Is a directory\); the new one is kept as ') as e,
        written_aside(tmp_path / 'result') as aside,
    ):
        write(aside, 'new', False)
        write(tmp_path / 'result', 'old', True)  # by another process
    assert content(Path(str(e.value).rpartition(' as ')[2])) == 'new'
    assert content(tmp_path / 'result') == {('a', 'old'), ('b', 'old')}
    assert hidden(tmp_path) == []


def test_two_at_once_do_not_share_a_name_and_the_last_counts(tmp_path):
    with written_aside(tmp_path / 'result') as one, written_aside(tmp_path / 'result') as other:
        write(one, 'one', False)
        write(other, 'other', False)
    assert content(tmp_path / 'result') == 'one'
    assert hidden(tmp_path) == []


def test_one_that_still_writes_is_left_alone_by_one_that_cannot_see_its_process(tmp_path):
    """As in two containers on one volume, which may have the same host name."""
    unshare = ['unshare', '--pid', '--fork']
    if shutil.which('unshare') is None or subprocess.run([*unshare, 'true']).returncode != 0:
        pytest.skip('needs unshare of util-linux, and the right to use it')
    code = 'import sys; from pathlib import Path; from timm_msar.cli.written_aside import written_aside\n'
    code += "with written_aside(Path(sys.argv[1])) as aside: aside.write_text('other')"
    with written_aside(tmp_path / 'result') as aside:
        write(aside, 'new', True)
        subprocess.run([*unshare, sys.executable, '-c', code, tmp_path / 'other'], check=True, timeout=100)
    assert content(tmp_path / 'result') == {('a', 'new'), ('b', 'new')} and content(tmp_path / 'other') == 'other'
    assert hidden(tmp_path) == []


def test_a_link_is_followed_and_the_longest_name_is_taken(tmp_path):
    (tmp_path / 'elsewhere').mkdir()
    target = tmp_path / 'elsewhere' / ('x' * 255)
    (tmp_path / 'link').symlink_to(target)
    with written_aside(tmp_path / 'link') as aside:
        write(aside, 'new', False)
    assert (tmp_path / 'link').is_symlink() and content(target) == 'new'
