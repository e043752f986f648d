"""
How much memory training takes, and what for: a table for the sizes of GPT-2.

    python -m pocket.memory                       on a GPU, in micro-batches of 4 x 1,024 tokens
    python -m pocket.memory --device=cpu --batch_size=1 --block_size=512 --measure=124M
                                                  also takes real steps on this machine and compares

train.py prints the same estimate for its own model before it starts.
"""
from typing import Literal

from pocket.configurator import configure

batch_size = 4                     # [1, inf) rows per micro-batch; accumulating more is free
block_size = 1024                  # [1, inf) tokens per row
dtype: Literal['bfloat16', 'float16', 'float32'] = 'bfloat16'  # of matrix products
device: Literal['cuda', 'mps', 'cpu'] = 'cuda'  # the kind of machine that the table is for
measure: tuple[Literal['124M', '350M', '774M', '1.5B'], ...] = ()  # take real steps with these
worker = ''                        # internal: what this process measures
if __name__ == '__main__':
    configure(__file__, globals())

import subprocess
import sys

import torch

from model import GPT, GPTConfig
from pocket.device import DTYPES, autocast, peak_memory, pick_device
from pocket.errors import UserError
from pocket.kernels import MAX_LOGITS

GPT2_SIZES = {  # name: (n_layer, n_head, n_embd)
    '124M': (12, 12, 768),
    '350M': (24, 16, 1024),
    '774M': (36, 20, 1280),
    '1.5B': (48, 25, 1600),
}


