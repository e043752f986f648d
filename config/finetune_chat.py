# SmolLM2-135M-Instruct, fine-tuned on your own conversations: a persona, or a friend's voice.
#     python prepare/chat.py --input=FILE --tokenizer=smollm2
#     python train.py config/finetune_chat.py
#     python sample.py --out_dir=out/finetune_chat --chat
# 492 short conversations: 6.1 minutes on one thread of a busy two-core machine, peak memory 3.8 GB.
# --gradient_checkpointing=False: 5.0 GB, 2.5 s per step instead of 3. docs/chatbots.md has replies.
init_from = 'smollm2'
dataset = 'chat'
block_size = 512
batch_tokens = 1024
gradient_checkpointing = True
max_epochs = 3
optimizer = 'adamw'
learning_rate = 1e-4    # val 0.149 nats after 3 epochs; see docs/chatbots.md for 5e-5
weight_decay = 0.01
beta2 = 0.999
warmup_iters = 10
dropout = 0.0
eval_interval = 0       # after each epoch
patience = 1            # stop when val rises: from there on it memorizes
log_interval = 10
