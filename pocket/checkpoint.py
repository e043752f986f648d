"""
Checkpoints: one file that is enough by itself, with weights, optimizer, configuration and
tokenizer.

    state = load('out/shakespeare_char/best.pt')      a dict of tensors and plain types
    model, tokenizer = build(state, path)             ready to generate

Loading never executes anything: see pocket/archive.py. What else has to be checked in files that
may come from somebody else is here, too, so that model.py can be about models.
"""
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from model import GPT, GPTConfig, Seq2Seq, Seq2SeqConfig
from pocket.archive import read_archive
from pocket.configurator import convert, describe
from pocket.errors import UserError, short_repr
from pocket.files import FORMAT, ROOT, atomic_write
from pocket.template import ChatTemplate, check_template, template_from_dict
from pocket.tokenizer import tokenizer_from_dict

MODELS = {'gpt': (GPT, GPTConfig), 'seq2seq': (Seq2Seq, Seq2SeqConfig)}


@dataclass
class TrainState:
    """Training progress. Every checkpoint holds these numbers under these names."""
    step: int = 0  # optimizer steps so far
    tokens: int = 0  # targets trained on
    seconds: float = 0.0  # of training, those before a resume included
    best: float = math.inf  # the validation loss of best.pt: the lowest, or that of best_bleu
    best_bleu: float = 0.0  # the highest BLEU on validation replies, with --best_by=bleu
    val_loss: float = math.inf  # the latest validation loss
    evaluated: int = 0  # the step of the latest evaluation
    bad_evals: int = 0  # evaluations since the best one
    loss_sum: float = 0.0  # training loss since the latest evaluation, summed over targets,
    loss_tokens: int = 0  # … and their number
    grad_norm: float = 0.0  # of the latest step

    def record_step(self, step, loss, num_targets, grad_norm):
        """Count one step more. loss: the mean over its num_targets targets."""
        self.step = step
        self.tokens += num_targets
        self.loss_sum += loss * num_targets
        self.loss_tokens += num_targets
        self.grad_norm = grad_norm

    def record_evaluation(self, val_loss, bleu=None):
        """Note the validation loss at this step. Returns whether it is the best so far.

        bleu: what decides that instead of the loss, or None. Of two that are equal, as 0.00 often
        is at first, the lower loss wins.
        """
        is_best = val_loss < self.best
        if bleu is not None and bleu != self.best_bleu:
            is_best = bleu > self.best_bleu
        if is_best:
            self.best = val_loss
            self.best_bleu = bleu or 0.0
            self.bad_evals = 0
        else:
            self.bad_evals += 1
        self.val_loss = val_loss
        self.evaluated = self.step
        self.loss_sum = 0.0
        self.loss_tokens = 0
        return is_best


# --------------------------------------------------------------------------------------------------
# Saving


def model_state(model, tok, config, template=None):
    """The part of a checkpoint that sample.py needs.

    config: the options of the run. template: its ChatTemplate, None for a model of plain text.
    """
    kind = 'seq2seq' if model.is_encoder_decoder else 'gpt'
    return {
        'kind': kind,  # a key of MODELS
        'model_args': asdict(model.config),  # enough to build the model again
        'model': model.state_dict(),
        'tokenizer': tok.to_dict(),  # all of it, not just its name
        'chat': None if template is None else template.to_dict(),
        'config': config,
    }


def save(path, state):
    """Write a checkpoint, and the format's version with it.

    Raises UserError if it can't be written; the file that was there before is then untouched.
    """
    atomic_write(path, lambda f: torch.save({'format': FORMAT, **state}, f))


# --------------------------------------------------------------------------------------------------
# Loading


