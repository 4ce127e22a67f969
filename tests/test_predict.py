"""`timm-msar predict`: names and probabilities, where both come from, and how an image is read."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from trained_run import CLASSES, make_run, weights

from timm_msar.cli import inference
from timm_msar_command import main

COLORS = np.arange(40 * 60 * 3, dtype=np.uint8).reshape(40, 60, 3)
NAME = 'cifar_resnet20_msar'


@pytest.fixture
def image(tmp_path):
    path = tmp_path / 'image.png'
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


def odd_images(folder):
    """Files that programs show in more than one way: turned, transparent, of several frames, of other colours."""
    x = (np.arange(40 * 60).reshape(40, 60) % 250).astype(np.uint8)
    color, grey, palette = Image.fromarray(COLORS), Image.fromarray(x), Image.fromarray(x % 3, 'P')
    palette.putpalette([10, 20, 30, 200, 50, 60, 70, 80, 190])
    rgba, la, exif = color.convert('RGBA'), grey.convert('LA'), Image.Exif()
    rgba.putalpha(grey)
    la.putalpha(grey)
    exif[0x0112] = 6  # to be turned clockwise
    folder.mkdir(parents=True)
    for name, image, kwargs in (
        *(('1.png', grey, {}), ('2.jpeg', color.convert('CMYK'), {}), ('3.png', grey.convert('1'), {})),
        *(('4.png', rgba, {}), ('5.png', la, {}), ('6.png', palette, {'transparency': 0})),
        *(
            ('7.png', palette, {'transparency': b'\0\x80\xff'}),
            ('8.png', color, {'transparency': tuple(COLORS[0, 0].tolist())}),
        ),
        *(('9.jpg', color, {'exif': exif}), ('10.png', color, {'exif': exif}), ('11.png', color.convert('RGBA'), {})),
        ('12.png', rgba, {'format': 'gif', 'save_all': True, 'append_images': [grey, color]}),
        ('13.jpg', grey, {'format': 'tiff', 'save_all': True, 'append_images': [rgba]}),
    ):
        image.save(folder / name, **kwargs)


@pytest.mark.parametrize(('channels', 'mode'), [(3, None), (1, None), (4, 'RGBA')])
def test_images_are_read_as_timm_reads_them(channels, mode, tmp_path, capsys):
    odd_images(tmp_path / 'images' / 'a')
    checkpoint = make_run(tmp_path, input_size=[channels, 32, 32], input_img_mode=mode, mean=[0.2], std=[0.3])
    network = inference.load('', checkpoint)
    mode = mode or ('RGB' if channels == 3 else 'L')  # as train.py and validate.py do
    dataset = timm.data.create_dataset('', root=str(tmp_path / 'images'), split='validation', input_img_mode=mode)
    dataset.transform = timm.data.create_transform(**network.config, is_training=False)
    ours = dict(inference.prepared([Path(name) for name in dataset.filenames(absolute=True)], network))
    assert len(ours) == len(dataset) == 13
    assert all(torch.equal(x[0], theirs) for x, (theirs, _) in zip(ours.values(), dataset))
    Image.fromarray(COLORS[..., 0].astype(np.uint16) * 256).save(tmp_path / 'deep.png')  # timm makes white of it
    assert run(tmp_path / 'deep.png', '--checkpoint', checkpoint) == 1
    assert 'its values have more than 8 bits' in capsys.readouterr().err
