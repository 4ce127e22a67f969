"""`timm-msar gates`: what the pictures show, which files there are, and what cannot be drawn."""

import os

import numpy as np
import pytest
import timm
import torch
from matplotlib.figure import Figure
from PIL import Image
from timm.models import save_for_hf
from trained_run import CLASSES, make_run, weights

import timm_msar
from timm_msar.cli import gates
from timm_msar.cli.inference import Network
from timm_msar_command import main

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
def image(tmp_path):
    path = tmp_path / 'image.png'
    Image.fromarray(COLORS).save(path)
    return path


def run(*words):
    return main(['gates', *map(str, words)])


def test_an_inspection_is_what_the_network_computes(network):
    model = timm.create_model(network, pretrained=True).eval()
    config = timm.data.resolve_model_data_config(model)
    x = timm.data.create_transform(**config, is_training=False)(Image.fromarray(COLORS))[None]
    seen = gates.inspect(Network('', model, config, CLASSES), x)
    with torch.no_grad():
        probability, index = model(x).softmax(1).max(1)
    assert seen.prediction == f'{CLASSES[index]} ({probability.item():.3%})'
    # 40×60 is resized to 32×48, of which the middle 32 columns are seen
    shown = Image.fromarray(COLORS).resize((48, 32), Image.Resampling.BILINEAR).crop((8, 0, 40, 32))
    np.testing.assert_allclose(seen.image, np.asarray(shown) / 255, atol=1e-6)

    z, per_scale = timm_msar.gates(model, x), timm_msar.gates(model, x, per_scale=True)
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
    network = Network('', model, {'mean': (0, 0, 0), 'std': (1, 1, 1)}, range(1000))
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


def test_the_images_of_a_folder_that_can_be_read_are_drawn(network, image, tmp_path, capsys):
    """Some names are not UTF-8, or have line breaks or formulas in them."""
    images, output = tmp_path / 'images', tmp_path / 'new' / 'gates.png'
    for name in ('b/1.JPG', os.fsdecode(b'\xff.png'), 'a\n$x^$.png'):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(COLORS).save(images / name, 'png')
    (images / 'text.png').write_text('hello')
    (images / 'notes.txt').touch()
    (images / 'loop.png').symlink_to('loop.png')
    assert run(images, image, image, tmp_path / 'none.png', '--model', network, '--output', output) == 1
    assert [path.name for path in output.parent.iterdir()] == ['gates.png'] and Image.open(output).height > 4 * 150
    out, err = capsys.readouterr()
    assert [line.partition(': ')[0] for line in out.splitlines()] == [
        *(f'{images}/{name}' for name in ('a\\n$x^$.png', 'b/1.JPG', '\\udcff.png')),
        str(image),
        f'drawn in {output}',
    ]
    assert len(err.splitlines()) == 4 and err.endswith('error: 3 of 7 images cannot be read\n')


def test_names_of_the_output(network, image, tmp_path, capsys):
    for _ in range(2):  # an earlier picture is replaced
        assert run(image, '--model', network, '--output', tmp_path / 'gates.png') == 0
    assert Image.open(tmp_path / 'gates.png').format == 'PNG'
    for words, message in (
        ((image, '--output', image), 'none of the images'),
        ((image, '--output', tmp_path / 'g.jpg'), 'must end in .png'),
        ((*[tmp_path / f'{i}.png' for i in range(33)], '--output', tmp_path / 'g.png'), 'too many for one picture'),
        ((tmp_path / 'none.png', '--output', tmp_path / 'g.png'), '1 of 1 images cannot be read'),
        ((image, '--output', tmp_path / 'g.png', '--model', 'cifar_resnet20'), 'has no MultiScaleRecalibration layer'),
    ):
        assert run('--model', network, *words) == 1
        assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ['gates.png', 'image.png']
