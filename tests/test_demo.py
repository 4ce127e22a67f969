"""The demo on few digits. With all of them it takes two minutes: `make demo`."""

import re

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

pytest.importorskip('sklearn')
from sklearn import datasets

from timm_msar.cli import demo
from timm_msar_command import main


@pytest.fixture
def digits(monkeypatch):
    """The first 100 digits, in place of all."""
    few = datasets.load_digits()
    few.images, few.target = few.images[:100], few.target[:100]
    monkeypatch.setattr(datasets, 'load_digits', lambda: few)
    return few


def test_weights_follow_from_the_digits_that_are_not_held_out(digits, tmp_path, capsys, monkeypatch):
    inspected, draw = [], demo.draw
    monkeypatch.setattr(demo, 'draw', lambda seen, *args: (inspected.extend(seen), draw(seen, *args)))

    def run(name):
        output = tmp_path / name
        assert main(['demo', '--output', str(output), '--epochs', '2']) == 0
        out, err = capsys.readouterr()
        assert err == ''  # no progress bar where there is no terminal
        assert "cifar_resnet20_msar, trained on 80 of scikit-learn's handwritten digits\n" in out
        accuracy = re.search(r'^held-out accuracy +([\d.]+) % of the 20 other digits, after 2 epochs', out, re.M)[1]
        assert Image.open(output / 'gates.png').width > 1000
        return load_file(output / 'weights' / 'model.safetensors'), float(accuracy)

    weights, accuracy = run('a')
    assert (weights['stages.0.0.bn1.weight'] != 1).all()  # as it was before training
    assert weights['stem.bn.num_batches_tracked'] == 2  # of 80 digits, in batches of 64

    model = timm.create_model(f'local-dir:{tmp_path / "a" / "weights"}', pretrained=True).eval()
    assert model.pretrained_cfg['tag'] == 'digits' and model.pretrained_cfg['label_names'][7] == '7'
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    images = torch.stack([transform(image) for image in demo.Digits(held_out=True).images])
    tested, _ = next(iter(demo.loader(demo.Digits(held_out=True), is_training=False)))
    torch.testing.assert_close(images, tested)
    with torch.no_grad():
        predicted = model(images).argmax(1).numpy()
    assert accuracy == 100 * (predicted == digits.target[4::5]).mean()
    said = [seen.prediction.partition(' (')[0] for seen in inspected]
    assert said == [f'label: {y}\n{p}' for y, p in zip(digits.target[4::5], predicted)][:16:2]
    digits.target[4::5] = predicted
    again, accuracy = run('b')
    assert accuracy == 100 and all(torch.equal(value, weights[name]) for name, value in again.items())
