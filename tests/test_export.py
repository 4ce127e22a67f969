"""From a checkpoint to a folder that timm loads: the same logits, the facts of this training, and no bad input."""

import argparse
import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from timm.models import register_model
from trained_run import CLASSES, logits, logits_of, make_run, resave, saved, weights

from timm_msar.cli import export
from timm_msar.cli.errors import CommandError
from timm_msar.cli.trained_run import load_trained, read_summary
from timm_msar_command import main


def run_export(checkpoint, output):
    export.main(argparse.Namespace(checkpoint=checkpoint, output=output))
    return output


def config_of(folder):
    return json.loads((folder / 'config.json').read_text())


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp('plain'))


@pytest.fixture
def copied(run, tmp_path):
    """A copy of the run to spoil; its data folder is gone."""
    return Path(shutil.copytree(run.parent, tmp_path / 'run')) / run.name


def test_the_exported_folder_holds_this_training_and_computes_the_same(run, tmp_path, capsys):
    output = run_export(run, tmp_path / 'new' / 'cifar_resnet20_msar.boots@2: x')
    assert sorted(path.name for path in output.iterdir()) == ['README.md', 'config.json', 'model.safetensors']
    assert len({path.stat().st_mode for path in output.iterdir()}) == 1

    loaded = timm.create_model(f'local-dir:{output}', pretrained=True)
    assert torch.equal(logits_of(loaded), logits(weights(run)))
    config = config_of(output)
    cfg = config['pretrained_cfg']
    assert (config['num_classes'], config['label_names'], cfg['tag']) == (3, list(CLASSES), 'boots@2: x')
    assert (cfg['input_size'], cfg['mean'], cfg['std']) == ([3, 32, 32], [0.219] * 3, [0.332] * 3)
    assert (cfg['interpolation'], cfg['crop_pct'], cfg['crop_mode']) == ('bilinear', 0.8, 'center')
    assert not {'url', 'hf_hub_id', 'file', 'license', 'origin_url'} & set(cfg)
    assert config['weights_sha256'] == hashlib.sha256((output / 'model.safetensors').read_bytes()).hexdigest()

    top1 = read_summary(run.with_name('summary.csv'))[1]['eval_top1']
    measured = ModelCard.load(output / 'README.md').data.eval_results[0].metric_value
    assert measured == pytest.approx(top1 / 100, abs=1e-6) and top1 > 0
    assert f'top1 {top1:.4g}' in capsys.readouterr().out


def test_arguments_of_the_network_are_kept(tmp_path):
    kwargs = {'scales': [1, 4], 'rd_ratio': 0.375, 'strategy': 'sliding'}
    run = make_run(tmp_path, channels_last=True, model_kwargs=kwargs)
    assert not all(tensor.is_contiguous() for tensor in weights(run).values())
    loaded = timm.create_model(f'local-dir:{run_export(run, tmp_path / "out")}', pretrained=True)
    assert torch.equal(logits_of(loaded), logits(weights(run), **kwargs))


def test_grey_images_have_the_average_of_three_means_as_in_timms_loader(tmp_path):
    run = make_run(tmp_path, input_size=[1, 32, 32], mean=None, std=None)
    config = config_of(run_export(run, tmp_path / 'out'))['pretrained_cfg']
    own = timm.get_pretrained_cfg('cifar_resnet20_msar')
    dataset = timm.data.create_dataset('', root=str(tmp_path / 'data'), split='train')
    options = dict(mean=own.mean, std=own.std, num_workers=0, device=torch.device('cpu'))
    loader = timm.data.create_loader(dataset, (1, 32, 32), 2, **options)
    for name in ('mean', 'std'):
        assert config[name] == pytest.approx((getattr(loader, name) / 255).flatten().tolist())


@register_model
def forgetful_resnet(pretrained=False, **kwargs):
    """A network with something that its config.json does not tell."""
    model = timm.create_model('cifar_resnet20', **kwargs)
    model.stages.register_forward_hook(lambda module, inputs, output: 2 * output)
    return model


