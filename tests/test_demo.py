"""The demo's parts that its own run does not check. The whole of it takes two minutes: `make demo`."""

import pytest
import timm
import torch

pytest.importorskip('sklearn')
from timm_msar import cli
from timm_msar.cli import demo


def test_what_it_saves_prepares_images_as_it_tested_them(tmp_path):
    demo.save(timm.create_model('cifar_resnet20_msar'), tmp_path / 'weights')
    loaded = timm.create_model(f'local-dir:{tmp_path / "weights"}', pretrained=True)
    assert loaded.pretrained_cfg['tag'] == 'digits' and loaded.pretrained_cfg['label_names'][7] == '7'
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(loaded), is_training=False)
    image, _ = demo.Digits(held_out=True)[0]
    tested, _ = next(iter(demo.loader(demo.Digits(held_out=True), is_training=False)))
    torch.testing.assert_close(transform(image), tested[0])


def test_a_folder_that_cannot_be_written_is_told_before_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, 'train', lambda epochs: pytest.fail('trained first'))
    (tmp_path / 'file').touch()
    assert cli.main(['demo', '--output', str(tmp_path / 'file' / 'demo')]) == 1
    error = f'cannot write {tmp_path / "file" / "demo"}: Not a directory; nothing was kept'
    assert capsys.readouterr().err == f'timm-msar demo: error: {error}\n'


def test_what_is_cut_off_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(epochs):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, 'train', interrupted)
    assert cli.main(['demo', '--output', str(tmp_path / 'demo')]) == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('seed', ['-1', str(2**32)])
def test_a_seed_out_of_range_is_one_sentence(seed, capsys):
    assert cli.main(['demo', '--seed', seed]) == 1
    assert capsys.readouterr().err == f'timm-msar demo: error: --seed must be from 0 to 4294967295, not {seed}.\n'