def estimate(config, adamw_params, muon_params, tokens, dtype, device_type, world_size=1):
    """Bytes that training a model takes: {what for: bytes}, good to about a third.

    config: a GPTConfig or Seq2SeqConfig. adamw_params, muon_params: the number of parameters that
    each optimizer updates. tokens: per micro-batch. dtype: of matrix products, a torch.dtype.
    device_type: 'cpu', 'cuda' or 'mps'. world_size: the number of processes.
    """
    num_params = adamw_params + muon_params
    C = config.n_embd
    V = config.vocab_size
    on_cpu = device_type == 'cpu'
    itemsize = 4 if dtype == torch.float32 else 2  # bytes per activation

    # Parameters are in float32, and there is a copy for products in 16 bits
    param_bytes = 4 if itemsize == 4 else 4 + itemsize
    # Gradients are in float32. With several processes DistributedDataParallel keeps buckets of the
    # same size, and no_sync() sums micro-batches beside them
    grad_bytes = 4 if world_size == 1 else 8

    # What a layer keeps of each token for the backward pass, in numbers. Norms, q, k, v and the
    # result of attention are ten times the width; the MLP keeps both sides of its nonlinearity.
    mlp_width = config.n_inner or 4 * C
    layer_numbers = 10 * C + 2 * mlp_width
    if config.act == 'swiglu':  # it has a gate as wide
        layer_numbers += 2 * mlp_width
    # On a CPU, attention holds the scores of short rows; of long ones, half (see kernels.py).
    if on_cpu and config.block_size <= 1024:
        scores_per_head = min(config.block_size, config.block_size // 2 + 128)
        layer_numbers += config.n_head * scores_per_head

    # Checkpointing keeps only what enters a layer. The layer at work is there in full besides.
    layer_bytes = itemsize * layer_numbers
    kept_bytes = layer_bytes
    if config.gradient_checkpointing:
        kept_bytes = itemsize * C

    # The head holds a slice of the logits (on a GPU also its gradient), its weight in both
    # precisions, and its input with gradient
    logit_bytes = itemsize if on_cpu else 2 + itemsize
    head = min(tokens * V, MAX_LOGITS) * logit_bytes
    head += V * C * (4 + itemsize)
    head += tokens * C * 2 * itemsize

    return {
        'parameters': num_params * param_bytes,
        'gradients': num_params * grad_bytes,
        'optimizer': adamw_params * 8 + muon_params * 4,  # two moments of AdamW, one of Muon
        'activations': tokens * (config.n_layer * kept_bytes + layer_bytes),
        'head': head,
        'PyTorch': 5e8 if on_cpu else 0,  # on a GPU its share is outside the allocator's figures
    }


def format_estimate(parts):
    """An estimate in a few words; if it is large, with its parts in a second line.

    >>> format_estimate({'parameters': 3e8, 'gradients': 3e8})
    'about 0.6 GB of memory'
    >>> print(format_estimate({'parameters': 2e9, 'gradients': 1e9, 'head': 1e6}))
    about 3.0 GB of memory:
           parameters 2.0, gradients 1.0
    """
    total = sum(parts.values())
    text = f'about {total / 1e9:.1f} GB of memory'
    if total >= 1e9:
        large = [f'{name} {size / 1e9:.1f}' for name, size in parts.items() if size >= 5e7]
        text += f':\n       {", ".join(large)}'
    return text


def gpt2_config(name, gradient_checkpointing):
    """The GPTConfig of one of GPT2_SIZES, for rows of block_size tokens."""
    n_layer, n_head, n_embd = GPT2_SIZES[name]
    return GPTConfig(
        block_size=block_size,
        vocab_size=50257,
        n_layer=n_layer,
        n_head=n_head,
        n_embd=n_embd,
        gradient_checkpointing=gradient_checkpointing,
    )


def print_table():
    """Print the table, in Markdown."""
    columns = ['parameters', 'gradients', 'optimizer', 'head', 'activations']
    header = ['millions', *columns, '**total**', 'checkpointed', '**total**']
    if measure:
        header += ['measured', '… checkpointed']
    print(f'GB, micro-batches of {batch_size} x {block_size:,} tokens, products in {dtype}, AdamW, '
          f'{device}\n')
    print(f'| {" | ".join(header)} |')
    print('|---' * len(header) + '|')

    tokens = batch_size * block_size
    for name in GPT2_SIZES:
        config = gpt2_config(name, gradient_checkpointing=False)
        checkpointed_config = gpt2_config(name, gradient_checkpointing=True)
        with torch.device('meta'):
            num_params = GPT(config).num_params()
        parts = estimate(config, num_params, 0, tokens, DTYPES[dtype], device)
        checkpointed = estimate(checkpointed_config, num_params, 0, tokens, DTYPES[dtype], device)

        sizes = [parts[column] for column in columns]
        sizes.append(sum(parts.values()))
        sizes.append(checkpointed['activations'])
        sizes.append(sum(checkpointed.values()))
        if name in measure:
            sizes.append(measure_in_a_process(name))
            sizes.append(measure_in_a_process(f'{name} checkpointed'))
        row = [f'{num_params / 1e6:,.1f}']
        row += [f'{size / 1e9:.1f}' for size in sizes]
        print(f'| {" | ".join(row)} |', flush=True)


def measure_in_a_process(what):
    """Peak memory in bytes of real steps, in a process of their own, so that its peak is theirs."""
    command = [sys.executable, '-m', 'pocket.memory', *sys.argv[1:], f'--worker={what}']
    return int(subprocess.check_output(command))


def take_steps(config):
    """Train a GPT for two steps of two micro-batches, with AdamW. Returns peak memory in bytes."""
    where = pick_device(device)
    model = GPT(config).to(where)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(config.vocab_size, (2, batch_size, block_size), device=where)
    idx, targets = tokens
    for _ in range(2):
        for _ in range(2):
            with autocast(where, DTYPES[dtype]):
                _, loss = model(idx, targets)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return peak_memory(where)


if __name__ == '__main__':
    if worker:
        size, _, checkpointed = worker.partition(' ')
        if size not in GPT2_SIZES:
            raise UserError(f'--worker is for internal use, and one of {", ".join(GPT2_SIZES)}, '
                            f'got {worker}: omit it')
        print(take_steps(gpt2_config(size, gradient_checkpointing=bool(checkpointed))))
    else:
        print_table()
