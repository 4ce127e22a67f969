"""From a checkpoint to a folder that timm loads: the same logits, the facts of this training, and no bad input."""

import argparse
import hashlib
import json
import os
import pickle
import subprocess
import sys
import zipfile

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from timm.models import register_model
from trained_run import CLASSES, logits, logits_of, make_run, resave, weights

from timm_msar import cli
from timm_msar.cli import export
from timm_msar.cli.checkpoint import load_trained
from timm_msar.cli.errors import CommandError


def run_export(checkpoint, output, *options):
    parser = argparse.ArgumentParser()
    export.add_arguments(parser)
    export.main(parser.parse_args([str(checkpoint), '--output', str(output), *options]))


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp('plain'))


@pytest.fixture(scope='module')
def ema_run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp('ema'), ema=True)


@pytest.fixture
def copied(run, tmp_path):
    """A copy of the run to spoil; its data folder is gone."""
    folder = tmp_path / 'run'
    folder.mkdir()
    for path in run.parent.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder / run.name


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns


def test_the_exported_folder_holds_this_training_and_computes_the_same(run, tmp_path, capsys):
    before = digest(run)
    output = tmp_path / 'new' / 'cifar_resnet20_msar.boots@2: x'
    run_export(run, output)
    assert sorted(path.name for path in output.iterdir()) == ['README.md', 'config.json', 'model.safetensors']
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    assert digest(run) == before
    assert len({path.stat().st_mode for path in output.iterdir()}) == 1

    loaded = timm.create_model(f'local-dir:{output}', pretrained=True)
    assert torch.equal(logits_of(loaded), logits(weights(run)))
    assert not torch.equal(logits_of(timm.create_model('cifar_resnet20_msar', num_classes=3)), logits(weights(run)))

    config = json.loads((output / 'config.json').read_text())
    cfg = config['pretrained_cfg']
    assert (config['architecture'], config['num_classes']) == ('cifar_resnet20_msar', 3)
    assert config['label_names'] == list(CLASSES)
    assert cfg['tag'] == 'boots@2: x'
    assert (cfg['input_size'], cfg['mean'], cfg['std']) == ([3, 32, 32], [0.219] * 3, [0.332] * 3)
    assert (cfg['interpolation'], cfg['crop_pct'], cfg['crop_mode']) == ('bilinear', 0.8, 'center')
    assert not {'url', 'hf_hub_id', 'file', 'license', 'origin_url'} & set(cfg)
    assert 'num_classes' not in config.get('model_args', {})
    assert config['weights_sha256'] == hashlib.sha256((output / 'model.safetensors').read_bytes()).hexdigest()
    assert config['weights_sha256'] in (output / 'README.md').read_text()

    results = load_trained(run).results
    assert 0 < results['top1'] <= 100 and results['top5'] >= results['top1']
    card = ModelCard.load(output / 'README.md')
    measured = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert measured['Top-1 accuracy'] == pytest.approx(results['top1'] / 100, abs=1e-6)
    assert f'top1 {results["top1"]:.4g}' in capsys.readouterr().out


def test_without_a_tag_the_name_of_the_run_is_the_tag(run, tmp_path):
    run_export(run, tmp_path / 'folder')
    assert json.loads((tmp_path / 'folder' / 'config.json').read_text())['pretrained_cfg']['tag'] == 'run'


def test_arguments_of_the_network_are_kept(tmp_path):
    kwargs = {'scales': [1, 4], 'rd_ratio': 0.375, 'strategy': 'sliding'}
    run = make_run(tmp_path, model_kwargs=kwargs, channels_last=True)
    assert not all(tensor.is_contiguous() for tensor in weights(run).values())
    run_export(run, tmp_path / 'out')
    loaded = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    assert torch.equal(logits_of(loaded), logits(weights(run), **kwargs))


def test_grey_images_have_the_average_of_three_means_as_in_timms_loader(tmp_path):
    run = make_run(tmp_path, input_size=[1, 32, 32], mean=None, std=None)
    run_export(run, tmp_path / 'out')
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 1, 32, 32)).shape == (1, len(CLASSES))
    config = timm.data.resolve_model_data_config(model)
    own = timm.get_pretrained_cfg('cifar_resnet20_msar')
    loader = timm.data.create_loader(
        timm.data.create_dataset('', root=str(tmp_path / 'data'), split='train'),
        (1, 32, 32),
        2,
        mean=own.mean,
        std=own.std,
        num_workers=0,
        device=torch.device('cpu'),
    )
    assert config['mean'] == pytest.approx((loader.mean / 255).flatten().tolist())
    assert config['std'] == pytest.approx((loader.std / 255).flatten().tolist())

    Image.new('L', (40, 50), 77).save(tmp_path / 'photo.png')
    arguments = [str(tmp_path / 'photo.png'), '--model', 'cifar_resnet20_msar', '--checkpoint', str(run)]
    assert cli.main(['gates', *arguments, '--output', str(tmp_path / 'gates.png')]) == 0


