"""`timm-msar predict` and `gates`: how images are read, what is printed and drawn, and what cannot be."""

import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from matplotlib.figure import Figure
from PIL import Image
from trained_run import CLASSES, make_run, weights

import timm_msar
from timm_msar.cli import gates, inference
from timm_msar_command import main

COLORS = np.arange(40 * 60 * 3, dtype=np.uint8).reshape(40, 60, 3)
NAME = 'cifar_resnet20_msar'


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A checkpoint of a network whose gates have been trained a little."""
    return make_run(tmp_path_factory.mktemp('trained'))


@pytest.fixture
def image(tmp_path):
    path = tmp_path / 'image.png'
    Image.fromarray(COLORS).save(path)
    return path


def run(*words):
    return main([*map(str, words)])


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
    assert run('predict', image, '--checkpoint', checkpoint) == 0
    assert capsys.readouterr().out.splitlines() == [str(image), *lines]

    assert run('export', checkpoint, '--output', tmp_path / 'exported') == 0
    capsys.readouterr()
    assert run('predict', tmp_path, '--model', f'local-dir:{tmp_path / "exported"}') == 1  # data/ has empty files
    out, err = capsys.readouterr()
    assert '\n'.join([str(image), *lines]) in out and '3 of 4 images cannot be read' in err

    file = tmp_path / 'exported' / 'model.safetensors'
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    assert run('predict', image, '--model', f'local-dir:{file.parent}') == 1
    assert 'its SHA-256 is not the one in config.json' in capsys.readouterr().err


def test_numbers_where_there_are_no_names_and_the_names_of_imagenet(tmp_path, image, capsys, monkeypatch):
    checkpoint = make_run(tmp_path, num_classes=7)  # its data has three
    assert run('predict', image, '--checkpoint', checkpoint) == 0
    assert capsys.readouterr().out.count('%  class ') == 5

    imagenet = timm.create_model('resnet18', num_classes=1000)
    monkeypatch.setattr(timm, 'create_model', lambda *args, **kwargs: imagenet)
    config = timm.data.resolve_model_data_config(imagenet)
    (best, index), *_ = expected(image, imagenet, **config)
    assert run('predict', image, '--model', 'resnet18') == 0
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
    frames = {'save_all': True, 'append_images': [rgba, grey]}
    for name, image, kwargs in (
        *(('1.png', grey, {}), ('2.jpeg', color.convert('CMYK'), {}), ('3.png', grey.convert('1'), {})),
        *(('4.png', rgba, {}), ('5.png', la, {}), ('6.png', palette, {'transparency': 0})),
        *(('7.png', palette, {'transparency': b'\0\x80\xff'}), ('8.png', color, {'transparency': (0, 1, 2)})),
        *(('9.jpg', color, {'exif': exif}), ('10.png', color, {'exif': exif}), ('11.png', color.convert('RGBA'), {})),
        *(('12.png', rgba, {'format': 'gif'} | frames), ('13.jpg', grey, {'format': 'tiff'} | frames)),
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
    assert run('predict', tmp_path / 'deep.png', '--checkpoint', checkpoint) == 1
    assert 'its values have more than 8 bits' in capsys.readouterr().err


def test_an_inspection_is_what_the_network_computes(trained, image):
    network = inference.load('', trained)
    ((_, x),) = inference.prepared([image], network)
    seen = gates.inspect(network, x)
    with torch.no_grad():
        probability, index = network.model(x).softmax(1).max(1)
    assert seen.prediction == f'{CLASSES[index]} ({probability.item():.3%})'
    np.testing.assert_allclose(seen.image, COLORS[4:36, 14:46] / 255, atol=1e-6)  # crop_pct is 0.8: 32 of 40 pixels

    z, per_scale = timm_msar.gates(network.model, x), timm_msar.gates(network.model, x, per_scale=True)
    assert list(seen.maps) == ['stages.0.2.se', 'stages.1.2.se', 'stages.2.2.se']
    for name, maps in seen.maps.items():
        assert [title for title, _ in maps[3:]] == ['mean of channels', 'mean, K = 1', 'mean, K = 2', 'mean, K = 4']
        np.testing.assert_allclose(maps[3][1], z[name][0].mean(0), rtol=1e-5)
        for (_, shown_map), z_k in zip(maps[4:], per_scale[name].values()):
            np.testing.assert_allclose(shown_map, z_k[0].mean(0), rtol=1e-5)
        spread = z[name][0].flatten(1).std(1)
        channels = [int(title.removeprefix('channel ')) for title, _ in maps[:3]]
        assert spread[channels].min() >= spread.sort(descending=True).values[2]
        np.testing.assert_allclose(maps[0][1], z[name][0, channels[0]], rtol=1e-5)


def test_the_last_layer_of_each_stage():
    model = timm.create_model('resnext50_msar', layers=(1, 2, 1, 1)).eval()
    network = inference.Network('', model, {'mean': (0, 0, 0), 'std': (1, 1, 1)}, range(1000))
    seen = gates.inspect(network, torch.randn(1, 3, 32, 32))
    assert list(seen.maps) == ['layer1.0.se', 'layer2.1.se', 'layer3.0.se', 'layer4.0.se']


def test_captions_tell_how_far_gates_moved_and_stand_apart_from_titles(tmp_path, monkeypatch):
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, 'savefig', lambda self, *args, **kw: figures.append(self) or save(self, *args, **kw))

    def drawn(*maps):
        inspected = [
            gates.Inspection(np.zeros((4, 4)), 'label\nprediction', {'layer': [('a', z), ('b', z)]}) for z in maps
        ]
        gates.draw(inspected, 'title', tmp_path / 'gates.png')
        return [figure_axes.get_xlabel() for figure_axes in figures[-1].axes[1:-1:3]], figures[-1].get_suptitle()

    closed, moved, trained, broken = (
        np.array(2 * [row]) for row in ((0.5,) * 2, (0.5, 0.500123), (0.3004, 0.5321), (0.5, np.nan))
    )
    captions, title = drawn(closed, moved)
    assert captions == ['0.500000', '0.500000 to 0.500123']
    assert title.endswith(' No gate shown is further than 0.00012 from 0.5, where a warm start begins.')
    captions, title = drawn(moved, trained, broken)
    assert captions == ['0.500000 to 0.500123', '0.300 to 0.532', 'nan'] and 'further' not in title
    above, below = figures[-1].axes[1].xaxis.label.get_window_extent(), figures[-1].axes[4].title.get_window_extent()
    assert above.y0 - below.y1 > 5  # pixels


def test_the_images_of_a_folder_that_can_be_read_are_drawn(trained, image, tmp_path, capsys):
    """Some names are not UTF-8, or have line breaks or formulas in them."""
    images, output = tmp_path / 'images', tmp_path / 'new' / 'gates.png'
    for name in ('b/1.JPG', os.fsdecode(b'\xff.png'), 'a\n$x^$.png'):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(COLORS).save(images / name, 'png')
    (images / 'text.png').write_text('hello')
    (images / 'notes.txt').touch()
    (images / 'loop.png').symlink_to('loop.png')
    assert run('gates', images, image, image, tmp_path / 'none.png', '--checkpoint', trained, '--output', output) == 1
    assert [path.name for path in output.parent.iterdir()] == ['gates.png'] and Image.open(output).height > 4 * 150
    out, err = capsys.readouterr()
    assert [line.partition(': ')[0] for line in out.splitlines()] == [
        *(f'{images}/{name}' for name in ('a\\n$x^$.png', 'b/1.JPG', '\\udcff.png')),
        str(image),
        f'drawn in {output}',
    ]
    assert len(err.splitlines()) == 4 and err.endswith('error: 3 of 7 images cannot be read\n')


def test_names_of_the_output(trained, image, tmp_path, capsys):
    for _ in range(2):  # an earlier picture is replaced
        assert run('gates', image, '--checkpoint', trained, '--output', tmp_path / 'gates.png') == 0
    assert Image.open(tmp_path / 'gates.png').format == 'PNG'
    for words, message in (
        ((image, '--output', image), 'none of the images'),
        ((image, '--output', tmp_path / 'g.jpg'), 'must end in .png'),
        ((*[tmp_path / f'{i}.png' for i in range(33)], '--output', tmp_path / 'g.png'), 'too many for one picture'),
        ((tmp_path / 'none.png', '--output', tmp_path / 'g.png'), '1 of 1 images cannot be read'),
        ((image, '--output', tmp_path / 'g.png', '--model', 'cifar_resnet20'), 'has no MultiScaleRecalibration layer'),
    ):
        assert run('gates', '--model', NAME, *words) == 1
        assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ['gates.png', 'image.png']
