# Character-level Tiny Shakespeare with nothing that Llama lacks: pocket.export writes it for
# transformers, and as model.gguf for llama.cpp and ollama.
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