@register_model
def forgetful_resnet(pretrained=False, **kwargs):
    """A network with something that its config.json does not tell."""
    model = timm.create_model('cifar_resnet20', **kwargs)
    model.stages.register_forward_hook(lambda module, inputs, output: 2 * output)
    return model


def test_a_folder_that_would_compute_something_else_is_not_made(tmp_path):
    run = make_run(tmp_path, model='forgetful_resnet')
    with pytest.raises(CommandError, match=r'loaded back computes other logits than .*; it is not exported'):
        run_export(run, tmp_path / 'out')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['data', 'run']


@pytest.mark.parametrize(
    ('given', 'base_model', 'start'),
    [
        ({}, None, None),
        ({'pretrained': True}, 'timm/resnet18.a1_in1k', 'resnet18_msar.warm_a1_in1k'),
        ({'pretrained': True, 'model': 'cifar_resnet20_msar'}, None, 'cifar_resnet20_msar.fashion_mnist'),
        ({'pretrained': True, 'pretrained_path': 'mine.safetensors'}, None, 'other weights'),
        ({'pretrained_path': 'mine.safetensors'}, None, None),  # without --pretrained train.py does not load it
        ({'initial_checkpoint': 'mine.safetensors'}, None, 'other weights'),
    ],
)
def test_the_card_names_the_weights_it_started_from_where_they_are_known(tmp_path, given, base_model, start):
    run_export(make_run(tmp_path, **{'model': 'resnet18_msar', **given}), tmp_path / 'out')
    card = ModelCard.load(tmp_path / 'out' / 'README.md')
    assert card.data.base_model == base_model
    assert (f', fine-tuned from {start}. ' in card.text) if start else ('fine-tuned' not in card.text)
    cfg = json.loads((tmp_path / 'out' / 'config.json').read_text())['pretrained_cfg']
    known = start not in (None, 'other weights')
    assert ('license' in cfg) == known and ('origin_url' in cfg) == bool(base_model)
    assert card.data.license == ('apache-2.0' if known else None)  # else the trainer's own choice
    assert 'network with Multi-Scale' in card.text and 'It needs the package' in card.text


def test_networks_of_timm_are_exported_too(tmp_path):
    """A plain one is the comparison for one with MS-SAR; `bn_eps` is an argument that changes what it computes."""
    run = make_run(tmp_path, model='test_efficientnet', bn_eps=0.05)
    run_export(run, tmp_path / 'out')
    loaded = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    expected = logits(weights(run), 'test_efficientnet', bn_eps=0.05)
    assert torch.equal(logits_of(loaded), expected)
    assert not torch.equal(logits(weights(run), 'test_efficientnet'), expected)
    card = (tmp_path / 'out' / 'README.md').read_text()
    assert 'network without Multi-Scale' in card and 'It needs the package' not in card


def test_the_average_is_taken_where_train_py_validated_it(ema_run, tmp_path):
    plain, average = (logits(weights(ema_run, key)) for key in ('state_dict', 'state_dict_ema'))
    assert not torch.equal(plain, average)
    for ema, expected, measured in (('auto', average, True), ('yes', average, True), ('no', plain, False)):
        trained = load_trained(ema_run, ema)
        assert torch.equal(logits_of(trained.model), expected)
        assert bool(trained.results) == measured  # the results of the average are not those of the plain weights
    run_export(ema_run, tmp_path / 'plain', '--ema', 'no')
    card = ModelCard.load(tmp_path / 'plain' / 'README.md')
    assert card.data.eval_results is None and 'not measured' in card.text

    forced = make_run(tmp_path / 'forced', ema=True, model_ema_force_cpu=True)  # train.py validates the plain weights
    trained = load_trained(forced)
    assert torch.equal(logits_of(trained.model), logits(weights(forced))) and trained.results
    assert torch.equal(logits_of(load_trained(forced, 'yes').model), logits(weights(forced, 'state_dict_ema')))


