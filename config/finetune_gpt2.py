# GPT-2 124M goes on training on Tiny Shakespeare. Downloads 548 MB once; 8,192 tokens a step, so 37 steps see the text once.
# On a CPU it holds 3.7 GB, with --gradient_checkpointing 2.8 GB. Not yet run to its end.
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
