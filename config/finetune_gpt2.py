# Finetune GPT-2 124M on Tiny Shakespeare. Downloads 548 MB once. A step is 8,192 tokens, an epoch
# 37 steps. Peak memory on a CPU: 3.7 GB, or 2.8 GB with --gradient_checkpointing. Not yet run to
# the end.
init_from = 'gpt2'
dataset = 'shakespeare_gpt2'
block_size = 512
batch_size = 4
gradient_accumulation_steps = 4
max_iters = 40
optimizer = 'adamw'
learning_rate = 3e-5
warmup_iters = 4
dropout = 0.1
eval_interval = 10
log_interval = 1
