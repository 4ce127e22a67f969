"""The demo's parts that its own run does not check. The whole of it takes two minutes: `make demo`."""

import pytest
import timm
import torch

pytest.importorskip('sklearn')
from timm_msar import demo


def test_what_it_saves_prepares_images_as_it_tested_them(tmp_path):
    demo.save(timm.create_model('cifar_resnet20_msar'), tmp_path / 'weights')
    loaded = timm.create_model(f'local-dir:{tmp_path / "weights"}', pretrained=True)
    assert loaded.pretrained_cfg['tag'] == 'digits' and loaded.pretrained_cfg['label_names'][7] == '7'
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(loaded), is_training=False)
    image, _ = demo.Digits(held_out=True)[0]
    tested, _ = next(iter(demo.loader(demo.Digits(held_out=True), is_training=False)))
    torch.testing.assert_close(transform(image), tested[0])
