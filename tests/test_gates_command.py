"""`timm-msar gates`: the pictures, and images, networks and files that it cannot use."""

import os

import numpy as np
import pytest
import timm
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from safetensors.torch import save_file
from timm.models import save_for_hf
from trained_run import CLASSES, make_run, weights

import timm_msar
from timm_msar import cli
from timm_msar.cli import gate_pictures
from timm_msar.cli.photo import read_photo

COLORS = np.arange(40 * 60 * 3, dtype=np.uint8).reshape(40, 60, 3)


@pytest.fixture(scope='module')
def network(tmp_path_factory):
    """--model for a network whose gates have been trained a little, with names of its classes."""
    folder = tmp_path_factory.mktemp('network')
    model = timm.create_model('cifar_resnet20_msar', num_classes=3)
    model.load_state_dict(weights(make_run(folder)))
    save_for_hf(model, folder / 'saved', model_config={'label_names': list(CLASSES)}, safe_serialization=True)
    return f'local-dir:{folder / "saved"}'


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / 'photo.png'
    Image.fromarray(COLORS).save(path)
    return path


def run(*words):
    return cli.main(['gates', *map(str, words)])


def error_of(capsys):
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith('timm-msar gates: error: ') for line in lines), lines
    return [line.removeprefix('timm-msar gates: error: ') for line in lines]


def test_a_look_is_what_the_network_computes(network):
    model = timm.create_model(network, pretrained=True).eval()
    config = timm.data.resolve_model_data_config(model)
    x = timm.data.create_transform(**config, is_training=False)(Image.fromarray(COLORS))[None]
    seen = gate_pictures.look(model, x, config['mean'], config['std'], CLASSES)
    with torch.no_grad():
        probability, index = model(x).softmax(1).max(1)
    assert seen.prediction == f'{CLASSES[index]} ({probability.item():.0%})'
    # 40×60 is resized to 32×48, of which the middle 32 columns are seen
    shown = Image.fromarray(COLORS).resize((48, 32), Image.Resampling.BILINEAR).crop((8, 0, 40, 32))
    np.testing.assert_allclose(seen.image, np.asarray(shown) / 255, atol=1e-6)

    z, per_scale = timm_msar.gates(model, x), timm_msar.gates(model, x, per_scale=True)
    assert list(seen.maps) == ['stages.0.2.se', 'stages.1.2.se', 'stages.2.2.se']
    for name, maps in seen.maps.items():
        titles = [title for title, _ in maps]
        assert titles[:4] == ['mean of channels', 'K = 1, mean', 'K = 2, mean', 'K = 4, mean']
        np.testing.assert_allclose(maps[0][1], z[name][0].mean(0), rtol=1e-5)
        for (_, shown_map), z_k in zip(maps[1:4], per_scale[name].values()):
            np.testing.assert_allclose(shown_map, z_k[0].mean(0), rtol=1e-5)
        spread = z[name][0].flatten(1).std(1)
        channels = [int(title.removeprefix('channel ')) for title in titles[4:]]
        assert len(channels) == 3 and spread[channels].min() >= spread.sort(descending=True).values[2]
        np.testing.assert_allclose(maps[4][1], z[name][0, channels[0]], rtol=1e-5)


def test_the_last_layer_of_each_stage_of_every_family():
    for name, kwargs, expected in (
        ('resnext50_msar', {'layers': (1, 2, 1, 1)}, ['layer1.0.se', 'layer2.1.se', 'layer3.0.se', 'layer4.0.se']),
        ('cifar_densenet100_msar', {'depth': 2}, ['stages.0.1.se', 'stages.1.2.se', 'stages.2.2.se']),
    ):
        model = timm.create_model(name, **kwargs).eval()
        assert list(gate_pictures.look(model, torch.randn(1, 3, 32, 32), (0, 0, 0), (1, 1, 1)).maps) == expected


