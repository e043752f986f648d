# Character-level Tiny Shakespeare with nothing that Llama lacks: pocket.export writes it for
# transformers, and as a .gguf file for llama.cpp and ollama. The rest is as in
# config/shakespeare_char_cpu.py, and a step takes the same time. What it costs in val loss:
#
#                                                      seed 1337   seed 1
#     shakespeare_char_cpu                             1.5023      1.5028
#     llama_small                                      1.5670      1.5716
#     llama_small --qk_norm=rmsnorm (that is a Qwen3)  1.5409      1.5280
#
# Compare within this table only: rounding differs between versions and machines, and the first
# config ended at 1.4980 elsewhere (README.md). Differences below 0.01 mean nothing (docs/LOG.md).
# Other learning rates hardly change it: --muon_lr=0.02 gave 1.5645, --learning_rate=5e-3 1.5650.
dataset = 'shakespeare_char'
block_size = 128
n_layer = 3
n_head = 2
n_embd = 160
n_inner = 416           # 8/3 * n_embd: as large as relu2's two matrices; q8_0 wants 32s
norm = 'rmsnorm'
act = 'swiglu'
qk_norm = False
token_shift = False
batch_size = 16
max_iters = 800
learning_rate = 1e-2
muon_lr = 0.015
muon_momentum = 0.85
warmup_iters = 2
eval_interval = 160