def load(path, mapped=False):
    """The checkpoint as a dict, its tensors on the CPU, its weights those of a model we can build.

    mapped: leave tensors in the file, from which they come as they are used: see read_archive().
    Raises UserError if the file is not a checkpoint, or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f'there is no checkpoint {path}')
    state = read_archive(path, mapped)
    check_parts(state, path)
    if state['kind'] == 'seq2seq' and state.get('chat') is None:  # checkpoints before templates
        state['chat'] = ChatTemplate().to_dict()
    try:
        check_weights(state, path.stat().st_size)
    except (TypeError, ValueError, RuntimeError, AssertionError, ArithmeticError) as e:
        raise UserError(f'{path} is inconsistent: {first_line(e)}') from None
    return state


REQUIRED_PARTS = {'kind': str, 'model': dict, 'model_args': dict, 'config': dict, 'tokenizer': dict}
NUMBERS = {field.name: field.type for field in fields(TrainState) if field.name != 'val_loss'}


def check_parts(state, path):
    """Raise UserError unless a loaded file has the parts of a checkpoint, each of its type."""
    problem = f'{path} is not a checkpoint of pocketGPT'
    version = state.get('format') if isinstance(state, dict) else None
    if type(version) is not int or not 1 <= version < 2**31:
        raise UserError(f'{problem}: parts are missing')
    if version > FORMAT:  # first of all: what follows may have changed
        raise UserError(f'{path} has format {version}, this version reads up to {FORMAT}: '
                        f'use a newer pocketGPT')

    wrong = []
    for name, kind in REQUIRED_PARTS.items():
        if not isinstance(state.get(name), kind):
            wrong.append(name)
    for name, kind in NUMBERS.items():  # an exported checkpoint may lack them
        if name in state and not is_valid_number(name, state[name], kind):
            wrong.append(name)
    stopped_between_evaluations = state.get('step') != state.get('evaluated')
    if not wrong and stopped_between_evaluations and state.get('loss_tokens') == 0:
        wrong.append('loss_tokens')
    if wrong:
        raise UserError(f'{problem}: parts are missing or invalid ({", ".join(wrong)})')
    if state['kind'] not in MODELS:
        kind = short_repr(state['kind'])
        raise UserError(f'{path} holds a {kind}, this version knows {", ".join(MODELS)}')


def is_valid_number(name, value, kind):
    """Whether a number of TrainState, from a file, has its type and a sensible size."""
    if type(value) is not kind:
        return False
    if name == 'grad_norm':  # may be anything, as float16 skips steps
        return True
    largest = math.inf if name == 'best' else 2**46
    return 0 <= value <= largest


def build(state, path, **overrides):
    """(model in eval mode, tokenizer) of a loaded checkpoint.

    The model takes over the tensors of the checkpoint, it doesn't copy them. overrides: fields of
    its config that do not change a shape. Raises UserError.
    """
    Model, Config = MODELS[state['kind']]
    try:
        config = Config(**{**state['model_args'], **overrides})
        check_config(config)
        model = build_on_meta(Model, config)
        model.load_state_dict(parameters_of(model, state['model']), assign=True)
        tok = tokenizer_from_dict(state['tokenizer'])
        if tok.vocab_size > config.vocab_size:
            raise ValueError(f'the tokenizer has {tok.vocab_size} ids, the model only '
                             f'{config.vocab_size}')
        if state.get('chat') is not None:
            template = template_from_dict(state['chat'])
            check_template(template, tok)
            if model.is_encoder_decoder and not isinstance(template, ChatTemplate):
                raise ValueError('an encoder-decoder has no Jinja template')
        return model.eval(), tok
    except UserError:  # an encoding that has to be downloaded, say
        raise
    except (TypeError, ValueError, RuntimeError) as e:
        raise UserError(f'{path} is inconsistent: {last_line(e)}') from None


def parameters_of(model, tensors):
    """{name: what load_state_dict(assign=True) wants}, tensors in the precision of a model.

    Of tied weights, which are one parameter under several names, the first is taken.
    """
    assigned = {}
    made = {}
    for name, empty in model.state_dict(keep_vars=True).items():
        tensor = tensors[name].to(empty.dtype)
        if isinstance(empty, nn.Parameter):
            tensor = made.setdefault(id(empty), nn.Parameter(tensor))
        assigned[name] = tensor
    return assigned


def sampling_of(state):
    """How to sample from the model of a checkpoint unless told otherwise: {'min_p': …} or {}."""
    min_p = state['config'].get('sample_min_p')
    if isinstance(min_p, float) and 0 < min_p < 1:
        return {'min_p': min_p}
    return {}


def decoding_of(state):
    """sampling_of(), and the length_penalty of a beam search if the run has one."""
    settings = sampling_of(state)
    length_penalty = state['config'].get('length_penalty')
    if isinstance(length_penalty, float) and -10 <= length_penalty <= 10:
        settings['length_penalty'] = length_penalty
    return settings


def first_line(error):
    """The first line of an error's text; the error's name if it has no text."""
    return [*str(error).splitlines(), type(error).__name__][0]


def last_line(error):
    """The last line of an error's text: PyTorch explains itself at the end."""
    return [type(error).__name__, *str(error).splitlines()][-1].strip()