@pytest.mark.parametrize('prefix', ['module.', '_orig_mod.', '_orig_mod.module.', 'module._orig_mod.'])
def test_wrappers_leave_no_trace(copied, prefix):
    expected = logits(weights(copied))
    resave(copied, state_dict={prefix + key: value for key, value in weights(copied).items()})
    assert torch.equal(logits_of(load_trained(copied).model), expected)


@pytest.mark.parametrize(
    ('given', 'told'),
    [
        ({'world_size': 8, 'grad_accum_steps': 2}, 'batch size 192 (8 processes × 12 images × 2 accumulated steps)'),
        ({'world_size': 1}, 'batch size 12.'),
        ({'grad_accum_steps': 4}, 'batch size 48 of each process'),
    ],
)
def test_the_card_tells_how_many_images_an_update_sees(tmp_path, given, told):
    run_export(make_run(tmp_path, **given), tmp_path / 'out')
    assert told in (tmp_path / 'out' / 'README.md').read_text()


def test_a_checkpoint_of_split_bn_is_exported_without_the_auxiliary_norms(copied, tmp_path):
    expected = logits(weights(copied))
    model = timm.create_model('cifar_resnet20_msar', num_classes=3)
    model.load_state_dict(weights(copied))
    split = timm.layers.convert_splitbn_model(model, 2).state_dict()
    assert any('.aux_bn.' in name for name in split)
    other_args(split_bn=True, aug_splits=2)(copied)
    resave(copied, state_dict=split)
    assert torch.equal(logits_of(load_trained(copied).model), expected)


def test_the_pipeline_of_transformers_loads_the_folder(run, tmp_path):
    transformers = pytest.importorskip('transformers')
    run_export(run, tmp_path / 'out')
    classify = transformers.pipeline('image-classification', model=str(tmp_path / 'out'), device='cpu')
    image = Image.linear_gradient('L').resize((40, 40)).convert('RGB')
    answers = {answer['label']: answer['score'] for answer in classify(image)}
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        expected = model(transform(image)[None]).softmax(1)[0]
    assert [answers[name] for name in CLASSES] == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize('names', [('Cat', 'cat'), ('1', '01'), ('²', 'a'), ('a1', 'A01')])
