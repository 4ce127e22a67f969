"""`timm-msar predict`: names and probabilities, where both come from, and how a photo is read."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from trained_run import CLASSES, make_run, weights

from timm_msar.cli import photo
from timm_msar_command import main

COLORS = np.arange(40 * 60 * 3, dtype=np.uint8).reshape(40, 60, 3)
NAME = 'cifar_resnet20_msar'


@pytest.fixture
def image(tmp_path):
    path = tmp_path / 'photo.png'
    Image.fromarray(COLORS).save(path)
    return path


def run(*words):
    return main(['predict', *map(str, words)])


def expected(path, model, **config):
    """What should be printed, computed with timm alone."""
    transform = timm.data.create_transform(**config)
    with torch.no_grad():
        probabilities = model.eval()(transform(Image.open(path).convert('RGB'))[None]).softmax(1)[0]
    return [(f'{p:.3%}', i) for p, i in zip(*(x.tolist() for x in probabilities.sort(descending=True)))][:5]


def test_a_checkpoint_knows_its_network_its_images_and_its_classes(tmp_path, image, capsys):
    checkpoint = make_run(tmp_path, input_size=[3, 24, 40], crop_pct=0.6)
    model = timm.create_model(NAME, num_classes=3)
    model.load_state_dict(weights(checkpoint))
    wanted = expected(image, model, input_size=(3, 24, 40), crop_pct=0.6, mean=(0.219,) * 3, std=(0.332,) * 3)
    lines = [f'  {p:>8}  {CLASSES[i]}' for p, i in wanted]
    assert run(image, '--checkpoint', checkpoint) == 0
    assert capsys.readouterr().out.splitlines() == [str(image), *lines]

    assert main(['export', str(checkpoint), '--output', str(tmp_path / 'exported')]) == 0
    capsys.readouterr()
    assert run(tmp_path, '--model', f'local-dir:{tmp_path / "exported"}') == 1  # data/ has empty files
    out, err = capsys.readouterr()
    assert '\n'.join([str(image), *lines]) in out and '3 of 4 images cannot be read' in err

    file = tmp_path / 'exported' / 'model.safetensors'
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    assert run(image, '--model', f'local-dir:{file.parent}') == 1
    assert 'its SHA-256 is not the one in config.json' in capsys.readouterr().err


def test_numbers_where_there_are_no_names_and_the_names_of_imagenet(tmp_path, image, capsys, monkeypatch):
    checkpoint = make_run(tmp_path, num_classes=7)  # its data has three
    assert run(image, '--checkpoint', checkpoint) == 0
    assert capsys.readouterr().out.count('%  class ') == 5

    imagenet = timm.create_model('resnet18', num_classes=1000)
    monkeypatch.setattr(timm, 'create_model', lambda *args, **kwargs: imagenet)
    config = timm.data.resolve_model_data_config(imagenet)
    (best, index), *_ = expected(image, imagenet, **config)
    assert run(image, '--model', 'resnet18') == 0
    assert f'{best}  {timm.data.ImageNetInfo().index_to_description(index)}' in capsys.readouterr().out


def test_a_photo_is_read_as_a_person_sees_it(tmp_path):
    def saved(image, channels=3, **kwargs):
        image.save(tmp_path / 'image.png', **kwargs)
        return np.asarray(photo.read_photo(tmp_path / 'image.png', channels))

    grey = (np.arange(40 * 60).reshape(40, 60) % 256).astype(np.uint8)
    assert saved(Image.fromarray(grey), channels=1).shape == (40, 60)
    half = np.full((40, 60, 1), 255, np.uint8)
    half[:, 30:] = 0
    shown = saved(Image.fromarray(np.concatenate([COLORS, half], 2)))
    assert (shown[:, 30:] == 255).all() and (shown[:, :30] == COLORS[:, :30]).all()
    palette = Image.fromarray(grey % 2, 'P')
    palette.putpalette([10, 20, 30, 40, 50, 60])
    np.testing.assert_array_equal(saved(palette, transparency=0)[0, :2], [[255] * 3, [40, 50, 60]])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    np.testing.assert_array_equal(saved(Image.fromarray(COLORS), exif=exif), np.rot90(COLORS, -1))
    with pytest.raises(photo.CommandError, match='its values have more than 8 bits'):  # which would become white
        saved(Image.fromarray(grey.astype(np.uint16) * 256))