# --------------------------------------------------------------------------------------------------
# Resuming a run

# Options of this command, not of the run
OPTIONS_OF_THIS_COMMAND = {'out_dir', 'init_from', 'resume', 'eval_only', 'eval_split',
                           'eval_replies', 'eval_protocol'}
# These decide which checkpoint is best, so --resume keeps them; --eval_only does not. (Both keep
# length_penalty, which sample.py uses, too)
OPTIONS_OF_EVALUATION = {'num_beams', 'bleu_tokenize'}

# With another value for these it would be a different run
FIXED_AFTER_START = {'arch', 'dataset', 'optimizer'}
CHANGEABLE_IN_MODEL = {'dropout', 'attn_dropout', 'gradient_checkpointing'}


def resume_config(state, path, config, explicit, options, resuming=True):
    """The options of a run that goes on: as it was started, unless the command line says otherwise.

    config, explicit: what configure() returned now. options: read_options() of train.py.
    resuming: False if the run is only evaluated. Prints what is kept although a config file says
    otherwise, and what changes. Raises UserError if something changes that can't, or if the
    checkpoint is one to evaluate only.
    """
    if resuming and 'optimizers' not in state:
        raise UserError(f'{path} was exported, without the optimizer\'s state that --resume needs: '
                        f'evaluate it with --eval_only')
    saved = saved_options(state, path, config, options)
    not_kept = OPTIONS_OF_THIS_COMMAND
    if not resuming:
        not_kept = OPTIONS_OF_THIS_COMMAND | OPTIONS_OF_EVALUATION
    merged = dict(config)
    changed = []
    refused = []
    for key in sorted(saved.keys() - not_kept):
        now = config[key]
        differs = now != saved[key]
        if explicit.get(key) != 'command line':
            merged[key] = saved[key]
            if resuming and differs and key in explicit:
                print(f'{explicit[key]} says {key}={now}, but the run was started with '
                      f'{saved[key]}, which is kept; --{key}={now} changes it')
        elif differs and key != 'data_dir':
            change = f'{key} {saved[key]} -> {now}'
            in_model = key in state['model_args'] and key not in CHANGEABLE_IN_MODEL
            if in_model or key in FIXED_AFTER_START:
                refused.append(change)
            else:
                changed.append(change)
    if refused:
        raise UserError(f'a run can\'t continue with another {", ".join(refused)}: omit that, or '
                        f'start a new run with another --out_dir')
    if changed:
        consequence = ''
        if resuming:
            consequence = '; from here on the run differs from what it would have been'
        print(f'changed since {path} was written: {", ".join(changed)}{consequence}')
    return merged


def check_paths_of_run(state, path, config, explicit, options):
    """Raise UserError if a run that may be anybody's says where to read and write, or what to run.

    Only runs in out/ may do that. For the arguments see resume_config().
    """
    if Path(path).resolve().is_relative_to(ROOT / 'out'):
        return
    saved = saved_options(state, path, config, options)
    typed = {name for name, source in explicit.items() if source == 'command line'}
    where = f'{path} is not in out/, so it may not say that'
    if saved.get('data_dir') is not None and 'data_dir' not in typed:
        raise UserError(f'the run was trained on datasets in {saved["data_dir"]}: {where}; add '
                        f'--data_dir={saved["data_dir"]} if it is right')
    if 'dataset' in saved and 'dataset' not in typed:
        name = saved['dataset']
        folder = Path(config['data_dir'] or ROOT / 'data') / name
        is_plain_name = Path(name).name == name
        if not is_plain_name or not (folder / 'meta.json').is_file():
            raise UserError(f'the run was trained on the dataset {name!r}, which is not there: '
                            f'{where}; add --dataset=…, or prepare that dataset first')


