# The serious run: GPT-2 124M from scratch on 10 billion tokens of FineWeb-Edu. Not run by us yet.
#
#     pip install pyarrow && python prepare/fineweb_edu.py --shards=14     # downloads about 28 GB
#     torchrun --standalone --nproc_per_node=8 train.py config/gpt2_124m.py
#
# A step is 16 x 1,024 x 32 = 524,288 tokens, so 19,073 steps are 10 B. Each of eight GPUs computes
# four of the 32 micro-batches; on one GPU, `python train.py config/gpt2_124m.py` computes them all.
# If memory is short, halve batch_size and double gradient_accumulation_steps: the same steps again.
#
# What others reached, each on a validation text of their own, so don't compare the last digits:
#     llm.c            3.2847 on FineWeb after 10 B tokens, as modded-nanogpt's README reports it:
#                      18,865 steps, 94 minutes on 8 A100
#     modded-nanogpt   3.28 on FineWeb is the target of its speedruns, by other means: Muon, rotary
#                      positions, ReLU², QK-norm …
#     nanoGPT          about 2.85 on OpenWebText after 300 B tokens, 4 days on 8 A100
#
# The architecture is GPT-2's own, so that the model can be exported to Hugging Face's format.
# Learning rate and warmup are llm.c's.
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
batch_size = 16
gradient_accumulation_steps = 32
max_iters = 19073
optimizer = 'adamw'
learning_rate = 6e-4
beta2 = 0.95
schedule = 'cosine'
warmup_iters = 700
eval_interval = 500
log_interval = 10
