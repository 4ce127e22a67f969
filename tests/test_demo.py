"""The demo on few digits. With all of them it takes two minutes: `make demo`."""

import re

import pytest
import timm
import torch
from safetensors.torch import load_file

pytest.importorskip('sklearn')
from sklearn import datasets

from timm_msar import cli
from timm_msar.cli import demo


@pytest.fixture
def digits(monkeypatch):
    """The first 100 digits, in place of all."""
    few = datasets.load_digits()
    few.images, few.target = few.images[:100], few.target[:100]
    monkeypatch.setattr(datasets, 'load_digits', lambda: few)
    return few


def test_weights_follow_from_the_seed_and_from_the_digits_that_are_not_held_out(digits, tmp_path, monkeypatch, capsys):
    def run(seed):
        assert cli.main(['demo', '--output', str(tmp_path), '--epochs', '2', '--seed', str(seed)]) == 0
        accuracy = re.search(r'^held-out accuracy +([\d.]+) % after 2 epochs', capsys.readouterr().out, re.M)[1]
        return load_file(tmp_path / 'weights' / 'model.safetensors'), float(accuracy)

    def same(some, others):
        return all(torch.equal(value, others[name]) for name, value in some.items())

    monkeypatch.setattr(demo, 'draw', lambda model, images, path: path.touch())
    weights, accuracy = run(1)
    assert (weights['stages.0.0.bn1.weight'] != 1).all()  # as it was before training
    assert weights['stem.bn.num_batches_tracked'] == 2  # of 80 digits, in batches of 64

    model = timm.create_model(f'local-dir:{tmp_path / "weights"}', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    with torch.no_grad():
        predicted = model(torch.stack([transform(image) for image, _ in demo.Digits(held_out=True)])).argmax(1).numpy()
    assert accuracy == 100 * (predicted == digits.target[4::5]).mean()
    digits.target[4::5] = predicted
    again, accuracy = run(1)
    assert accuracy == 100 and same(again, weights)
    assert not same(run(2)[0], weights)


def test_weights_that_loaded_back_compute_otherwise_are_not_kept(digits, tmp_path, monkeypatch):
    model, other = (timm.create_model('cifar_resnet20_msar', num_classes=10).eval() for _ in range(2))
    save = demo.save
    monkeypatch.setattr(demo, 'train', lambda epochs: (model, 10.0))
    monkeypatch.setattr(demo, 'save', lambda model, folder: save(other, folder))
    with pytest.raises(RuntimeError, match='the logits of the weights loaded back differ by'):
        cli.main(['demo', '--output', str(tmp_path / 'demo')])
    assert list(tmp_path.iterdir()) == []


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


def test_an_earlier_demo_is_replaced_and_nothing_else_is(digits, tmp_path, monkeypatch, capsys):
    model = timm.create_model('cifar_resnet20_msar', num_classes=10).eval()
    monkeypatch.setattr(demo, 'train', lambda epochs: (model, 10.0))
    output = tmp_path / 'demo'
    (output / 'weights').mkdir(parents=True)
    (output / 'weights' / 'model.safetensors').touch()
    assert cli.main(['demo', '--output', str(output)]) == 0
    assert sorted(path.name for path in output.rglob('*')) == [
        'config.json',
        'gates.png',
        'model.safetensors',
        'weights',
    ]
    assert [path.name for path in tmp_path.iterdir()] == ['demo']
    for other in ('thesis.txt', 'weights/best.pth'):
        (output / other).touch()
        assert cli.main(['demo', '--output', str(output)]) == 1
        assert 'is not an earlier demo' in capsys.readouterr().err
        (output / other).unlink()  # it is still there


@pytest.mark.parametrize(
    ('option', 'value', 'message'),
    [
        ('--seed', '-1', 'argument --seed: must be a whole number from 0 to 4294967295, not '),
        ('--seed', str(2**32), 'argument --seed: must be a whole number from 0 to 4294967295, not '),
        ('--epochs', '0', 'argument --epochs: must be a whole number from 1 on, not '),
        ('--epochs', '1.5', 'argument --epochs: must be a whole number from 1 on, not '),
    ],
)
def test_a_number_out_of_range_is_told(option, value, message, capsys):
    with pytest.raises(SystemExit, match='2'):
        cli.main(['demo', option, value])
    assert capsys.readouterr().err.endswith(f'timm-msar demo: error: {message}{value!r}\n')