def saved_options(state, path, config, options):
    """{option: value} that a run was started with, each of its option's type. Raises UserError."""
    saved = {}
    for field in fields(Seq2SeqConfig):  # options added since the run take their defaults
        saved[field.name] = field.default
    saved.update(state['config'])
    saved.update(state['model_args'])

    types = {option.name: option.type for option in options if option.name}
    converted = {}
    for key in config.keys() & saved.keys():
        try:
            converted[key] = convert(saved[key], types[key])
        except (ValueError, OverflowError):
            expected = describe(types[key])
            raise UserError(f'{path} is damaged: its {key} should be {expected}') from None
    return converted


def restore(state, path, model, optimizers, scaler):
    """Load a checkpoint into a model and, if there are any, optimizers. Returns the TrainState.

    Raises UserError if the checkpoint does not fit them.
    """
    try:
        model.load_state_dict(state['model'])
        train_state = train_state_of(state)
        if optimizers:
            load_optimizers(optimizers, state['optimizers'])
            scaler.load_state_dict(state['scaler'])
        return train_state
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as e:
        raise UserError(f'{path} does not fit this model and optimizer: {last_line(e)}') from None


def train_state_of(state):
    """The TrainState in a checkpoint. Raises LookupError if numbers are missing."""
    numbers = {'tokens': 0, 'best_bleu': 0.0}  # earlier checkpoints lack them
    for field in fields(TrainState):
        if field.name in state or field.name not in numbers:
            numbers[field.name] = state[field.name]
    return TrainState(**numbers)


def load_optimizers(optimizers, saved_states):
    """Give optimizers their states of a checkpoint, and keep the settings that they have now.

    So betas, weight decay and the like are those of today's options. Raises ValueError.
    """
    if len(saved_states) != len(optimizers):
        raise ValueError(f'{len(saved_states)} optimizers instead of {len(optimizers)}')
    for optimizer, saved in zip(optimizers, saved_states):
        check_optimizer(saved, optimizer)
        settings_now = []
        for group in optimizer.param_groups:
            settings = {key: group[key] for key in group if key not in ('params', 'lr')}
            settings_now.append(settings)
        optimizer.load_state_dict(saved)
        for group, settings in zip(optimizer.param_groups, settings_now):
            group.update(settings)


# --------------------------------------------------------------------------------------------------
# Checks of untrusted files: nothing is allocated on a file's word alone

CHOICES = {
    'pos': ('learned', 'sinusoidal', 'rotary'),
    'norm': ('layernorm', 'rmsnorm'),
    'norm_position': ('pre', 'post'),
    'act': ('gelu', 'gelu_erf', 'relu', 'relu2', 'swiglu'),
    'init': ('gpt2', 'xavier'),
}
LARGEST = {
    'block_size': 2**20,
    'src_block_size': 2**20,
    'vocab_size': 2**62,
    'n_layer': 2**10,
    'n_encoder_layer': 2**10,
    'n_head': 2**24,
    'n_embd': 2**24,
    'n_kv_head': 2**24,
    'head_dim': 2**24,
    'n_inner': 2**24,
}
LARGEST_TABLE = 2**26  # numbers in a table of positions
LARGEST_FREE_TABLE = 2**26  # bytes: larger ones need a file that is not much smaller


def check_config(config):
    """Raise ValueError, with all that is wrong, unless a model can be built of a config."""
    for field in fields(config):
        check_type(field.name, getattr(config, field.name), field.type)

    problems = []
    for name, choices in CHOICES.items():
        value = getattr(config, name)
        if value not in choices:
            problems.append(f'{name} must be one of {", ".join(choices)}, '
                            f'got {short_repr(value)}')
    for name, largest in LARGEST.items():
        value = getattr(config, name, None)
        if value is not None and not 1 <= value <= largest:
            problems.append(f'{name} must be from 1 to {largest:,}, got {short_repr(value)}')
    for name in ('dropout', 'attn_dropout'):
        value = getattr(config, name)
        if not 0 <= value < 1:
            problems.append(f'{name} must be at least 0 and below 1, got {value}')
    if not 0 <= config.softcap < math.inf:
        problems.append(f'softcap must be at least 0, got {config.softcap}')
    for name in ('rope_theta', 'norm_eps'):
        value = getattr(config, name)
        if not 0 < value < math.inf:
            problems.append(f'{name} must be above 0, got {value}')
    if config.qk_norm not in (True, False, 'rmsnorm'):
        problems.append(f'qk_norm must be True, False or rmsnorm, '
                        f'got {short_repr(config.qk_norm)}')
    if config.rope_scaling is not None:
        problems += check_rope_scaling(config.rope_scaling)

    problems += check_widths(config)
    if config.cutoffs:
        problems += check_adaptive_softmax(config)
    if problems:
        raise ValueError('; '.join(problems))