def test_the_scale_shows_closed_and_open():
    norm = gate_pictures._norm()
    assert [float(norm(z)) for z in (0, 0.5, 1)] == pytest.approx([0, 0.5, 1])
    assert float(norm(0.55)) == pytest.approx(0.5 + 0.5 * 0.1**0.5)
    z = np.full((4, 4), 0.5)
    z[:2, :2], z[2:, 2:] = 0.9, 0.1
    look = gate_pictures.Look('', np.zeros((32, 32, 3)), '', {'se': [('mean of channels', z)]})
    figure = gate_pictures.picture(look, '')
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    box = figure.axes[1].get_window_extent()
    pixels = np.asarray(canvas.buffer_rgba())[::-1].astype(int)

    def at(x, y):
        return pixels[round(box.y0 + y * box.height), round(box.x0 + x * box.width), :3]

    red, blue, white = at(0.2, 0.8), at(0.8, 0.2), at(0.8, 0.8)
    assert red[0] > 2 * red[2] and blue[2] > 2 * blue[0] and white.min() > 230


@pytest.mark.slow
def test_a_folder_gets_a_picture_of_each_image_and_a_contact_sheet(network, photo, tmp_path, capsys):
    images = tmp_path / 'images'
    for name in ('a/1.png', 'b/1.JPG', 'b/contact_sheet.png'):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(COLORS).save(images / name)
    (images / 'notes.txt').touch()
    output = tmp_path / 'new' / 'gates'
    assert run(images, photo, photo, '--model', network, '--output', output) == 0
    names = ['1-2.png', '1.png', 'contact_sheet-2.png', 'contact_sheet.png', 'photo.png']
    assert sorted(path.name for path in output.iterdir()) == names
    sizes = {name: Image.open(output / name).size for name in names}
    assert sizes['1.png'] == sizes['photo.png'] and sizes['contact_sheet.png'][1] > 4 * 150
    out = capsys.readouterr().out
    assert f'{images / "b" / "1.JPG"}: ' in out and f'→ {output / "1-2.png"}\n' in out
    assert out.endswith(f'{output / "contact_sheet.png"} has 4 images\n')