def test_a_folder_that_would_compute_something_else_is_not_kept(tmp_path):
    with pytest.raises(CommandError, match='computes other logits than'):
        run_export(make_run(tmp_path, model='forgetful_resnet'), tmp_path / 'out')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['data', 'run']


@pytest.mark.parametrize(
    ('given', 'base_model', 'start'),
    [
        ({'pretrained': True}, 'timm/resnet18.a1_in1k', 'resnet18_msar.warm_a1_in1k'),
        ({'pretrained': True, 'pretrained_path': 'mine.safetensors'}, None, 'other weights'),
    ],
)
def test_the_card_names_the_weights_it_started_from_where_they_are_known(tmp_path, given, base_model, start):
    run_export(make_run(tmp_path, **{'model': 'resnet18_msar', **given}), tmp_path / 'out')
    card = ModelCard.load(tmp_path / 'out' / 'README.md')
    assert card.data.base_model == base_model
    assert f', fine-tuned from {start}. ' in card.text
    cfg = config_of(tmp_path / 'out')['pretrained_cfg']
    assert ('license' in cfg) == ('origin_url' in cfg) == bool(base_model)
    assert card.data.license == ('apache-2.0' if base_model else None)  # else it is the trainer's to choose


@pytest.mark.parametrize('classes', [10, 0])
def test_a_training_on_ten_other_classes_has_none_of_the_shipped_names(tmp_path, classes):
    """`cifar_resnet20_msar` has Fashion-MNIST's names by default, and as many classes as CIFAR-10."""
    others = [f'animal {i}' for i in range(classes)]
    for name in others:
        (tmp_path / 'cifar' / 'train' / name).mkdir(parents=True)
        (tmp_path / 'cifar' / 'train' / name / '0.png').touch()
    run = make_run(tmp_path, num_classes=10, pretrained=True, data_dir=str(tmp_path / 'cifar'))
    output = run_export(run, tmp_path / 'cifar_resnet20_msar.mine')
    model = timm.create_model(f'local-dir:{output}', pretrained=True)
    assert model.pretrained_cfg.get('label_names') == (others or None)
    assert not any('Sandal' in path.read_text() for path in output.glob('[!m]*'))


@pytest.mark.parametrize('force_cpu', [False, True])  # there train.py validates the plain weights
def test_the_weights_are_those_that_train_py_validated(tmp_path, force_cpu):
    run = make_run(tmp_path, ema=True, model_ema_force_cpu=force_cpu)
    plain, average = (logits(weights(run, key)) for key in ('state_dict', 'state_dict_ema'))
    assert not torch.equal(plain, average)
    loaded = timm.create_model(f'local-dir:{run_export(run, tmp_path / "out")}', pretrained=True)
    assert torch.equal(logits_of(loaded), plain if force_cpu else average)
    assert ('Weights (a moving average)' in (tmp_path / 'out' / 'README.md').read_text()) == (not force_cpu)


def test_traces_of_wrappers_and_split_norms_are_left_out(copied):
    good = weights(copied)
    for prefix in ('module.', '_orig_mod.module.'):
        resave(copied, state_dict={prefix + key: value for key, value in good.items()})
        assert torch.equal(logits_of(load_trained(copied)[0]), logits(good))
    model = timm.create_model('cifar_resnet20_msar', num_classes=3)
    split = timm.layers.convert_splitbn_model(model, 2).state_dict()
    assert any('.aux_bn.' in name for name in split)
    resave(copied, state_dict=split, args=None)  # the arguments are in args.yaml, too
    assert torch.equal(logits_of(load_trained(copied)[0]), logits_of(model.eval()))


def test_a_resumed_run_repeats_header_and_epochs(tmp_path):
    path, header = tmp_path / 'summary.csv', 'epoch,train_loss,eval_top1\n'
    path.write_text(header + '0,1,50\n1,0.9,60\n2,nan,61\n' + header + '1,0.8,65\n')
    assert [(row['epoch'], row['eval_top1']) for row in read_summary(path)] == [(0, 50.0), (1, 65.0)]
    wrong = ('0,1,50', '0,1\n', '0,x,1\n', '0.5,1,50\n', 'inf,1,50\n', 'nan,1,50\n')
    for damaged in ('', header, 'a,b\n1,2\n', *(header + line for line in wrong)):
        path.write_text(damaged)
        with pytest.raises(CommandError, match=r'line 2 of .*summary\.csv is missing or damaged'):
            read_summary(path)