def check_type(name, value, kind):
    """Raise ValueError unless value has the type of a config's field; True is not a number."""
    allowed = (int, float) if kind is float else kind
    is_bool_by_mistake = isinstance(value, bool) and 'bool' not in str(kind)
    if not isinstance(value, allowed) or is_bool_by_mistake:
        expected = getattr(kind, '__name__', kind)
        raise ValueError(f'{name} must be of type {expected}, got {type(value).__name__}')


def check_rope_scaling(scaling):
    """What is wrong with the rope_scaling of a config: sentences."""
    needed = {
        'linear': ('factor',),
        'llama3': ('factor', 'low_freq_factor', 'high_freq_factor',
                   'original_max_position_embeddings'),
    }
    kind = scaling.get('rope_type')
    if not isinstance(kind, str) or kind not in needed:
        return [f'rope_scaling must be of rope_type linear or llama3, '
                f'got {short_repr(kind)}']
    for key in needed[kind]:
        value = scaling.get(key)
        if type(value) not in (int, float) or not 0 < value < 2**40:
            return [f'{key} of rope_scaling must be a number above 0, '
                    f'got {short_repr(value)}']
    if kind == 'llama3' and scaling['low_freq_factor'] >= scaling['high_freq_factor']:
        return ['low_freq_factor of rope_scaling must be below its high_freq_factor']
    return []


def check_widths(config):
    """What is wrong with a config's widths, and how large its tables of positions are:
    sentences."""
    problems = []
    n_embd = config.n_embd
    n_head = max(1, config.n_head)
    n_kv_head = max(1, config.num_kv_heads)
    head_size = config.head_dim or n_embd // n_head
    if config.head_dim is None and n_embd % n_head:
        problems.append(f'n_embd must be divisible by n_head, got {n_embd} and {n_head}')
    elif config.pos == 'rotary' and head_size % 2:
        problems.append(f'rotary positions need an even n_embd / n_head (or head_dim), '
                        f'got {head_size}')
    if n_head % n_kv_head:
        problems.append(f'n_head must be divisible by n_kv_head, got {n_head} and {n_kv_head}')
    if config.token_shift and n_embd % 2:
        problems.append(f'token_shift needs an even n_embd, got {n_embd}')

    table_length, table_width = size_of_position_table(config)
    if table_length * table_width > LARGEST_TABLE:
        problems.append(f'{config.pos} positions are a table of block_size x {table_width}, too '
                        f'large with {table_length}: lower block_size')
    return problems


def size_of_position_table(config):
    """(length, width) of the largest table of positions that a config makes, (0, 0) if it makes
    none."""
    length = max(config.block_size, getattr(config, 'src_block_size', None) or 0)
    if config.pos == 'sinusoidal':
        return length, config.n_embd
    if config.pos == 'rotary':
        return length, config.head_dim or config.n_embd // max(1, config.n_head)
    return 0, 0


def check_adaptive_softmax(config):
    """What is wrong with a config's clusters of the vocabulary: sentences."""
    problems = []
    cutoffs = config.cutoffs
    if not clusters_are_possible(config):
        problems.append(
            'cutoffs must be rising numbers of ids between 0 and the size of the vocabulary, '
            '16 at most, div_value at least 1, the last cluster 1 wide, '
            f'got {short_repr(cutoffs)} and {config.div_value}')
    conflicts = [name for name in ('tie_weights', 'softcap', 'head_bias') if getattr(config, name)]
    if conflicts:
        problems.append(f'cutoffs (adaptive softmax) do not work with {", ".join(conflicts)}: '
                        f'switch one of them off')
    return problems