def test_one_picture_and_what_is_not_overwritten(network, photo, tmp_path, capsys):
    output = tmp_path / 'gates.png'
    for _ in range(2):  # an earlier picture is replaced
        assert run(photo, '--model', network, '--output', output) == 0
        assert Image.open(output).format == 'PNG' and Image.open(output).width > 1000
    capsys.readouterr()
    assert run(photo, '--model', network, '--output', photo) == 1
    assert run(photo, output, '--model', network, '--output', tmp_path / 'two.png') == 1
    assert run(photo, '--model', network, '--output', tmp_path) == 1
    errors = error_of(capsys)
    assert [error.rpartition(' ')[2] for error in errors] == ['name', 'folder', '--output'] and len(errors) == 3
    np.testing.assert_array_equal(np.asarray(Image.open(photo)), COLORS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['gates.png', 'photo.png']


def test_the_shipped_weights(photo, tmp_path, capsys):
    assert run(photo, '--model', 'cifar_resnet20_msar', '--output', tmp_path / 'gates.png') == 0
    out = capsys.readouterr().out
    assert f'{photo}: class ' in out and 'warm start' not in out


def test_checkpoints(photo, tmp_path, capsys):
    path, name = make_run(tmp_path, input_size=[3, 24, 40], crop_pct=0.6), 'cifar_resnet20_msar'
    assert run(photo, '--model', name, '--checkpoint', path, '--output', tmp_path / '1.png') == 0
    out = capsys.readouterr().out
    assert any(f': {label} (' in out for label in CLASSES)  # from the folder that it was trained on
    model = timm.create_model(name, num_classes=3).eval()
    model.load_state_dict(weights(path))
    mean, std = (0.219,) * 3, (0.332,) * 3
    transform = timm.data.create_transform((3, 24, 40), crop_pct=0.6, mean=mean, std=std)
    seen = gate_pictures.look(model, transform(Image.fromarray(COLORS))[None], mean, std, CLASSES)
    gate_pictures.save(gate_pictures.picture(seen, f'photo.png, {name}'), tmp_path / 'expected.png')
    np.testing.assert_array_equal(Image.open(tmp_path / '1.png'), Image.open(tmp_path / 'expected.png'))

    save_file(timm.create_model(name, num_classes=10).state_dict(), tmp_path / 'all.safetensors')
    assert (
        run(photo, '--model', name, '--checkpoint', tmp_path / 'all.safetensors', '--output', tmp_path / '2.png') == 0
    )
    assert ': class ' in capsys.readouterr().out


def test_damaged_weights_of_an_exported_folder(photo, tmp_path, capsys):
    folder = tmp_path / 'exported'
    assert cli.main(['export', str(make_run(tmp_path)), '--output', str(folder)]) == 0
    assert run(photo, '--model', f'local-dir:{folder}', '--output', tmp_path / 'gates') == 0
    weights_file = folder / 'model.safetensors'
    damaged = bytearray(weights_file.read_bytes())
    damaged[-1] ^= 1
    weights_file.write_bytes(damaged)
    capsys.readouterr()
    assert run(photo, '--model', f'local-dir:{folder}', '--output', tmp_path / 'other') == 1
    assert error_of(capsys) == [
        f'{weights_file} is damaged or another file: its SHA-256 is not the one in config.json; '
        'copy the folder or export it again'
    ]


def test_a_warm_start_is_told(photo, tmp_path, capsys):
    model = timm.create_model('cifar_resnet20_msar', num_classes=10)
    timm_msar.start_from_plain(model, timm.create_model('cifar_resnet20', num_classes=10).state_dict())
    save_for_hf(model, tmp_path / 'warm', safe_serialization=True)
    assert run(photo, '--model', f'local-dir:{tmp_path / "warm"}', '--output', tmp_path / 'gates.png') == 0
    assert 'all gates are 0.5: a warm start' in capsys.readouterr().out


def test_images_that_cannot_be_read_do_not_stop_the_others(network, photo, tmp_path, capsys):
    broken, text, narrow = tmp_path / 'broken.png', tmp_path / 'text.png', tmp_path / 'narrow.png'
    broken.write_bytes(photo.read_bytes()[: photo.stat().st_size // 2])
    text.write_text('hello')
    Image.new('RGB', (10_000, 1)).save(narrow)
    Image.new('F', (40, 40)).save(tmp_path / 'float.tif')
    Image.fromarray(np.full((40, 40), 70_000, np.int32)).save(tmp_path / 'deep.tif')
    bad = [tmp_path / 'missing.png', broken, text, narrow, tmp_path / 'float.tif', tmp_path / 'deep.tif']
    output = tmp_path / 'gates'
    assert run(*bad[:3], photo, *bad[3:], '--model', network, '--output', output) == 1
    assert sorted(path.name for path in output.iterdir()) == ['contact_sheet.png', 'photo.png']
    errors = error_of(capsys)
    reasons = (
        'there is no such file',
        'image file is truncated',
        'it is not an image',
        'with 10000×1 pixels it is too narrow to crop',
        'its pixels are floating-point numbers; save it with 8 or 16 bits',
        'it has 32 bits a pixel; save it with 8 or 16',
    )
    for error, path, reason in zip(errors, bad, reasons):
        assert error.startswith(f'cannot read {path}: {reason}')
    assert errors[6:] == ['6 of 7 images cannot be read; the others are drawn']
    assert run(bad[0], bad[2], '--model', network, '--output', tmp_path / 'none') == 1
    assert error_of(capsys)[-1] == 'none of the 2 images can be read; nothing was written'
    assert not (tmp_path / 'none').exists()


def test_every_kind_of_image_is_seen_as_a_person_sees_it(tmp_path):
    def saved(image, name='image.png', channels=3, **kwargs):
        image.save(tmp_path / name, **kwargs)
        return np.asarray(read_photo(tmp_path / name, channels))

    grey = np.arange(40 * 60).reshape(40, 60)
    grey_8 = (grey % 256).astype(np.uint8)
    for pixels in (grey_8, (grey_8.astype(np.uint16) * 256 + 77)):  # 8 and 16 bits
        np.testing.assert_array_equal(saved(Image.fromarray(pixels)), np.repeat(grey_8[..., None], 3, 2))
    assert saved(Image.fromarray(grey_8), channels=1).shape == (40, 60)
    alpha = np.zeros((40, 60, 1), np.uint8)
    alpha[:, :30] = 255
    shown = saved(Image.fromarray(np.concatenate([COLORS, alpha], 2)))
    np.testing.assert_array_equal(shown[:, :30], COLORS[:, :30])
    assert (shown[:, 30:] == 255).all()
    palette = Image.fromarray(grey_8 % 2, 'P')
    palette.putpalette([10, 20, 30, 40, 50, 60])
    np.testing.assert_array_equal(saved(palette)[0, :2], [[10, 20, 30], [40, 50, 60]])
    np.testing.assert_array_equal(saved(palette, transparency=0)[0, :2], [[255] * 3, [40, 50, 60]])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    np.testing.assert_array_equal(saved(Image.fromarray(COLORS), exif=exif), np.rot90(COLORS, -1))
    assert saved(Image.new('CMYK', (40, 30)), 'image.jpg').shape == (30, 40, 3)
    assert saved(Image.new('1', (40, 30)), channels=4).shape == (30, 40, 4)


def test_a_wide_image(network, tmp_path):
    Image.new('RGB', (10_000, 300), 'red').save(tmp_path / 'wide.jpg')
    assert run(tmp_path / 'wide.jpg', '--model', network, '--output', tmp_path / 'gates.png') == 0


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('cifar_resnet20', 'cifar_resnet20 has no MS-SAR layer, so it has no gates to draw'),
        ('resnet18', 'resnet18 has no MS-SAR layer, so it has no gates to draw'),  # without asking the Hub for weights
        ('cifar_resnet56_msar', 'cifar_resnet56_msar has no pretrained weights; give its own with --checkpoint'),
        ('cifar_resnet20_msar.foo', 'cifar_resnet20_msar.foo'),
        ('resnet1_msar', 'resnet1_msar cannot be loaded: Unknown model (resnet1_msar)'),
        ('local-dir:nowhere', 'local-dir:nowhere cannot be loaded: '),
    ],
)
def test_a_network_that_cannot_be_drawn(name, message, photo, tmp_path, capsys):
    assert run(photo, '--model', name, '--output', tmp_path / 'gates') == 1
    (error,) = error_of(capsys)
    assert error.startswith(message)
    assert not (tmp_path / 'gates').exists()


def test_a_checkpoint_that_is_not_the_networks(photo, tmp_path, capsys):
    path = make_run(tmp_path)
    other, plain = tmp_path / 'other.safetensors', tmp_path / 'plain.safetensors'
    save_file(timm.create_model('cifar_resnet20_msar', num_classes=7).state_dict(), other)
    save_file(timm.create_model('cifar_resnet20').state_dict(), plain)
    text = tmp_path / 'text.safetensors'
    text.write_text('hello')
    fifo = tmp_path / 'fifo.safetensors'
    os.mkfifo(fifo)
    name = 'cifar_resnet20_msar'
    for model, checkpoint, message in (
        ('cifar_resnet56_msar', path, f'{path} is a checkpoint of {name}, not of cifar_resnet56_msar'),
        (
            name,
            other,
            f'the weights in {other} are not those of {name} with 10 classes: fc.weight is (7, 64), not (10, 64)',
        ),
        (name, plain, f'the weights in {plain} are not those of {name}: 324 tensors are missing'),
        (name, text, f'cannot read {text}: '),
        (name, fifo, f'cannot read {fifo}: it is not a file'),
        (name, tmp_path / 'none.safetensors', f'cannot read {tmp_path / "none.safetensors"}: No such file'),
        (name, tmp_path / 'none.pth.tar', f'cannot read {tmp_path / "none.pth.tar"}: No such file'),
        (name, photo, f'{photo} is not a checkpoint'),
    ):
        assert run(photo, '--model', model, '--checkpoint', checkpoint, '--output', tmp_path / 'gates') == 1
        (error,) = error_of(capsys)
        assert error.startswith(message), error