def test_class_names_that_timm_cannot_order_are_refused(copied, tmp_path, names):
    for name in (*names, 'other'):
        (tmp_path / 'images' / 'train' / name).mkdir(parents=True)
        (tmp_path / 'images' / 'train' / name / '0.png').touch()
    other_args(data_dir=str(tmp_path / 'images'))(copied)
    with pytest.raises(CommandError, match=r'timm (numbers|cannot number)'):
        run_export(copied, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_the_tag_of_the_base_does_not_stay(tmp_path):
    run = make_run(tmp_path, model='cifar_resnet20_msar.fashion_mnist')
    run_export(run, tmp_path / 'cifar_resnet20_msar.mine')
    cfg = json.loads((tmp_path / 'cifar_resnet20_msar.mine' / 'config.json').read_text())
    assert (cfg['architecture'], cfg['pretrained_cfg']['tag']) == ('cifar_resnet20_msar', 'mine')


def test_a_cleaned_checkpoint_takes_its_arguments_from_args_yaml(copied):
    expected = logits(weights(copied))
    resave(copied, args=None)
    assert torch.equal(logits_of(load_trained(copied).model), expected)


def test_a_resumed_run_repeats_header_and_epoch(copied):
    summary = copied.with_name('summary.csv')
    lines = summary.read_text().splitlines()
    summary.write_text('\n'.join([*lines, lines[0], lines[-1]]) + '\n')
    assert load_trained(copied).results == load_trained(copied).results != {}


class Unsafe:
    """Writes a file if it is unpickled by a reader that trusts the file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


def spoil_summary(old, new):
    def spoil(path):
        summary = path.with_name('summary.csv')
        summary.write_text(summary.read_text().replace(old, new))

    return spoil


def nan_in_weights(path):
    state_dict = weights(path)
    next(iter(state_dict.values()))[0, 0, 0, 0] = float('nan')
    resave(path, state_dict=state_dict)


def flip_in_weights(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def set_last(column, value):
    def spoil(path):
        summary = path.with_name('summary.csv')
        *before, last = summary.read_text().splitlines()
        cells = last.split(',')
        cells[before[0].split(',').index(column)] = value
        summary.write_text('\n'.join([*before, ','.join(cells), '']))

    return spoil


def other_args(**changed):
    def spoil(path):
        with torch.serialization.safe_globals([argparse.Namespace]):
            args = torch.load(path, weights_only=True)['args']
        resave(path, args=argparse.Namespace(**{**vars(args), **changed}))

    return spoil


BAD = {
    'missing': (lambda path: path.unlink(), 'cannot read .*: No such file'),
    'a folder': (lambda path: (path.unlink(), path.mkdir()), 'it is not a file'),
    'empty': (lambda path: path.write_bytes(b''), 'is not a checkpoint, or is cut off'),
    'text': (lambda path: path.write_text('epoch,top1\n'), 'is not a checkpoint, or is cut off'),
    'cut off': (lambda path: path.write_bytes(path.read_bytes()[:-1000]), 'is not a checkpoint, or is cut off'),
    'a bit flipped': (flip_in_weights, 'is damaged .*Bad CRC-32'),
    'a pickle': (lambda path: path.write_bytes(pickle.dumps({'epoch': 1})), 'is not a checkpoint'),
    'unsafe': (lambda path: resave(path, extra=Unsafe(path.with_name('ran'))), r'holds Python objects \(io.open\)'),
    'another zip': (lambda path: zipfile.ZipFile(path, 'w').writestr('a.txt', 'hello'), 'not a checkpoint of train.py'),
    'bare weights': (lambda path: torch.save(weights(path), path), 'has no `epoch` and `state_dict`'),
    'a tensor': (lambda path: torch.save(torch.zeros(3), path), 'has no `epoch` and `state_dict`'),
    'no weights': (lambda path: resave(path, state_dict=None), 'has no `state_dict`'),
    'odd weights': (lambda path: resave(path, state_dict={'a': 3}), 'not a table of tensors'),
    'another network': (
        other_args(model='cifar_resnet56_msar'),
        'not those of cifar_resnet56_msar: .* tensors are missing',
    ),
    'the plain network': (other_args(model='cifar_resnet20'), 'tensors are not in the network'),
    'a plain checkpoint': (lambda path: resave(path, state_dict=plain_weights()), 'tensors are missing'),
    'unknown network': (other_args(model='resnet_of_mine'), 'cannot be built again: Unknown model'),
    'unknown argument': (other_args(model_kwargs={'size': 3}), 'cannot be built again'),
    'other class count': (other_args(num_classes=7), r'with 7 classes: fc.weight is \(3, 64\), not \(7, 64\)'),
    'NaN': (nan_in_weights, 'NaN or infinite numbers in stem.conv.weight'),
    'no arguments': (
        lambda path: (resave(path, args=None), path.with_name('args.yaml').unlink()),
        'cannot read .*args.yaml',
    ),
    'bad args.yaml': (
        lambda p: (resave(p, args=None), p.with_name('args.yaml').write_text('a: [')),
        'cannot read .*args.yaml',
    ),
    'no model': (lambda p: (resave(p, args=None), p.with_name('args.yaml').write_text('a: 1')), 'names no model'),
    'no summary': (lambda path: path.with_name('summary.csv').unlink(), 'cannot read .*summary.csv'),
    'binary summary': (lambda path: path.with_name('summary.csv').write_bytes(b'\xff\x00' * 9), 'summary.csv'),
    'no metric': (spoil_summary('eval_top1', 'eval_else'), 'has no column eval_top1'),
    'no such epoch': (spoil_summary('\n1,', '\n7,'), 'has no eval_top1 for epoch 1'),
    'NaN loss': (set_last('eval_loss', 'nan'), 'has eval_loss nan for epoch 1: it diverged'),
    'cut summary': (lambda p: p.with_name('summary.csv').write_text('epoch,eval_top1\n1'), 'has no column train_loss'),
    'other run': (lambda path: resave(path, metric=1.5), 'is of another run'),
    'recovery': (lambda path: resave(path, metric=None), 'was never validated'),
}


def plain_weights():
    return timm.create_model('cifar_resnet20', num_classes=3).state_dict()


@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing(name, copied, tmp_path):
    spoil, sentence = BAD[name]
    spoil(copied)
    before = digest(copied) if copied.is_file() else None
    with pytest.raises(CommandError, match=sentence) as error:
        run_export(copied, tmp_path / 'out')
    assert '\n' not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['run']
    assert not copied.with_name('ran').exists()
    assert before == (digest(copied) if copied.is_file() else None)


def test_the_average_must_be_there_and_the_output_must_not(copied, tmp_path):
    with pytest.raises(CommandError, match='has no EMA weights'):
        run_export(copied, tmp_path / 'out', '--ema', 'yes')
    (tmp_path / 'out').mkdir()
    with pytest.raises(CommandError, match='exists already'):
        run_export(copied, tmp_path / 'out')
    (tmp_path / 'file').touch()
    with pytest.raises(CommandError, match='cannot write'):
        run_export(copied, tmp_path / 'file' / 'out')


LIMITED = """
import argparse, pathlib, resource, sys
from timm_msar.cli import export
from timm_msar.cli.errors import CommandError

resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
parser = argparse.ArgumentParser()
export.add_arguments(parser)
try:
    export.main(parser.parse_args(sys.argv[1:]))
except CommandError as error:
    print('ERROR', error)
"""


def test_a_full_disk_leaves_nothing(run, tmp_path):
    """A disk of 700 kB where one can be mounted; everywhere, a kernel that lets no file grow over 500 kB."""
    disk = tmp_path / 'disk'
    disk.mkdir()
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    full = LIMITED.replace('resource.setrlimit', '(lambda *_: None)')
    mounted = subprocess.run(['unshare', '-rm', 'mount', '-t', 'tmpfs', 'tmpfs', str(disk)], capture_output=True)
    commands = [([sys.executable, '-c', LIMITED], 'File too large')]
    if mounted.returncode == 0:
        mount = f'mount -t tmpfs -o size=700k tmpfs {disk} && "$@" && ls -A {disk}'
        command = ['unshare', '-rm', 'sh', '-c', mount, 'sh', sys.executable, '-c', full]
        commands.append((command, 'No space left on device'))
    for command, reason in commands:
        arguments = [str(run), '--output', str(disk / 'out')]
        process = subprocess.run([*command, *arguments], env=env, capture_output=True, text=True, timeout=300)
        assert process.returncode == 0, process.stderr
        lines = process.stdout.splitlines()
        assert len(lines) == 1 and lines[0].startswith('ERROR cannot write') and reason in lines[0], process.stdout
        assert not list(disk.iterdir())


def test_a_checkpoint_of_train_py(timm_scripts, digits_folder, tmp_path):
    """What timm's own script leaves, with an average, exports to the accuracy that it measured."""
    classes = sorted(path.name for path in (digits_folder / 'train').iterdir())
    arguments = f'--device-modules timm_msar --model cifar_resnet20_msar --num-classes {len(classes)}'
    arguments += ' --input-size 3 32 32'
    arguments += ' --mean 0.3 0.3 0.3 --std 0.3 0.3 0.3 --scale 0.64 0.64 --ratio 1 1 --hflip 0 --crop-pct 0.8'
    arguments += ' --epochs 3 --lr 0.1 --warmup-epochs 0 -b 50 -j 0 --model-ema --model-ema-decay 0.5 --channels-last'
    arguments += ' --experiment digits --device cpu --seed 1 --model-kwargs rd_ratio=0.375'
    command = [sys.executable, str(timm_scripts / 'train.py'), *arguments.split()]
    command += ['--data-dir', str(digits_folder), '--output', str(tmp_path)]
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    subprocess.run(command, env=env, check=True, capture_output=True, timeout=600)
    for name in ('model_best.pth.tar', 'last.pth.tar'):
        checkpoint = tmp_path / 'digits' / name
        output = tmp_path / name
        run_export(checkpoint, output)
        model = timm.create_model(f'local-dir:{output}', pretrained=True).eval()
        assert model.pretrained_cfg['label_names'] == classes
        dataset = timm.data.create_dataset('', root=str(digits_folder), split='validation')
        config = timm.data.resolve_model_data_config(model)
        loader = timm.data.create_loader(dataset, batch_size=50, use_prefetcher=False, num_workers=0, **config)
        with torch.no_grad():
            right = sum((model(images).argmax(1) == targets).sum().item() for images, targets in loader)
        assert load_trained(checkpoint).ema
        assert 'batch size 50.' in (output / 'README.md').read_text()
        assert 100 * right / len(dataset) == pytest.approx(load_trained(checkpoint).results['top1'])
        assert yaml.safe_load((checkpoint.parent / 'args.yaml').read_text())['model'] == 'cifar_resnet20_msar'