def clusters_are_possible(config):
    """Whether cutoffs rise within the vocabulary and every cluster is at least one channel wide."""
    cutoffs = config.cutoffs
    if not all(isinstance(cutoff, int) for cutoff in cutoffs):
        return False
    if list(cutoffs) != sorted(set(cutoffs)) or len(cutoffs) > 16:
        return False
    if cutoffs[0] <= 0 or cutoffs[-1] >= config.vocab_size:
        return False
    if not 1 <= config.div_value <= config.n_embd:
        return False
    return config.div_value ** len(cutoffs) <= config.n_embd


class MetaInit(TorchFunctionMode):
    """Modules built in its scope have weights that are shapes only, without memory or random
    numbers.

    Small tables are as ever. `with torch.device('meta')` would do the same, but its first
    arithmetic and its first random number cost seconds of imports.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func.__name__.endswith(('normal_', 'uniform_')):
            return None
        is_long_range = func is torch.arange and args[0] > 2**20  # of a large vocabulary
        if func in (torch.empty, torch.ones, torch.zeros, torch.full) or is_long_range:
            kwargs['device'] = 'meta'
        return func(*args, **kwargs)


def build_on_meta(Model, config):
    """A model whose weights are shapes only.

    Raises RuntimeError or TypeError if they are too large even for that.
    """
    with MetaInit():
        return Model(config)


def all_finite(tensor):
    """Whether a tensor has neither infinite numbers nor NaN."""
    smallest, largest = tensor.aminmax()
    return math.isfinite(smallest) and math.isfinite(largest)


def check_weights(state, file_size):
    """Raise ValueError unless a checkpoint's weights are those of the model that it describes.

    No model is allocated for that. file_size: bytes; the weights can't be more than that, tied ones
    counted once: a few bytes can claim to be a large tensor, of numbers that are repeated.
    """
    Model, Config = MODELS[state['kind']]
    config = Config(**state['model_args'])
    check_config(config)
    table_bytes = 4 * math.prod(size_of_position_table(config))
    if table_bytes > LARGEST_FREE_TABLE + file_size:
        raise ValueError(f'{config.pos} positions would take {table_bytes:,} bytes, far more than '
                         f'the file: lower block_size')
    expected = build_on_meta(Model, config).state_dict(keep_vars=True)
    different = expected.keys() ^ state['model'].keys()
    if different:
        names = sorted(str(name)[:100] for name in different)
        raise ValueError(f'weights are missing or surplus: {", ".join(names[:3])}')

    bytes_held = {}  # tied weights are one parameter under two names
    for name, parameter in expected.items():
        tensor = state['model'][name]
        if not is_plain_tensor(tensor, parameter):
            raise ValueError(f'{name} must be {tuple(parameter.shape)} of {parameter.dtype}')
        bytes_held[id(parameter)] = tensor.nbytes
        if sum(bytes_held.values()) > file_size:
            raise ValueError('the file is smaller than its weights claim to be')
        if parameter.is_floating_point():
            if not all_finite(tensor):
                raise ValueError(f'{name} has infinite or NaN values: take an earlier checkpoint')
        elif not torch.equal(tensor.sort().values, torch.arange(len(tensor))):  # AdaptiveHead.rank
            raise ValueError(f'{name} must hold each rank exactly once')


def is_plain_tensor(tensor, expected):
    """Whether an object from a file is a dense CPU tensor of the expected shape and kind of
    dtype."""
    if type(tensor) is not torch.Tensor:
        return False
    if tensor.layout is not torch.strided or tensor.device.type != 'cpu':
        return False
    if tensor.shape != expected.shape:
        return False
    if expected.is_floating_point():  # float32 and bfloat16 are both fine
        return tensor.is_floating_point()
    return tensor.dtype == expected.dtype


def check_optimizer(saved, optimizer):
    """Raise ValueError unless an optimizer's saved state has what this optimizer keeps."""
    is_adamw = isinstance(optimizer, torch.optim.AdamW)
    shapes = [p.shape for group in optimizer.param_groups for p in group['params']]
    for index, kept in saved['state'].items():
        shape = shapes[index]
        if is_adamw:
            expected = {'step': (), 'exp_avg': shape, 'exp_avg_sq': shape}
        else:  # Muon keeps all matrices of a shape in one tensor
            expected = {'momentum': (shapes.count(shape), *shape)}
        if {key: tensor.shape for key, tensor in kept.items()} != expected:
            raise ValueError('the optimizer\'s state is damaged')