def test_the_output_is_where_the_command_says(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ['export', str(run), '--output', 'a/../b/../oo']
    assert [main(words), main(words)] == [0, 1]
    out, err = capsys.readouterr()
    assert f'"local-dir:{tmp_path / "oo"}"' in out and (tmp_path / 'oo' / 'config.json').is_file()
    assert 'exists already' in err


def flip(path, position, bit):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def compress(path):
    """A file of 100 kB that unpacks to 100 MB."""
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('a/data.pkl', bytes(100_000_000))


def other_weights(name, *fill):
    return lambda path: resave(path, state_dict=weights(path) | {name: torch.full(*fill)})


def other_args(**changed):
    return lambda path: resave(path, args=argparse.Namespace(**{**vars(saved(path)['args']), **changed}))


def endless(item):
    for _ in range(30):
        item = [item, item]
    return item


NOT_WHOLE = 'is not a checkpoint of train.py, or is cut off or damaged'
BAD = {
    'a flipped bit': (lambda path: flip(path, path.stat().st_size // 2, 0), f'{NOT_WHOLE}: the checksum of'),
    # PyTorch's reader returns uninitialised memory for an entry that is marked as a folder.
    'a marked entry': (lambda path: flip(path, path.read_bytes().rfind(b'PK\1\2') + 38, 4), 'its directory is wrong'),
    'compressed': (compress, f'{NOT_WHOLE}: it is compressed'),
    'unsafe': (lambda path: resave(path, extra=Path('a')), 'could run any code'),
    'bare weights': (lambda path: torch.save(weights(path), path), 'it has no `epoch` and `state_dict`'),
    'the plain network': (other_args(model='cifar_resnet20'), 'does not fit cifar_resnet20 with 3 classes: stages'),
    'half a network': (lambda path: resave(path, state_dict={}), 'does not fit cifar_resnet20_msar'),
    'on the Hub': (other_args(model='hf-hub:me/x'), 'give the network by its name in timm, not as hf-hub:me/x'),
    'other class count': (other_args(num_classes=7), 'does not fit .* with 7 classes: fc.bias differs'),
    'complex numbers': (other_weights('fc.bias', (3,), 1j), 'does not fit .*: fc.bias differs'),
    'fractions': (other_weights('stem.bn.num_batches_tracked', (), 0.5), 'stem.bn.num_batches_tracked differs'),
    'half an epoch': (lambda path: resave(path, epoch=0.5), 'its `epoch` is no whole number'),
    'endless arguments': (other_args(opt=endless('sgd')), 'it names no model, or holds far more'),
    'NaN': (other_weights('fc.bias', (3,), torch.nan), 'infinite numbers in fc.bias'),
    'infinite logits': (other_weights('fc.weight', (3, 64), 3e38), 'logits .* are NaN or infinite'),
    'no name': (lambda p: (resave(p, args=None), p.with_name('args.yaml').write_text('a: 1')), 'it names no model'),
    'other run': (lambda path: resave(path, metric=1.5), 'summary.csv is of another run: its eval_top1 is .*, not 1.5'),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing(name, copied, tmp_path):
    spoil, sentence = BAD[name]
    spoil(copied)
    with pytest.raises(CommandError, match=sentence) as error:
        run_export(copied, tmp_path / 'out')
    assert '\n' not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['run']


def test_a_lack_of_memory_is_not_called_damage_and_leaves_nothing(copied, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, 'load', lambda *args, **kwargs: torch.empty(2**50))
    assert main(['export', str(copied), '--output', str(tmp_path / 'out')]) == 1
    error = capsys.readouterr().err
    assert error.startswith('timm-msar export: error: ') and error.count('\n') == 1
    assert "can't allocate memory" in error and 'damaged' not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ['run']
