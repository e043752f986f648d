# The serious run: GPT-2 124M from nothing on 10 billion tokens of FineWeb-Edu, 0.5 M tokens a step. Not run by us yet.
#     pip install pyarrow && python prepare/fineweb_edu.py --shards=14           about 28 GB to download
#     torchrun --standalone --nproc_per_node=8 train.py config/gpt2_124m.py      or python train.py … on one GPU: the same steps
# With less memory, halve batch_size and double gradient_accumulation_steps: also the same steps.
# Others got, each on its own validation text, so that none is a target here to the last digit:
#     llm.c                3.2847 on FineWeb after 10 B tokens (says modded-nanogpt's README): 18,865 steps, 94 minutes, 8 A100
#     modded-nanogpt       3.28 on FineWeb is the mark it races to, by other means: Muon, rotary positions, ReLU², QK-norm …
#     nanoGPT              about 2.85 on OpenWebText after 300 B tokens, 4 days on 8 A100
# The architecture is GPT-2's own, so that export.py can hand the model to Hugging Face's tools; rate and warm-up are llm.c's.
dataset = 'fineweb_edu'
block_size = 1024
n_layer = 12
n_head = 12
n_embd = 768
bias = True
pos = 'learned'
act = 'gelu'
qk_norm = False
token_shift = False
tie_weights = True
zero_init = False
batch_size = 16                    # 16 x 1,024 x 32 = 524,288 tokens; eight GPUs take four micro-batches each
gradient_accumulation_steps = 32
max_iters = 19073                  # 10 B tokens
optimizer = 'adamw'
learning_rate = 6e-4
beta2 = 0.95
schedule = 'cosine'
warmup_iters = 700
eval_interval = 500
log_interval = 10
