"""A file or folder is the old or the new one, whole, wherever its writing is interrupted or killed."""

import os
import signal
import sys
from pathlib import Path

import pytest

from timm_msar.cli import files
from timm_msar.cli.errors import CommandError


def content(path):
    if path.is_dir():
        return {(file.name, file.read_text()) for file in path.iterdir()}
    return path.read_text() if path.exists() else None


def write(path, text, folder):
    for target in (path / 'a', path / 'b') if folder else (path,):
        target.write_text(text)


def stopped_at(line, path, folder, number):
    """Write `path` anew in another process that gets a signal before the line-th line of the module; whether it did."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        lines = 0

        def trace(frame, event, _):
            nonlocal lines
            if frame.f_code.co_filename != files.__file__:
                return None
            lines += event == 'line'
            if event == 'line' and lines == line:
                signal.raise_signal(number)
            return trace

        code = 1
        try:
            sys.settrace(trace)
            with files.written_whole(path, folder) as aside:
                write(aside, 'new', folder)
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1] != 0


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize('folder', [True, False])
def test_stopped_before_any_line(tmp_path, folder, number):
    new = {('a', 'new'), ('b', 'new')} if folder else 'new'
    before = set() if folder else 'old'
    seen, line, path = [], 0, None
    while path is None or stopped_at(line, path, folder, number):
        if path:
            seen.append(content(path))
            assert seen[-1] in (before, new)
            assert number == signal.SIGKILL or [file.name for file in path.parent.iterdir()] == ['result']
        line += 1
        path = tmp_path / str(line) / 'result'
        (path if folder else path.parent).mkdir(parents=True)
        if not folder:
            path.write_text('old')
    assert content(path) == new and before in seen and new in seen and line > 8


def test_what_is_there_stays(tmp_path, monkeypatch):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'mine' / 'thesis').write_text('years of work')
    monkeypatch.chdir(tmp_path / 'empty')  # which would have no name any more
    for name, folder in (('../mine', True), ('../mine', False), ('../mine/thesis', True), ('.', True)):
        with pytest.raises(CommandError, match='exists already'), files.written_whole(Path(name), folder):
            pass
    assert content(tmp_path / 'mine') == {('thesis', 'years of work')}
